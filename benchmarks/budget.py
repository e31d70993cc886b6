"""The error budget every result is judged by.

    max |ours - truth| <= 2 max |plain - truth| + ulp(max |truth|)

truth is float64, plain is plain PyTorch at ours' dtype, ulp is that of ours' dtype. NaN and infinities must be where
truth has them. `judge` returns numbers, so that a report can show by how much a result passed or failed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def judge(ours: Tensor, plain: Tensor, truth: Tensor) -> dict:
    """Three tensors of one shape -> {"status": "passed" or "failed: why", "error", "allowed", "plain_error"}."""
    if ours.shape != truth.shape:
        return {"status": f"failed: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"}
    for special in (torch.isnan, torch.isposinf, torch.isneginf):
        if not torch.equal(special(ours), special(truth)):
            return {"status": f"failed: {special.__name__} holds elsewhere than in the truth"}
    finite = truth.isfinite()
    if not bool(finite.any()):
        return {"status": "passed", "error": 0.0, "allowed": 0.0, "plain_error": 0.0}
    largest = float(truth[finite].abs().max())
    ulp = torch.finfo(ours.dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest else 0.0
    error, plain_error = (float((x.double() - truth)[finite].abs().max()) for x in (ours, plain))
    allowed = 2 * plain_error + ulp if math.isfinite(plain_error) else ulp
    status = "passed" if error <= allowed else f"failed: error {error:.3e}, allowed {allowed:.3e}"
    return {"status": status, "error": error, "allowed": allowed, "plain_error": plain_error}


def worst(verdicts: dict[str, dict]) -> dict:
    """Verdicts by name -> one row: the first failure, else the one that used most of its allowance."""
    for name, verdict in verdicts.items():
        if verdict["status"] != "passed":
            return verdict | {"status": f"{verdict['status']} ({name})"}
    used = {name: v["error"] / v["allowed"] if v["allowed"] else 0.0 for name, v in verdicts.items()}
    tightest = max(used, key=used.get)
    return verdicts[tightest] | {"tightest": tightest, "judged": list(verdicts)}
