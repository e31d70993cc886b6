"""Full-vocabulary divergence between two heads over aligned rows, never both logits in full.

With p = softmax(l_student), q = softmax(l_teacher) of row t:

    forward  KL(q||p)       reverse  KL(p||q)       jsd  beta KL(q||m) + (1-beta) KL(p||m),  m = beta q + (1-beta) p

    L = sum_t w_t D_t     dl_student = w p (log p/q - D) for the reverse form; ops/tiles.py has all of them

Two tiles of logits per chunk of rows; gradients are taken in the same visit: (2 + 2) N V (H_student + H_teacher)
operations with a fixed teacher less its gradients, scratch `workspace_bytes` for both tiles together. reduction="none"
computes values first and recomputes in backward. The paper's short-to-long constraint KL(pi_theta || pi_S) is the reverse form.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from .checks import check_head, check_numbers, check_rows, check_workspace, compute_dtype, logit_map
from .dispatch import choose_backend
from .operators import scale_, scaled
from .products import Products
from .rows import WINDOW
from .sweep import float16_scale, rows_per_chunk
from .tiles import Divergence, LogitMap

KINDS = ("forward", "reverse", "jsd")


def linear_kl(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    teacher_hidden: Tensor,  # (N, H')
    teacher_weight: Tensor,  # (V, H')
    *,
    kind: str = "forward",
    beta: float = 0.5,
    mask: Tensor | None = None,  # (N,) bool
    row_weights: Tensor | None = None,  # (N,)
    reduction: str = "mean",
    temperature: float = 1.0,
    bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    scale: float = 1.0,
    softcap: float | None = None,
    teacher_scale: float | None = None,
    teacher_softcap: float | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """-> () divergence of student and teacher in nats, or (N,) with reduction="none"; float32 (float64 for float64 inputs).

    kind: "forward" KL(teacher || student), "reverse" KL(student || teacher) (the paper's constraint), or "jsd", the
        generalised Jensen-Shannon divergence with weight beta in (0, 1) on the teacher.
    mask: rows that count; others are never read. row_weights: default 1. Mean divides by the weights of masked rows.
    temperature divides both logits; the value is not multiplied by its square.
    scale, softcap: of the student's logits, and the teacher's unless teacher_scale, teacher_softcap are given.
    Gradients reach student and teacher tensors that require one; detach the teacher for distillation. With "none", backward
    recomputes. The two heads may differ in hidden size, not in V; all tensors share one dtype, or autocast is on.

    Raises ValueError naming the argument, what came and what was expected.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta={beta}: expected 0 < beta < 1; use kind='reverse' or 'forward' for the ends")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r}: expected 'mean', 'sum' or 'none'")
    check_head(hidden, weight, bias)
    check_rows(hidden)
    check_head(teacher_hidden, teacher_weight, teacher_bias, "teacher_hidden", "teacher_weight")
    check_rows(teacher_hidden, "teacher_hidden")
    n = hidden.shape[0]
    if teacher_hidden.shape[0] != n:
        raise ValueError(f"teacher_hidden has {teacher_hidden.shape[0]} rows, hidden {n}: expected aligned rows")
    if teacher_weight.shape[0] != weight.shape[0]:
        raise ValueError(f"teacher_weight has V={teacher_weight.shape[0]}, weight V={weight.shape[0]}: expected one V")
    if teacher_hidden.device != hidden.device:
        raise ValueError(
            f"teacher_hidden is on {teacher_hidden.device}, hidden on {hidden.device}: expected one device"
        )
    check_numbers(row_weights, (n,), "row_weights")
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (n,)):
        raise ValueError(f"mask: {mask.dtype} {tuple(mask.shape)}: expected bool ({n},)")
    if row_weights is not None and row_weights.requires_grad and torch.is_grad_enabled() and reduction != "none":
        raise ValueError(f"row_weights requires a gradient with reduction={reduction!r}: expected reduction='none'")
    dtype = compute_dtype(hidden, weight)
    if compute_dtype(teacher_hidden, teacher_weight, "teacher_weight") != dtype:
        raise ValueError(f"teacher tensors are {teacher_hidden.dtype}, student tensors {dtype}: expected one dtype")

    double = torch.float64
    mask = torch.ones(n, dtype=torch.bool, device=hidden.device) if mask is None else mask
    weights = (
        torch.ones(n, dtype=double, device=hidden.device) if row_weights is None else row_weights.to(hidden.device)
    )
    student_map = logit_map(scale, softcap, temperature)
    teacher_map = logit_map(
        teacher_scale or scale, softcap if teacher_softcap is None else teacher_softcap, temperature
    )
    wider = max((weight, teacher_weight), key=lambda w: w.shape[1])
    scratch = check_workspace(workspace_bytes, wider, dtype, tiles=2)
    heads = (hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias)
    options = (kind, float(beta), *student_map, *teacher_map, scratch, dtype, backend or "")
    if reduction == "none":
        values = _values_op(*heads, mask, *options)
        return values if row_weights is None else values * weights
    if reduction == "mean":
        total = torch.where(mask.to(weights.device), weights, 0.0).sum()
        weights = torch.where(total != 0, weights / total, 0.0)
    grad = torch.is_grad_enabled()
    need = [grad and t is not None and t.requires_grad for t in heads]
    return _divergence_op(*heads, mask, weights.detach(), *options, need)[0]


