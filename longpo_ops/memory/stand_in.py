"""In place of attention, where a layer is only counted: allocates what shared-prefix attention does and computes nothing.

Tests: tests/memory/test_plan.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longpo_ops.attention import ulysses
from longpo_ops.attention.shared_prefix import GROUP
from longpo_ops.parallel import Shards


class Attention(torch.autograd.Function):
    """Allocates what shared-prefix attention does and computes nothing: q (B, H, T, D), k (B, Hk, T, D), v (B, Hk, T, Dv).

    Forward: out and logsumexp, and the output of one group of heads (GROUP). Backward: all gradients, and for one group
    its own dq, dk, dv; in 16 bits also its dq in float32 and dk, dv for every query head, as flash kernels have them.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, rows, size = q.shape
        out = q.new_empty(batch, rows, heads, v.shape[-1])
        lse = q.new_empty(batch, heads, rows, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        q.new_empty(batch, Attention.group(q, k), rows, size)
        note(out.nbytes + lse.nbytes, 2 * heads * (size + v.shape[-1]))
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):
        q, k, v, _, _ = ctx.saved_tensors
        batch, heads, rows, size = q.shape
        grads = tuple(torch.empty_like(x) for x in (q, k, v))
        group = Attention.group(q, k)
        scratch = [q.new_empty(batch, group + 2 * group * k.shape[1] // heads, rows, size)]
        if q.dtype.itemsize < 4:
            scratch.append(q.new_empty(batch, group, rows, size, dtype=torch.float32))
            scratch.append(q.new_empty(batch, 2 * group if heads > k.shape[1] else 0, rows, size))
        return grads

    @staticmethod
    def group(q: Tensor, k: Tensor) -> int:
        """Query heads of one kernel call."""
        batch, heads, rows, size = q.shape
        per_key = heads // k.shape[1]
        return min(heads, per_key * max(1, GROUP // (batch * per_key * rows * size)))


def attend(module, q, k, v, mask, shards: Shards | None = None, **_):
    """An attention function of transformers."""
    if shards is None:
        return Attention.apply(q, k, v), None
    heads, kv_heads = q.shape[1], k.shape[1]
    out = Attention.apply(*ulysses.to_heads(q, k, v, shards))
    return ulysses.to_rows(out, heads, kv_heads, shards), None


def note(kept: int, operations: int) -> None:
    """Called with the bytes of an output and its logsumexp, and operations for each pair of a query and a key. Replaced by who
    wants to know."""
