"""Which rows of one packed row each rank of a process group holds.

    rank r of n holds rows [N r // n, N (r + 1) // n) of N

Shards differ by at most one row; nothing is padded. Labels, positions, segments and weights are cut from the whole row, which
every rank has on its host, so nothing shifts at a shard's edge. Tests: tests/parallel/test_shards.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Shards:
    """The rows [0, length) shared out over `group`; made alike on every rank. Raises ValueError for fewer rows than ranks."""

    length: int
    group: dist.ProcessGroup

    def __post_init__(self):
        if self.length < self.size:
            raise ValueError(
                f"a row of {self.length} tokens over {self.size} ranks: expected at least a token for each; lower "
                "sequence_parallel"
            )

    @property
    def size(self) -> int:
        return self.group.size()

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def rows(self) -> slice:
        """Those of this rank."""
        return self.rows_of(self.rank)

    def rows_of(self, rank: int) -> slice:
        return slice(self.length * rank // self.size, self.length * (rank + 1) // self.size)

    def counts(self) -> list[int]:
        """Rows of every rank."""
        return [rows.stop - rows.start for rows in map(self.rows_of, range(self.size))]

    def sum_(self, values: Tensor) -> Tensor:
        """values, with those of all ranks added in place; a collective."""
        dist.all_reduce(values, group=self.group)
        return values
