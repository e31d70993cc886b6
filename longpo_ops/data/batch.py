"""Tokenised pairs, or trees of sequences, packed into one row (1, N), a pack, that pays once for what sequences share.

Per pair, rejected sequence j leaving the others' path at its token f_j (tree.py; layout.py draws it):

    rows = chosen sequence, then of each rejected one its tokens from f_j on : C + sum_j (R_j - f_j)

f_j + 1 is where the answers begin, or the sequences part if they do so earlier; so every row t has one label, the token that
follows its own in its own sequence, and nothing needs a shift:

    labels[t]       that token where it is an answer token or counts in the NLL term, else -100
    segments[t]     k where it is an answer token of sequence k, else -1
    nll_weights[t]  1 / n where it counts in the NLL term, n the counted tokens of the pair's chosen sequence (Eq. 14;
                    the mean over pairs is the loss's)

Sequences are numbered as packed_preference_loss wants them: the chosen one of pair b is b, rejected ones follow from B on,
pair by pair. Pairs follow each other, positions start from 0 in each; nothing is padded. Memory: 40 bytes per row. Not
covered: batches of several packs.

pack_tree takes any sequences of a document, by their numbers: several questions, several answers each. Where more than one of
them counts a token in its NLL term, their weights of the row that they share are summed.

With separate=True, for models that share no prefix, sequence k is a span of its own, whole, with one tail, in that order: all
chosen ones, then all rejected ones. What rows say of themselves is as above, so the same loss reads both:

    rows = [chosen 0 | chosen 1 ... | rejected 0 | rejected 1 ...] : sum_k length_k
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..kinds import check_each, check_flag, check_object, check_whole
from .layout import PairSpans, SharedPrefixLayout
from .tokenized import IGNORE, TokenizedPair, TokenSequence
from .tree import grow, shared_by_all


@dataclass(frozen=True, eq=False)
class TreeBatch:
    """A pack of N tokens with K sequences; the host lists need no synchronisation to read."""

    input_ids: Tensor  # (1, N) int64
    position_ids: Tensor  # (1, N) int64
    labels: Tensor  # (N,) int64, the token that each row predicts, or -100
    segments: Tensor  # (N,) int64, the sequence k whose answer token the row predicts, or -1
    nll_weights: Tensor  # (N,) float64
    layout: SharedPrefixLayout
    answer_spans: tuple[tuple[tuple[int, int], ...], ...]  # (K,) row ranges [start, end) where segments is k

    def to(self, device, non_blocking: bool = False) -> Self:
        """The batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The batch with its tensors in pinned memory (a DataLoader calls this)."""
        return self._map(Tensor.pin_memory)

    def _map(self, function) -> Self:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(t) for name, t in tensors.items() if isinstance(t, Tensor)})

    def unpack(self) -> tuple[TokenSequence, ...]:
        """The K separate sequences, labels aligned with ids again; the NLL labels are None, but in pairs' chosen ones."""
        ids, labels = self.input_ids[0].cpu().numpy(), self.labels.cpu().numpy()
        segments, weights = self.segments.cpu().numpy(), self.nll_weights.cpu().numpy()
        sequences: list[TokenSequence] = []
        for k, rows in enumerate(self._rows()):
            nll = _unshift(labels[rows], weights[rows] > 0) if self._alone_in_nll(k) else None
            sequences.append(TokenSequence(ids[rows], _unshift(labels[rows], segments[rows] == k), nll))
        return tuple(sequences)

    def _rows(self) -> Iterator[np.ndarray]:
        """Of each sequence, in order; its answers are rows of the tail that it ends with."""
        for (row, _), *_ in self.answer_spans:
            spans = self.layout.pairs[bisect_right(self.layout.pairs, row, key=lambda spans: spans.end)]
            yield np.concatenate([np.arange(*part) for part in spans.path(spans.tail_of(row))])

    def _alone_in_nll(self, k: int) -> bool:
        """Whether the NLL weights of a sequence's rows are its own."""
        return False


