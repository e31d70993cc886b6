"""What training and evaluation report: means over pairs or sequences, whatever packs and processes hold them.

    mean = sum over packs of total / sum over packs of count        a pack's share: (2,) float64, [total, count]

Tests: tests/train/test_trainer.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def total(values: Tensor, count: int) -> Tensor:
    """(2,) float64, detached: the sum of `values` (any shape), and how many pairs or sequences it is of."""
    summed = values.detach().double().sum()
    return torch.stack([summed, summed.new_tensor(float(count))])


class Totals:
    """Sums of shares by metric name. Empty, it is false."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, shares: dict[str, Tensor]) -> None:
        for name, share in shares.items():
            self._sums[name] = self._sums.get(name, 0) + share.double()

    def count(self, name: str, reduce: Callable[[Tensor], Tensor]) -> int:
        """Of how many pairs or sequences the mean of that name is."""
        return round(float(reduce(self._sums[name])[1]))

    def means(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """By name. reduce: sums a tensor over the processes, all of which must hold the same names."""
        sums = reduce(torch.stack(list(self._sums.values())))
        return dict(zip(self._sums, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))
