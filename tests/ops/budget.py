"""How close a result must come to float64 truth: at most twice plain PyTorch's distance, plus one ulp.

    max|ours - truth| <= 2 max|plain - truth| + ulp(max|truth|)

`plain` is PyTorch on full logits at the same dtype, `truth` the same formula in float64 on the same numbers. In
float32 both distances are a few roundings, and which one is larger in a single draw of the numbers is a matter of
luck: there the tests compare their means over DRAWS draws of the same case.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DRAWS = 8


def ulp(largest: float, dtype: torch.dtype) -> float:
    """The distance from a number of that size to the next one the dtype holds."""
    info = torch.finfo(dtype)
    largest = max(largest, info.tiny)
    return info.eps * 2.0 ** torch.frexp(torch.tensor(largest, dtype=torch.float64)).exponent.item() / 2


def error(result: Tensor, truth: Tensor) -> float:
    """max|result - truth|; 0 for nothing."""
    return (result.detach().double() - truth.detach().double()).abs().max().item() if truth.numel() else 0.0


def check_budget(name: str, ours: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Fails unless ours keeps the budget; a NaN anywhere fails."""
    check_mean_budget(name, [ours], [plain], [truth])


def check_mean_budget(name: str, ours: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    """The budget of the mean error over several draws of the same case."""
    for a, t in zip(ours, truth, strict=True):
        assert a.shape == t.shape, f"{name}: shape {tuple(a.shape)}, expected {tuple(t.shape)}"
    mine, theirs = (sum(map(error, results, truth)) / len(truth) for results in (ours, plain))
    one = sum(ulp(t.abs().max().item(), a.dtype) if t.numel() else 0.0 for a, t in zip(ours, truth)) / len(truth)
    allowed = 2 * theirs + one
    assert mine <= allowed, (
        f"{name}: error {mine:.3e}, allowed {allowed:.3e} (plain PyTorch {theirs:.3e}, ulp {one:.3e})"
    )