@dataclass(frozen=True, eq=False)
class PairBatch(TreeBatch):
    """A pack of N tokens with K sequences in B pairs."""

    ids: tuple[str, ...]  # (B,) record ids
    rejected_pair: tuple[int, ...]  # (K - B,) the pair of each rejected sequence
    ref_logps: Tensor | None = None  # (K,) float64, the reference's log-probs, where every pair came with them

    @property
    def num_pairs(self) -> int:
        return len(self.ids)

    @property
    def groups(self) -> tuple[int, ...]:
        """(K,) the pair of each sequence."""
        return (*range(self.num_pairs), *self.rejected_pair)

    @property
    def roles(self) -> tuple[str, ...]:
        """(K,) what each sequence is in its pair."""
        return ("chosen",) * self.num_pairs + ("rejected",) * len(self.rejected_pair)

    def _alone_in_nll(self, k: int) -> bool:
        return k < self.num_pairs


def packed_length(pair: TokenizedPair, separate: bool = False) -> int:
    """Rows that a pair takes in a pack."""
    sequences = _sequences(check_object("pair", pair, TokenizedPair, "a TokenizedPair"))
    shared = 0 if check_flag("separate", separate) else sum(b.first for b in grow(pair.id, sequences))
    return sum(map(len, sequences)) - shared


def pack(
    pairs: Sequence[TokenizedPair], target_length: int | None = None, seed: int = 0, *, separate: bool = False
) -> PairBatch:
    """Pack pairs into one sequence. A pair may have no rejected sequences: plain causal training on the chosen one.

    target_length: spread each pair's positions over [0, target_length) with `spread_positions`, a draw of its own per
    `seed` and record id. separate: every sequence whole, for models that read them one by one. Raises ValueError for no
    pairs, for a pair whose sequences share no prefix before their answers (separate: for a sequence that begins with its
    answer), and for a target_length of separate sequences.
    """
    pairs = list(check_each("pairs", pairs, TokenizedPair, "a TokenizedPair"))
    if not pairs:
        raise ValueError("no pairs came; expected at least one to pack")
    target_length = None if target_length is None else check_whole("target_length", target_length, 1)
    seed = check_whole("seed", seed, 0)
    if check_flag("separate", separate) and target_length is not None:
        raise ValueError(f"target_length={target_length} with separate=True: expected none of the two, or one")
    rejected_pair = [b for b, pair in enumerate(pairs) for _ in pair.rejected]
    count = len(pairs) + len(rejected_pair)
    columns = _packed(_spans_of(pairs, separate), count, target_length, seed, counting=len(pairs))
    ids = tuple(pair.id for pair in pairs)
    return PairBatch(**columns, ids=ids, rejected_pair=tuple(rejected_pair), ref_logps=_ref_logps(pairs))


def pack_tree(*documents: Sequence[TokenSequence]) -> TreeBatch:
    """Pack sequences into one row that holds once what they share: of each document K_d sequences, such as several questions
    about it and several answers to each.

    What is shared is found by their tokens (tree.py), whatever their order; a document's sequences share at least their first
    token. They are numbered in the order in which they came. Answers are never shared by two: each row has one label, and
    `segments` says of which sequence. Raises ValueError for no documents or sequences, for one that begins with its answer
    or has none, and for documents whose sequences share nothing.
    """
    groups, number = [], 0
    for d, document in enumerate(check_each("documents", documents, (tuple, list), "a list of TokenSequences")):
        sequences = list(check_each(f"document {d}", document, TokenSequence, "a TokenSequence", (tuple, list)))
        if not sequences:
            raise ValueError(f"document {d}: no sequences came; expected at least one")
        groups.append((f"document {d}", list(enumerate(sequences, number))))
        number += len(sequences)
    if not groups:
        raise ValueError("no documents came; expected at least one to pack")
    return TreeBatch(**_packed(groups, number, counting=number))


