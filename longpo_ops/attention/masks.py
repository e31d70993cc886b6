"""Which keys a row sees, read off the mask function that transformers hands to an attention implementation.

    full      row t sees [0, t]
    window W  row t sees [max(0, t - W + 1), t]
    chunk C   row t sees [C floor(t / C), t]

A mask function says of any row and key whether it is seen, without a mask being made. It is asked about rows far beyond any
context, about every key of some rows and every row's last key: some 10 ms. Not covered: masks that change beyond FAR rows.

Tests: tests/attention/test_masks.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FAR = (1 << 20) + 12345
LOOKED_AT = (FAR, FAR - 1, 100_003, 4097, 4096, 1)  # rows of which every key is asked


@dataclass(frozen=True)
class Seen:
    """The keys that a layer's rows see: with neither a window nor a chunk, all of the past."""

    window: int | None = None
    chunk: int | None = None

    def __str__(self) -> str:
        if self.window is not None:
            return f"window {self.window}"
        return "full" if self.chunk is None else f"chunk {self.chunk}"

    def first_key(self, row: int) -> int:
        """The first key that a row sees."""
        if self.window is not None:
            return max(0, row - self.window + 1)
        return 0 if self.chunk is None else row - row % self.chunk


def read_mask(mask_function: Callable) -> Seen | None:
    """What a mask function of transformers (batch, head, row, key) shows; None where it is none of the three."""
    shown = {row: _shown(mask_function, row) for row in LOOKED_AT}
    if None in shown.values():
        return None
    seen = _guess(mask_function, shown[FAR][0], shown[FAR - 1][0])
    return seen if all(keys == (seen.first_key(row), row + 1) for row, keys in shown.items()) else None


def _guess(mask_function: Callable, first: int, before: int) -> Seen:
    """first, before: the first keys of the last two rows."""
    if first == 0:
        return Seen()
    if first != before:
        return Seen(window=FAR - first + 1)
    rows = torch.arange(1, FAR, dtype=torch.int32)
    alone = ~_ask(mask_function, rows, rows - 1)  # rows that do not see the one before: a chunk begins
    return Seen(chunk=int(rows[alone][0])) if alone.any() else Seen(window=1)


def _shown(mask_function: Callable, row: int) -> tuple[int, int] | None:
    """[first, end) of the keys that a row sees, up to one behind it; None where they have gaps."""
    shown = (
        _ask(mask_function, torch.tensor(row, dtype=torch.int32), torch.arange(row + 2, dtype=torch.int32))
        .nonzero()
        .flatten()
    )
    if not len(shown) or int(shown[-1]) - int(shown[0]) + 1 != len(shown):
        return None
    return int(shown[0]), int(shown[-1]) + 1


def _ask(mask_function: Callable, rows: Tensor, keys: Tensor) -> Tensor:
    batch = head = torch.tensor(0)
    return mask_function(batch, head, rows, keys).to(torch.bool).expand(max(rows.numel(), keys.numel()))
