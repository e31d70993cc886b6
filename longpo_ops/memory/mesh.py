"""The cards of a plan: FSDP2 shards every weight over all of them, Ulysses shares the rows of a pack over some of them.

    cards = sequence_parallel x data_parallel; each data-parallel group reads a pack of its own

Bytes that a card sends for a pack, checkpointed, so that attention's exchanges run in forward, recomputation and backward:

    Ulysses   3 L b D ((N/n) (q + k + v heads of the other ranks) + (N - N/n) (own q heads)),   n = sequence_parallel
    FSDP2     P (2 b + r) (C - 1) / C                                                           C = cards

b, r: bytes of a number in the compute dtype and in reduced gradients. A kv head that several ranks need is sent to each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from longpo_ops.attention.ulysses import head_plan
from longpo_ops.kinds import check_choice, check_whole, refusal

PASSES = 3  # forward, recomputation, backward
PRECISIONS = ("no", "fp16", "bf16")  # accelerate's


@dataclass(frozen=True)
class Mesh:
    """The cards that train one model, all alike, cards_per_node of them in a machine.

    mixed_precision: accelerate's. With "bf16" it keeps weights in float32 (states and gradients, too) and gathers them in the
        compute dtype; with "no" weights stay as they are and memory.AdamW keeps its master beside them.
    reduce_bytes: of a number of a gradient that is summed over cards; default, and accelerate's, the compute dtype's.
        Each pack's are summed at once (sync_each_batch), so that a step of several packs keeps shards of them.

    Raises ValueError for cards that sequence_parallel does not divide. One card is no mesh: nothing is sharded.
    """

    cards: int = 1
    sequence_parallel: int = 1
    cards_per_node: int = 8
    mixed_precision: str = "no"
    reduce_bytes: int | None = None

    def __post_init__(self):
        for name in ("cards", "sequence_parallel", "cards_per_node"):
            check_whole(name, getattr(self, name), 1)
        check_choice("mixed_precision", self.mixed_precision, PRECISIONS)
        if self.reduce_bytes not in (None, 2, 4):
            raise refusal("reduce_bytes", self.reduce_bytes, "2 or 4")
        if self.cards % self.sequence_parallel:
            raise refusal("sequence_parallel", self.sequence_parallel, f"a divisor of the number of GPUs, {self.cards}")

    @property
    def sharded(self) -> bool:
        return self.cards > 1

    @property
    def on_node(self) -> int:
        """Cards of a machine, which share its host's memory and its disk."""
        return min(self.cards, self.cards_per_node)

    @property
    def data_parallel(self) -> int:
        return self.cards // self.sequence_parallel

    def share(self, total: int) -> int:
        """A card's part of bytes or numbers that are sharded over all cards."""
        return -(-total // self.cards)

    def reduced_bytes(self, dtype: torch.dtype) -> int:
        """Of a number of a gradient on its way to be summed, for a model that computes in dtype."""
        return self.reduce_bytes or dtype.itemsize

    def fsdp_sent(self, weights: int, dtype: torch.dtype, gathers: int = 2, reduced: bool = True) -> int:
        """Bytes that a card sends to gather so many weights, and to reduce their gradients."""
        nbytes = gathers * dtype.itemsize + reduced * self.reduced_bytes(dtype)
        return weights * nbytes * (self.cards - 1) // self.cards

    def ring_seconds(self, nbytes: int, inside: float, between: float) -> float:
        """Of nbytes that each card passes to the next, over all cards: over several nodes the slowest way sets the pace."""
        return nbytes / (inside if self.cards <= self.cards_per_node else between)

    def exchange_seconds(self, nbytes: int, inside: float, between: float) -> float:
        """Of nbytes that each of sequence_parallel cards sends to the others in equal parts; to those of other nodes over the
        slower way, at the same time."""
        neighbours = min(self.sequence_parallel, self.cards_per_node) - 1
        near = nbytes * neighbours / max(1, self.sequence_parallel - 1)
        return max(near / inside, (nbytes - near) / between)


ONE_CARD = Mesh()


class Heads(NamedTuple):
    """Numbers of query and kv heads of each rank, kv heads repeated where ranks share them."""

    query: tuple[int, ...]
    kv: tuple[int, ...]

    @property
    def busiest(self) -> int:
        """The rank that the others wait for, and that needs the most memory."""
        return max(range(len(self.query)), key=lambda rank: (self.query[rank], self.kv[rank]))

    def sent(self, rows: int, head_dim: int, itemsize: int) -> int:
        """Bytes that a rank sends in one pass of one layer, at most: q, k, v to the others' heads, outputs to their rows."""
        all_heads, others = sum(self.query) + 2 * sum(self.kv), len(self.query) - 1
        most = max(all_heads - q - 2 * kv + others * q for q, kv in zip(self.query, self.kv, strict=True))
        return rows * most * head_dim * itemsize


def heads_of(config, ranks: int) -> Heads:
    """Raises ValueError for heads that cannot be shared over so many ranks."""
    heads = config.num_attention_heads
    shares = head_plan(heads, getattr(config, "num_key_value_heads", None) or heads, ranks)
    return Heads(*(tuple(map(len, each)) for each in zip(*shares, strict=True)))


def head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
