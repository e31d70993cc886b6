"""Which rows of the hidden states are visited, and in which chunks: planned on the host, read chunk by chunk.

A Stretch is one sequence of T rows: a view of its hidden states, and per row an answer label with a sequence number and
an NLL label with a weight. `chunks` walks windows of WINDOW positions, picks the rows a mask selects, and yields them in
chunks of even size, at most `limit` rows, so scratch is the same for any T. Labels, sequence numbers and per-row weights are
read on the host: given there, nothing ever waits for the device; given on the device, they are copied once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .products import row_major

WINDOW = 1 << 14


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on the device, without waiting for it: CUDA reads pinned memory only by itself, so numbers of the host are
    converted and pinned there first. Torch keeps pinned memory until the stream has passed the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.to(dtype or tensor.dtype).contiguous().pin_memory()
    return tensor.to(device, dtype, non_blocking=True)


class Stretch(NamedTuple):
    hidden: Tensor  # (T, H) a view
    grad: Tensor | None  # (T, H) where the gradient of hidden goes
    answers: Tensor | None  # (T,) int64, host: label of an answer row, else ignore_index
    segments: Tensor | None  # (T,) or (1,) int64, host: sequence number of answers, -1 for none
    nll: Tensor | None  # (T,) int64, host: label of an NLL row, else ignore_index
    nll_weights: Tensor | None  # (T,) or (1,), host or device
    ignore_index: int

    def __len__(self) -> int:
        labels = self.nll if self.answers is None else self.answers
        return self.hidden.shape[0] if labels is None else labels.shape[0]

    def held(self, rows: slice) -> Stretch:
        """Of a stretch whose hidden states and gradient are those of some rows alone: the rest for these rows, too."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or tensor.shape[0] != len(self) else tensor[rows]

        data = map(cut, (self.answers, self.segments, self.nll, self.nll_weights))
        return Stretch(self.hidden, self.grad, *data, self.ignore_index)

    def segments_at(self, rows: slice | Tensor) -> Tensor:
        """Sequence numbers of those rows (a window or positions), -1 where a row is no answer."""
        if self.answers is None:
            count = rows.shape[0] if isinstance(rows, Tensor) else len(range(len(self))[rows])
            return torch.full((count,), -1)
        answers = self.answers[rows]
        segments = self.segments[rows] if self.segments.shape[0] > 1 else self.segments.expand(answers.shape[0])
        return segments.masked_fill(answers == self.ignore_index, -1)

    def nll_mask(self, rows: slice | Tensor) -> Tensor:
        """Which of those rows carry the NLL term; a weight of zero is seen where weights are on the host."""
        if self.nll is None:
            return torch.zeros_like(self.segments_at(rows), dtype=torch.bool)
        mask = self.nll[rows] != self.ignore_index
        if self.nll_weights.shape[0] > 1 and self.nll_weights.device.type == "cpu":
            mask &= self.nll_weights[rows] != 0
        return mask


class Piece(NamedTuple):
    """Some rows of one stretch: a slice where they are contiguous, else positions on the host."""

    stretch: Stretch
    index: Tensor  # (n,) int64, host, increasing

    def run(self) -> slice | None:
        first, last = int(self.index[0]), int(self.index[-1])
        return slice(first, last + 1) if last - first + 1 == self.index.shape[0] else None

    def read(self, tensor: Tensor) -> Tensor:
        """The piece's rows of a (T, ...) tensor on any device."""
        run = self.run()
        if run is not None:
            return tensor[run]
        return tensor.index_select(0, to_device(self.index, tensor.device))

    def write(self, tensor: Tensor, rows: Tensor) -> None:
        run = self.run()
        if run is not None:
            tensor[run] = rows
        else:
            tensor.index_copy_(0, to_device(self.index, tensor.device), rows.to(tensor.dtype))