def pack_within(
    pairs: Iterable[TokenizedPair],
    max_tokens: int,
    *,
    separate: bool = False,
    length: Callable[[TokenizedPair, bool], int] = packed_length,
) -> Iterator[list[TokenizedPair]]:
    """Group pairs, in their order, into lists that pack into at most max_tokens rows each: as many as fit, greedily.

    separate: as in pack. length: the rows that a pair takes. Raises ValueError, naming the record, for a pair that does not
    fit alone.
    """
    max_tokens = check_whole("max_tokens", max_tokens, 1)
    group, used = [], 0
    for pair in check_each("pairs", pairs, TokenizedPair, "a TokenizedPair"):
        rows = length(pair, separate)
        if rows > max_tokens:
            raise ValueError(
                f"record {pair.id!r} packs into {rows} tokens, the budget of a pack is {max_tokens}; raise the "
                "budget, or refuse or cut long documents with max_length"
            )
        if used + rows > max_tokens:
            yield group
            group, used = [], 0
        group.append(pair)
        used += rows
    if group:
        yield group


def spread_positions(
    length: int, tail: int, target_length: int, rng: np.random.Generator, chunks: int = 8
) -> np.ndarray:
    """Position ids (length + tail,) that let a short sequence cover long positions (LOGO, arXiv 2410.18533).

    length: tokens of the prefix. It falls into `chunks` stretches of equal size (at most `length`) with contiguous
    positions; before each but the first a random gap opens, and the gaps add up to the room there is, so that positions
    rise strictly from 0 to target_length - 1. The last stretch and the tail (the answers, and all turns after the
    first) stay contiguous. With one stretch there is no gap: positions 0, 1, 2, ...
    Raises ValueError if length + tail exceed target_length, or length < 1.
    """
    sizes = {"length": (length, 1), "tail": (tail, 0), "target_length": (target_length, 1), "chunks": (chunks, 0)}
    length, tail, target_length, chunks = (check_whole(name, *given) for name, given in sizes.items())
    check_object("rng", rng, np.random.Generator, "a numpy.random.Generator")
    room = target_length - length - tail
    if room < 0:
        raise ValueError(
            f"a sequence of {length} + {tail} tokens came for target_length {target_length}; expected a prefix of at "
            "least one token and a target no shorter than the sequence"
        )
    chunks = max(1, min(chunks, length))
    # Shift of each stretch: 0, then sorted draws, then all the room, so that the answers sit at the far end.
    shifts = np.sort(rng.integers(0, room + 1, size=max(0, chunks - 2)))
    shifts = np.concatenate([[0], shifts, [room]])[:chunks]
    stretch = np.arange(length) * chunks // length
    positions = np.arange(length + tail, dtype=np.int64)
    positions[:length] += shifts[stretch]
    positions[length:] += shifts[-1]
    return positions


def _sequences(pair: TokenizedPair) -> tuple[TokenSequence, ...]:
    return pair.chosen, *pair.rejected


Group = tuple[str, list[tuple[int, TokenSequence]]]  # a record's id, and numbered sequences of one document


def _spans_of(pairs: list[TokenizedPair], separate: bool) -> Iterator[Group]:
    """A group for each span: a pair, or a sequence alone."""
    rejected = [(pair.id, sequence) for pair in pairs for sequence in pair.rejected]
    numbered = [*((pair.id, pair.chosen) for pair in pairs), *rejected]
    if separate:
        yield from ((name, [(k, sequence)]) for k, (name, sequence) in enumerate(numbered))
        return
    k = len(pairs)
    for b, pair in enumerate(pairs):
        yield pair.id, [(b, pair.chosen), *enumerate(pair.rejected, k)]
        k += len(pair.rejected)