class _Side:
    """Student or teacher: its products, map, gradients and one tile."""

    def __init__(self, hidden, weight, bias, map, dtype, rows, need):
        self.hidden, self.products, self.map = hidden, Products(weight, dtype), LogitMap(bias, *map)
        self.need = any(need)
        self.tile = torch.empty(rows, weight.shape[0], device=weight.device, dtype=self.products.tile_dtype)
        grad_dtypes = (hidden.dtype, self.tile.dtype, self.tile.dtype)
        self.dh, self.dw, self.db = (
            torch.zeros_like(t, dtype=d, memory_format=torch.contiguous_format) if needed else None
            for t, d, needed in zip((hidden, weight, bias), grad_dtypes, need, strict=True)
        )

    def logits(self, index: Tensor) -> Tensor:
        self.h = self.hidden[index].to(self.products.dtype)
        return self.products.logits_(self.h, self.tile[: index.shape[0]])

    def gather(self, index: Tensor, dz: Tensor) -> None:
        if self.dh is not None:
            self.dh.index_copy_(0, index, self.products.hidden_gradient(dz).to(self.dh.dtype))
        if self.dw is not None:
            self.products.add_weight_gradient_(self.dw, dz, self.h)
        if self.db is not None:
            self.db.add_(dz.sum(0, dtype=self.db.dtype))


def _sweep(heads, mask, kappa, kind, beta, student_map, teacher_map, scratch, dtype, backend, need):
    """-> values (N,), the two sides with their gradients of sum_t kappa_t * value_t, and their scale."""
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias = heads
    n, vocab = hidden.shape[0], weight.shape[0]
    with torch.autocast(weight.device.type, enabled=False), torch.no_grad():
        tiles = choose_backend(weight.device, dtype, backend or None)
        wider = max((weight, teacher_weight), key=lambda w: w.shape[1])
        rows = max(1, min(rows_per_chunk(scratch, wider, dtype, tiles=2), n))
        student = _Side(hidden, weight, bias, student_map, dtype, rows, need[:3])
        teacher = _Side(teacher_hidden, teacher_weight, teacher_bias, teacher_map, dtype, rows, need[3:])
        values = torch.zeros(n, device=weight.device, dtype=student.tile.dtype)
        half = dtype == torch.float16 and n > 0
        grad_scale = float16_scale(kappa.abs().amax()) if half else torch.ones((), device=weight.device)
        host_mask = mask.cpu()
        for start in range(0, n, WINDOW):
            picked = (host_mask[start : start + WINDOW].nonzero().squeeze(-1) + start).to(weight.device)
            for index in picked.split(rows) if picked.shape[0] else ():
                weights = (kappa[index] * grad_scale).to(values.dtype)
                values[index], dz, dz_teacher = tiles.divergence_(
                    student.logits(index), teacher.logits(index), weights, Divergence(kind, beta), student.map,
                    teacher.map, student.products.dtype, student.need, teacher.need,
                )  # fmt: skip
                if student.need:
                    student.gather(index, dz)
                if teacher.need:
                    teacher.gather(index, dz_teacher)
    return values, student, teacher, grad_scale