class Chunk:
    """At most `limit` rows, possibly from several stretches."""

    def __init__(self, pieces: list[Piece]):
        self.pieces = pieces

    def _cat(self, parts: list[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def hidden(self, dtype: torch.dtype) -> Tensor:
        """(n, H) in `dtype`, as products take it; a view where the rows are contiguous and already of that dtype."""
        return row_major(self._cat([p.read(p.stretch.hidden).to(dtype) for p in self.pieces]))

    def segments(self) -> Tensor:
        """(n,) int64, host: sequence of an answer row, -1 for a row that is none."""
        return self._cat([p.stretch.segments_at(p.index) for p in self.pieces])

    def labels(self) -> Tensor:
        """(n,) int64, host: the answer label, or the NLL label of a row that is no answer."""
        return self._cat([_labels(p) for p in self.pieces])

    def nll_weights(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(n,) on the device: NLL weight, 0 for rows that carry none."""
        return self._cat([_nll_weights(p, device, dtype) for p in self.pieces])

    def read(self, numbers: Tensor, device: torch.device) -> Tensor:
        """(n,) on the device: the chunk's rows of (T,) numbers of its one stretch, on any device."""
        return self._cat([to_device(p.read(numbers), device) for p in self.pieces])

    def write(self, rows: Tensor, target: Tensor | None = None) -> None:
        """rows (n, ...) to their places in a (T, ...) target, or in each stretch's gradient."""
        start = 0
        for piece in self.pieces:
            stop = start + piece.index.shape[0]
            piece.write(piece.stretch.grad if target is None else target, rows[start:stop])
            start = stop


def _labels(piece: Piece) -> Tensor:
    s = piece.stretch
    if s.answers is None or s.nll is None:
        return (s.nll if s.answers is None else s.answers)[piece.index]
    answers = s.answers[piece.index]
    return torch.where(answers == s.ignore_index, s.nll[piece.index], answers)


def _nll_weights(piece: Piece, device: torch.device, dtype: torch.dtype) -> Tensor:
    s, count = piece.stretch, piece.index.shape[0]
    if s.nll is None:
        return torch.zeros(count, device=device, dtype=dtype)
    weights = s.nll_weights if s.nll_weights.shape[0] == 1 else piece.read(s.nll_weights)
    carries = to_device(s.nll_mask(piece.index), device)
    return torch.where(carries, to_device(weights, device, dtype).expand(count), 0.0)


def sizes(total: int, limit: int, unit: int = 1) -> Iterator[int]:
    """Splits `total` rows into the fewest parts of at most `limit`, alike but for `unit`, of which all parts are multiples
    but the last, where `limit` is one. Few rows make slow products, and each part reads and writes the head's gradient."""
    if limit % unit:
        unit = 1
    units, parts = -(-total // unit), -(-total // limit)
    start = 0
    for part in range(1, parts + 1):
        stop = min(total, -(-units * part // parts) * unit)
        yield stop - start
        start = stop


def windows(stretches: list[Stretch]) -> list[tuple[Stretch, int]]:
    """Every window of the stretches: where it starts in which of them."""
    return [(stretch, start) for stretch in stretches for start in range(0, len(stretch), WINDOW)]


def chunks(
    places: Sequence[tuple[Stretch, int]], select: Callable[[Stretch, slice], Tensor], limit: int, unit: int = 1
) -> Iterator[Chunk]:
    """Rows of these windows where select(stretch, window) (a host bool mask) is true, in order and in chunks of `sizes`:
    they are counted first, which costs microseconds a window."""

    def mask(stretch: Stretch, start: int) -> Tensor:
        return select(stretch, slice(start, start + WINDOW))

    rooms = sizes(sum(int(mask(*place).sum()) for place in places), limit, unit)
    pieces, room = [], next(rooms, 0)
    for stretch, start in places:
        index = mask(stretch, start).nonzero().squeeze(-1) + start
        while index.shape[0]:
            taken, index = index[:room], index[room:]
            pieces.append(Piece(stretch, taken))
            room -= taken.shape[0]
            if room == 0:
                yield Chunk(pieces)
                pieces, room = [], next(rooms, 0)
