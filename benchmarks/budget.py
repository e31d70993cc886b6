"""The error budget every result is judged by, in tests and benchmarks alike.

    mean_d max |ours_d - truth_d|  <=  mean_d ( 2 max |plain_d - truth_d| + ulp(max |truth_d|) )

truth is float64, plain is plain PyTorch at ours' dtype, ulp is that of ours' dtype; d counts draws of the same case. Which of
two equally good ways makes the greater error in ONE draw is chance, and differs between processors: what is judged by
few numbers needs draws. Rows of a logits tile are draws. NaN and infinities must be where truth has them.

`judge` returns numbers, so that a report can show by how much a result passed or failed. Not covered: results without a
plain counterpart, and bits that must repeat; those are compared exactly. Tests: tests/benchmarks/gpu/test_check.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

DRAWS = 8


def judge(ours: Tensor, plain: Tensor, truth: Tensor, *, draws: bool = False) -> dict:
    """Three tensors of one shape -> {"status": "passed" or "failed: why", "error", "allowed", "plain_error"}.

    draws: their first dimension counts draws; else each is one. The ulp of draws of one number is that of the greatest.
    """
    if ours.shape != truth.shape:
        return {"status": f"failed: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"}
    for special in (torch.isnan, torch.isposinf, torch.isneginf):
        if not torch.equal(special(ours), special(truth)):
            return {"status": f"failed: {special.__name__} holds elsewhere than in the truth"}
    finite = truth.isfinite()
    if not bool(finite.any()):
        return {"status": "passed", "error": 0.0, "allowed": 0.0, "plain_error": 0.0}

    def greatest(x: Tensor) -> Tensor:
        return torch.where(finite, x, 0.0).abs().reshape(len(x) if draws else 1, -1).amax(1)

    top = greatest(truth.double())
    if draws and truth.dim() == 1:
        top = top.amax().expand_as(top)
    error = float(greatest(ours.double() - truth).mean())
    plain_errors = greatest(plain.double() - truth).nan_to_num(0.0, 0.0)  # what plain overflows in allows nothing
    allowed = float((2 * plain_errors + ulp(top, ours.dtype)).mean())
    status = "passed" if error <= allowed else f"failed: error {error:.3e}, allowed {allowed:.3e}"
    return {"status": status, "error": error, "allowed": allowed, "plain_error": float(plain_errors.mean())}


def ulp(size: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance from numbers >= 0 of that size to the next ones that dtype holds."""
    info = torch.finfo(dtype)
    return info.eps * torch.exp2(torch.frexp(size.double().clamp_min(info.tiny)).exponent.double() - 1)


def worst(verdicts: dict[str, dict]) -> dict:
    """Verdicts by name -> one row: the first failure, else the one that used most of its allowance."""
    for name, verdict in verdicts.items():
        if verdict["status"] != "passed":
            return verdict | {"status": f"{verdict['status']} ({name})"}
    used = {name: v["error"] / v["allowed"] if v["allowed"] else 0.0 for name, v in verdicts.items()}
    tightest = max(used, key=used.get)
    return verdicts[tightest] | {"tightest": tightest, "judged": list(verdicts)}