# fmt: off
@torch.library.custom_op("longpo_ops::divergence", mutates_args=())
def _divergence_op(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor],
    teacher_hidden: Tensor, teacher_weight: Tensor, teacher_bias: Optional[Tensor],
    mask: Tensor, kappa: Tensor, kind: str, beta: float, scale: float, softcap: float, teacher_scale: float,
    teacher_softcap: float, scratch: int, dtype: torch.dtype, backend: str, need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> sum_t kappa_t * value_t, its gradients by the six head tensors (empty where not needed), and their scale."""
    # fmt: on
    heads = (hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias)
    values, student, teacher, grad_scale = _sweep(
        heads, mask, kappa, kind, beta, (scale, softcap), (teacher_scale, teacher_softcap), scratch, dtype, backend, need
    )
    total = torch.where(mask.to(values.device) & (kappa != 0), values, 0.0).double() * kappa.double()
    grads = (student.dh, student.dw, student.db, teacher.dh, teacher.dw, teacher.db)
    delivered = (weight.new_empty(0) if g is None else g.to(t.dtype) for g, t in zip(grads, heads, strict=True))
    return total.sum().to(values.dtype), *delivered, grad_scale


@_divergence_op.register_fake
def _(*arguments):
    heads, need = arguments[:6], arguments[-1]
    value = heads[0].new_empty((), dtype=torch.float64 if heads[1].dtype == torch.float64 else torch.float32)
    grads = (t.new_empty(t.shape) if needed else heads[1].new_empty(0) for t, needed in zip(heads, need, strict=True))
    return value, *grads, heads[0].new_empty((), dtype=torch.float32)


def _divergence_setup(ctx, inputs, output):
    ctx.need, ctx.arguments = inputs[-1], len(inputs)
    ctx.save_for_backward(*output[1:])


def _divergence_backward(ctx, grad, *_):
    *grads, grad_scale = ctx.saved_tensors
    factor = grad / grad_scale
    head = (scaled(g, factor) if needed else None for g, needed in zip(grads, ctx.need, strict=True))
    return *head, *[None] * (ctx.arguments - 6)


_divergence_op.register_autograd(_divergence_backward, setup_context=_divergence_setup)


# fmt: off
@torch.library.custom_op("longpo_ops::divergence_values", mutates_args=())
def _values_op(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor],
    teacher_hidden: Tensor, teacher_weight: Tensor, teacher_bias: Optional[Tensor],
    mask: Tensor, kind: str, beta: float, scale: float, softcap: float, teacher_scale: float,
    teacher_softcap: float, scratch: int, dtype: torch.dtype, backend: str,
) -> Tensor:
    """-> (N,) values, 0 where masked out."""
    # fmt: on
    heads = (hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias)
    kappa, need = torch.ones(hidden.shape[0], device=hidden.device), [False] * 6
    maps = (scale, softcap), (teacher_scale, teacher_softcap)
    return _sweep(heads, mask, kappa, kind, beta, *maps, scratch, dtype, backend, need)[0]


@_values_op.register_fake
def _(hidden, weight, *_):
    return hidden.new_empty(hidden.shape[0], dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32)


def _values_setup(ctx, inputs, output):
    ctx.options = inputs[7:]
    ctx.save_for_backward(*inputs[:7])


def _values_backward(ctx, grad):
    *heads, mask = ctx.saved_tensors
    need = list(ctx.needs_input_grad[:6])
    _, *grads, grad_scale = _divergence_op(*heads, mask, grad.contiguous(), *ctx.options, need)
    factor = 1 / grad_scale
    return *(scale_(g, factor) if needed else None for g, needed in zip(grads, need, strict=True)), *[None] * 10


_values_op.register_autograd(_values_backward, setup_context=_values_setup)
