"""Autograd on a few numbers wherever it is off: inside a registered operator, under no_grad, in inference mode.

Below a registered operator torch keeps autograd's dispatch keys switched off, and enable_grad() alone records nothing. Here
the keys are put back, saved tensors pass no hooks of the caller (save_on_cpu and the like), autocast and inference mode are
off, and what is differentiated is a copy. The guard is a private interface of torch: tests hold it on the oldest and on the
newest torch that the package takes.

Not covered: second derivatives.

Tests: tests/ops/test_objective.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def recorded(device: torch.device) -> Iterator[None]:
    """Within it autograd records operations on that device, whoever called."""
    c = torch._C
    keys = c._dispatch_tls_local_include_set(), c.DispatchKeySet.from_raw_repr(0)
    with (
        c._ForceDispatchKeyGuard(*keys),
        torch.autograd.graph.saved_tensors_hooks(_same, _same),
        torch.autocast(device.type, enabled=False),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        yield


def _same(tensor: Tensor) -> Tensor:
    return tensor


def derivative(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """-> function(x), and d function(x).sum() / dx, both detached; zeros where it does not depend on x. Within recorded()."""
    x = x.detach().clone().requires_grad_()
    value = function(x)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise ValueError(
            f"losses: expected a floating-point tensor, got {getattr(value, 'dtype', type(value).__name__)}"
        )
    if not value.requires_grad:
        return value.detach(), torch.zeros_like(x)
    (slope,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
    return value.detach(), torch.zeros_like(x) if slope is None else slope