def _packed(
    groups: Iterable[Group], count: int, target_length: int | None = None, seed: int = 0, *, counting: int
) -> dict[str, Any]:
    """What a TreeBatch of `count` sequences holds, of which those numbered below `counting` have NLL terms."""
    columns: defaultdict[str, list[np.ndarray]] = defaultdict(list)
    layout, row, above = [], 0, []  # above: of each branch, what its sequence's NLL term counts in rows that it shares
    for name, numbered in groups:
        sequences = [sequence for _, sequence in numbered]
        branches, starts, tails = grow(name, sequences), [], []
        prefix = shared_by_all(sequences, branches)
        positions = _positions(name, max(map(len, sequences)), prefix, target_length, seed)
        for number, first, _ in branches:
            k, sequence = numbered[number]
            labels, segments, weights = _targets(sequence, k, with_nll=k < counting)
            said = dict(ids=sequence.ids, positions=positions, labels=labels, segments=segments, weights=weights)
            for what, of_rows in said.items():
                columns[what].append(of_rows[first : len(sequence)])
            above.append((weights[:first], sequence.ids[1 : first + 1]))
            starts.append(row)
            row += len(sequence) - first
            tails.append((starts[-1], row))
        start = starts[0]
        tails[0] = start + prefix, tails[0][1]
        forks = (starts[parent] + first - branches[parent].first for _, first, parent in branches[1:])
        layout.append(PairSpans(start, start + prefix, tuple(tails), tuple(forks)))
    packed = {name: np.concatenate(parts) for name, parts in columns.items()}
    paths = (spans.path(j)[:-1] for spans in layout for j in range(len(spans.tails)))
    for path, (weights, following) in zip(paths, above, strict=True):
        if weights.any():
            rows = np.concatenate([np.arange(*part) for part in path])
            packed["weights"][rows] += weights
            packed["labels"][rows] = np.where(weights > 0, following, packed["labels"][rows])
    tensors = {name: torch.from_numpy(column) for name, column in packed.items()}
    return dict(
        input_ids=tensors["ids"][None],
        position_ids=tensors["positions"][None],
        labels=tensors["labels"],
        segments=tensors["segments"],
        nll_weights=tensors["weights"],
        layout=SharedPrefixLayout(tuple(layout), row),
        answer_spans=_answer_spans(packed["segments"], count),
    )


def _positions(name: str, length: int, prefix: int, target_length: int | None, seed: int) -> np.ndarray:
    """Position ids of a pair's longest sequence; the others take as many from the start, as they share the prefix."""
    if target_length is None:
        return np.arange(length, dtype=np.int64)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    try:
        return spread_positions(prefix, length - prefix, target_length, rng)
    except ValueError as error:
        raise ValueError(f"record {name!r}: {error}") from None


def _targets(sequence: TokenSequence, k: int, with_nll: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """labels, segments and nll_weights (T,) of the rows of a whole sequence: what row t says about token t + 1."""
    answer = np.append(sequence.labels[1:] != IGNORE, False)
    nll = np.zeros_like(answer)
    if with_nll and sequence.nll_labels is not None:
        nll[:-1] = sequence.nll_labels[1:] != IGNORE
    following = np.append(sequence.ids[1:], IGNORE)
    labels = np.where(answer | nll, following, IGNORE)
    weights = nll / max(1, nll.sum())
    return labels, np.where(answer, k, -1), weights


def _unshift(labels: np.ndarray, chosen_rows: np.ndarray) -> np.ndarray:
    """Labels aligned with ids (T,) from row labels (T,), of the rows picked."""
    return np.concatenate([[IGNORE], np.where(chosen_rows, labels, IGNORE)[:-1]])


def _answer_spans(segments: np.ndarray, count: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    borders = np.flatnonzero(np.diff(segments, prepend=-1, append=-1))
    spans: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for start, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        if segments[start] >= 0:
            spans[segments[start]].append((start, end))
    return tuple(tuple(of_sequence) for of_sequence in spans)


def _ref_logps(pairs: Sequence[TokenizedPair]) -> Tensor | None:
    if any(pair.ref_chosen_logp is None for pair in pairs):
        return None
    for pair in pairs:
        came, wanted = len(pair.ref_rejected_logps or ()), len(pair.rejected)
        if wanted and came != wanted:
            raise ValueError(
                f"record {pair.id!r}: ref_rejected_logps has {came} log-probs, expected {wanted}, one each"
            )
    chosen = [pair.ref_chosen_logp for pair in pairs]
    rejected = [value for pair in pairs if pair.rejected for value in pair.ref_rejected_logps or ()]
    return torch.tensor(chosen + rejected, dtype=torch.float64)
