"""Separate sequences of a pack, as a plan needs them: one forward each, one backward for all of them (train/forward.py).

    forwards   1 .. K, in this order: each keeps the inputs of its layers, its positions and what its last norm saves
    loss       hidden states of all, twice; their gradient waits until the backward of the first forward has begun
    backward   K, K-1 .. 1: what a forward kept goes as its backward passes. A weight's gradient is one sum over all K, which
               autograd holds until the backward of the first forward completes it, beside the sums of earlier packs

So a layer needs what the longest sequence needs, and inputs of all rows are there when the last sequence's backward begins.

Tests: tests/memory/test_plan_separate.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longpo_ops.kinds import check_whole
from longpo_ops.memory.structure import BY_HAND, window_of
from longpo_ops.memory.tiers import PAGE

if TYPE_CHECKING:
    from longpo_ops.memory.plan import Work


@dataclass(frozen=True)
class Sequences:
    """What no pack exceeds. longest: rows of a sequence. before: rows of a pack before its last sequence. most: sequences of
    a pack. attention: the model's own, by transformers' name."""

    longest: int
    before: int = 0
    most: int = 1
    attention: str = "sdpa"

    def __post_init__(self):
        for name, least in (("longest", 1), ("before", 0), ("most", 1)):
            check_whole(f"separate: {name}", getattr(self, name), least)

    @classmethod
    def of(cls, packs: Iterable[Sequence[int]], attention: str) -> Sequences:
        """packs: lengths of the sequences of each, in the order of their forwards."""
        packs = [tuple(pack) for pack in packs]
        longest, before = max(map(max, packs)), max(sum(pack[:-1]) for pack in packs)
        return cls(longest, before, max(map(len, packs)), attention)


def check_sequences(work: Work) -> None:
    """Raises ValueError for what is not known of the forwards of separate sequences: several cards; and attention that
    writes a mask or scores of rows x rows, as one of its own code, and a window in PyTorch's, do."""
    given, name = work.separate, f"model {work.config.name_or_path!r}, separate sequences"
    if work.mesh.cards > 1:
        raise ValueError(f"{name}: planned on one card, and {work.mesh.cards} came; {BY_HAND}")
    if given.attention.startswith("flash"):
        return
    if given.attention != "sdpa":
        raise ValueError(
            f"{name}: its attention ({given.attention}) makes scores of rows x rows, which are not planned; {BY_HAND}"
        )
    seen = [window_of(work.config, layer) for layer in range(work.weights.layers)]
    if shorter := [window for window in seen if window is not None and window < given.longest]:
        raise ValueError(
            f"{name}: {len(shorter)} layers see fewer than the {given.longest} tokens of the longest, by a mask of rows x "
            f"rows, which is not planned; {BY_HAND}"
        )


def parts_bytes(work: Work, layers: int) -> int:
    """Of separate sequences away from the device, beside their rows: each input ends in the midst of a page, and together they
    leave as much of the device unused as the longest has."""
    if work.separate is None:
        return 0
    return work.separate.most * layers * PAGE + work.rows_at_once * work.row_bytes
