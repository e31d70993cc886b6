"""How tests hold results to the error budget of benchmarks/budget.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.budget import judge


def check_budget(
    name: str,
    ours: Tensor | Sequence[Tensor],
    plain: Tensor | Sequence[Tensor],
    truth: Tensor | Sequence[Tensor],
    *,
    draws: bool = False,
) -> None:
    """Fails beyond the budget. draws: the first dimension counts draws, as the elements of sequences do."""
    if not isinstance(ours, Tensor):
        ours, plain, truth = (torch.stack([x.detach() for x in results]) for results in (ours, plain, truth))
        draws = True
    verdict = judge(ours.detach(), plain.detach(), truth.detach(), draws=draws)
    assert verdict["status"] == "passed", f"{name}: {verdict}"
