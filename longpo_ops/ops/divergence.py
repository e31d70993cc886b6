"""Full-vocabulary divergence between two heads over aligned rows, never both logits in full.

With p = softmax(l_student), q = softmax(l_teacher) of row t:

    forward  KL(q||p)       reverse  KL(p||q)       jsd  beta KL(q||m) + (1-beta) KL(p||m),  m = beta q + (1-beta) p

    L = sum_t w_t D_t     dl_student = w p (log p/q - D) for the reverse form; ops/tiles.py has all of them

Two tiles of logits per chunk of rows; gradients are taken in the same visit: (2 + 2) N V (H_student + H_teacher)
operations with a fixed teacher less its gradients, scratch `workspace_bytes` for both tiles together. reduction="none"
computes values first and recomputes in backward. The paper's short-to-long constraint KL(pi_theta || pi_S) is the reverse form.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from ..kinds import check_choice, check_flag, check_number, check_object, check_tensor
from ..parallel import alike, group_named
from .checks import (
    check_backend,
    check_head,
    check_reduction,
    check_rows,
    check_workspace,
    compute_dtype,
    logit_map,
)
from .dispatch import choose_backend
from .operators import deliver, refuse_create_graph, scale_, scaled
from .products import Products, result_dtype, row_major
from .rows import WINDOW, sizes, to_device
from .sweep import float16_scale, hidden_gradient, row_unit, rows_per_chunk, sparse_bytes
from .tiles import Divergence, LogitMap, empty_tile

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
    sparse_hidden_gradient: bool = False,
    backend: str | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """-> () divergence of student and teacher in nats, or (N,) with reduction="none"; float32 (float64 for float64 inputs).

    kind: "forward" KL(teacher || student), "reverse" KL(student || teacher) (the paper's constraint), or "jsd", the
        generalised Jensen-Shannon divergence with weight beta in (0, 1) on the teacher.
    mask: rows that count; others are never read. row_weights: default 1. Mean divides by the weights of masked rows.
    temperature divides both logits; the value is not multiplied by its square.
    scale, softcap: of the student's logits, and the teacher's unless teacher_scale, teacher_softcap are given.
    Gradients reach student and teacher tensors that require one; detach the teacher for distillation. With "none", backward
    recomputes. The two heads may differ in hidden size, not in V; all tensors share one dtype, or autocast is on.
    sparse_hidden_gradient: of student and teacher, as in fused_preference_loss.
    group: ranks that hold the other rows. hidden, teacher_hidden, mask and row_weights are this rank's rows, any number of
        them, even none. The sum or mean is that over the rows of all ranks, the same on each; its gradient is this rank's
        share, as with shards in packed_preference_loss: FSDP and DDP average, so multiply by the world size. Rows that do
        not fit together on one rank are the same ValueError on all. Not with reduction="none", whose rows need no others.

    Raises ValueError naming the argument, what came and what was expected.
    """
    kind, beta, backend = check_choice("kind", kind, KINDS), check_number("beta", beta), check_backend(backend)
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta={beta}: expected 0 < beta < 1; use kind='reverse' or 'forward' for the ends")
    check_head(hidden, weight, bias)
    check_rows(hidden)
    check_head(teacher_hidden, teacher_weight, teacher_bias, "teacher_hidden", "teacher_")
    check_rows(teacher_hidden, "teacher_hidden")
    if teacher_weight.shape[0] != weight.shape[0]:
        raise ValueError(f"teacher_weight has V={teacher_weight.shape[0]}, weight V={weight.shape[0]}: expected one V")
    if teacher_hidden.device != hidden.device:
        raise ValueError(
            f"teacher_hidden is on {teacher_hidden.device}, hidden on {hidden.device}: expected one device"
        )
    with _alike(group, hidden.device):
        n = hidden.shape[0]
        if teacher_hidden.shape[0] != n:
            raise ValueError(f"teacher_hidden has {teacher_hidden.shape[0]} rows, hidden {n}: expected aligned rows")
        check_reduction(reduction, row_weights, n)
        if mask is not None:
            check_tensor("mask", mask, (torch.bool,), (n,))
            mask = mask.cpu()
    if group is not None and reduction == "none":
        raise ValueError("reduction='none' with group: expected 'sum' or 'mean'; a row's value needs no other ranks")
    dtype = compute_dtype(hidden, weight)
    if compute_dtype(teacher_hidden, teacher_weight, "teacher_hidden", "teacher_weight") != dtype:
        raise ValueError(f"teacher tensors are {teacher_hidden.dtype}, student tensors {dtype}: expected one dtype")

    student_map = logit_map(scale, softcap, temperature)
    teacher_scale = scale if teacher_scale is None else teacher_scale
    teacher_softcap = softcap if teacher_softcap is None else teacher_softcap
    teacher_map = logit_map(teacher_scale, teacher_softcap, temperature, "teacher_")
    wider = weight if weight.shape[1] >= teacher_weight.shape[1] else teacher_weight
    scratch = check_workspace(workspace_bytes, wider, dtype, tiles=2)
    heads = (hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias)
    sparse = check_flag("sparse_hidden_gradient", sparse_hidden_gradient)
    options = (kind, beta, *student_map, *teacher_map, scratch, dtype, sparse, backend)
    if reduction == "none":
        values = _values_op(*heads, mask, *options)
        return values if row_weights is None else values * row_weights.to(values.device)
    weights = None if row_weights is None else row_weights.detach().cpu()
    total = torch.ones((), dtype=torch.float64)
    if reduction == "mean":
        total = _weight_of_rows(n, mask, weights)
        if group is not None:
            total = total.to(hidden.device, torch.float64)
            dist.all_reduce(total, group=group)
    grad = torch.is_grad_enabled()
    need = [grad and t is not None and t.requires_grad for t in heads]
    return _divergence_op(*heads, mask, weights, total, "" if group is None else group.group_name, *options, need)[0]


def _alike(group: dist.ProcessGroup | None, device: torch.device):
    """A block that all ranks of a group leave alike. Compiled code is traced on each, and has its errors then."""
    if group is None:
        return nullcontext()
    check_object("group", group, dist.ProcessGroup, "a torch.distributed.ProcessGroup")
    return nullcontext() if torch.compiler.is_compiling() else alike(group, device)


def _weight_of_rows(n: int, mask: Tensor | None, weights: Tensor | None) -> Tensor:
    """() the sum of the weights of masked rows."""
    if weights is None:
        return torch.full((), float(n), dtype=torch.float64) if mask is None else mask.sum()
    counted = weights if mask is None else torch.where(mask, weights, 0.0)
    return counted.sum(dtype=torch.float64)


class _Side:
    """Student or teacher: its products, map, gradients and one tile."""

    def __init__(self, hidden, weight, bias, map, dtype, rows, need, tiles, sparse):
        self.hidden, self.products, self.tiles = hidden, Products(weight, dtype, tiles.name), tiles
        self.sparse = sparse
        self.map = LogitMap(bias if bias is None else bias.contiguous(), *map)
        self.need = any(need)
        self.tile = empty_tile(rows, weight.shape[0], weight.device, self.products.tile_dtype)
        grad_dtypes = (hidden.dtype, self.tile.dtype, torch.float64)
        self.dh, self.dw, self.db = (
            torch.zeros_like(t, dtype=d, memory_format=torch.contiguous_format) if needed else None
            for t, d, needed in zip((hidden, weight, bias), grad_dtypes, need, strict=True)
        )

    def logits(self, index: Tensor) -> Tensor:
        self.h = row_major(self.hidden[index].to(self.products.dtype))
        return self.products.logits_(self.h, self.tile[: index.shape[0]])

    def gather(self, index: Tensor, dz: Tensor) -> None:
        if self.dw is not None:
            self.products.add_weight_gradient_(self.dw, dz, self.h)
        if self.db is not None:
            self.db.add_(dz.sum(0, dtype=self.tile.dtype))
        if self.dh is not None:  # last: a sparse one overwrites dz
            dh = hidden_gradient(dz, self.products, self.tiles, self.sparse)
            self.dh.index_copy_(0, index, dh.to(self.dh.dtype))


def _sweep(
    heads, mask, weights, total, kind, beta, student_map, teacher_map, scratch, dtype, sparse, backend, need, values=None
):  # fmt: skip
    """-> sum_t kappa_t * value_t in float64, the two sides with its gradients, and their scale. kappa is weights (N,), or 1
    each, over total (), or 0 where that is 0; rows without mask or weight are never read. `values` (N,) takes each row's."""
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias = heads
    n = hidden.shape[0]
    with torch.autocast(weight.device.type, enabled=False), torch.no_grad():
        tiles = choose_backend(weight.device, dtype, backend or None, divergence=True)
        wider = weight if weight.shape[1] >= teacher_weight.shape[1] else teacher_weight
        room = sparse_bytes(wider, dtype, tiles) if sparse else 0
        fit = rows_per_chunk(scratch, wider, dtype, tiles=2, blocks=tiles.name == "torch", sparse=room)
        rows, unit = max(1, min(fit, n)), row_unit(weight.device)
        student = _Side(hidden, weight, bias, student_map, dtype, rows, need[:3], tiles, sparse)
        teacher = _Side(teacher_hidden, teacher_weight, teacher_bias, teacher_map, dtype, rows, need[3:], tiles, sparse)
        mask, weights = (None if t is None else t.cpu() for t in (mask, weights))
        total = to_device(total, weight.device, torch.float64)
        kappa_scale = torch.where(total != 0, 1 / total, 0.0)
        summed, grad_scale = torch.zeros_like(total), torch.ones((), device=weight.device)
        if dtype == torch.float16 and n:
            largest = 1.0
            if weights is not None:
                counted = weights if mask is None else torch.where(mask, weights, 0.0)
                largest = to_device(counted.abs().amax(), weight.device, torch.float64)
            grad_scale = float16_scale(kappa_scale.abs() * largest)
        for start in range(0, n, WINDOW):
            window = _counts(mask, weights, slice(start, min(start + WINDOW, n)))
            picked = window.nonzero().squeeze(-1) + start
            for host_index in picked.split(list(sizes(picked.shape[0], rows, unit))) if picked.shape[0] else ():
                index = to_device(host_index, weight.device)
                kappa = kappa_scale.expand(index.shape[0])
                if weights is not None:
                    kappa = kappa * to_device(weights[host_index], weight.device, torch.float64)
                rows_of, dz, dz_teacher = tiles.divergence_(
                    student.logits(index), teacher.logits(index), (kappa * grad_scale).to(student.tile.dtype),
                    Divergence(kind, beta), student.map, teacher.map, student.products.dtype, student.need, teacher.need,
                )  # fmt: skip
                summed.add_((rows_of.double() * kappa).sum())
                if values is not None:
                    values[index] = rows_of
                if student.need:
                    student.gather(index, dz)
                if teacher.need:
                    teacher.gather(index, dz_teacher)
    return summed, student, teacher, grad_scale


def _counts(mask: Tensor | None, weights: Tensor | None, window: slice) -> Tensor:
    """Which rows of the window count, on the host."""
    counts = torch.ones(window.stop - window.start, dtype=torch.bool) if mask is None else mask[window]
    return counts if weights is None else counts & (weights[window] != 0)


# fmt: off
@torch.library.custom_op("longpo_ops::divergence", mutates_args=())
def _divergence_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None,
    teacher_hidden: Tensor, teacher_weight: Tensor, teacher_bias: Tensor | None,
    mask: Tensor | None, weights: Tensor | None, total: Tensor, group: str, kind: str, beta: float, scale: float,
    softcap: float, teacher_scale: float, teacher_softcap: float, scratch: int, dtype: torch.dtype, sparse: bool,
    backend: str, need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> sum_t weight_t / total * value_t, over all ranks of the group of that name, if any; the gradients of this one's
    rows by the six head tensors (empty where not needed), their scales."""
    # fmt: on
    heads = (hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias)
    maps = (scale, softcap), (teacher_scale, teacher_softcap)
    summed, student, teacher, grad_scale = _sweep(
        heads, mask, weights, total, kind, beta, *maps, scratch, dtype, sparse, backend, need
    )
    if group:
        dist.all_reduce(summed, group=group_named(group))
    grads = (student.dh, student.dw, student.db, teacher.dh, teacher.dw, teacher.db)
    like = (weight if t is None else t for t in heads)
    delivered, scales = zip(*map(deliver, grads, like), strict=True)
    return summed.to(student.tile.dtype, copy=True), *delivered, grad_scale * torch.stack(scales)


@_divergence_op.register_fake
def _(*arguments):
    heads, need = arguments[:6], arguments[-1]
    value = heads[0].new_empty((), dtype=result_dtype(heads[1].dtype))
    like = (heads[1] if t is None else t for t in heads)
    grads = (t.new_empty(t.shape if needed else 0) for t, needed in zip(like, need, strict=True))
    return value, *grads, heads[0].new_empty(6, dtype=torch.float32)


def _divergence_setup(ctx, inputs, output):
    ctx.need, ctx.arguments = inputs[-1], len(inputs)
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _divergence_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * ctx.arguments
    refuse_create_graph()
    *grads, grad_scale = ctx.saved_tensors
    factors = grad / grad_scale.double()
    head = (scaled(g, factors[i]) if ctx.need[i] else None for i, g in enumerate(grads))
    return *head, *[None] * (ctx.arguments - 6)


_divergence_op.register_autograd(_divergence_backward, setup_context=_divergence_setup)


# fmt: off
@torch.library.custom_op("longpo_ops::divergence_values", mutates_args=())
def _values_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None,
    teacher_hidden: Tensor, teacher_weight: Tensor, teacher_bias: Tensor | None,
    mask: Tensor | None, kind: str, beta: float, scale: float, softcap: float, teacher_scale: float,
    teacher_softcap: float, scratch: int, dtype: torch.dtype, sparse: bool, backend: str,
) -> Tensor:
    """-> (N,) values, 0 where masked out."""
    # fmt: on
    heads = (hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias)
    values = torch.zeros(hidden.shape[0], device=hidden.device, dtype=result_dtype(weight.dtype))
    maps, one, need = ((scale, softcap), (teacher_scale, teacher_softcap)), torch.ones(()), [False] * 6
    _sweep(heads, mask, None, one, kind, beta, *maps, scratch, dtype, sparse, backend, need, values)
    return values


@_values_op.register_fake
def _(hidden, weight, *_):
    return hidden.new_empty(hidden.shape[0], dtype=result_dtype(weight.dtype))


def _values_setup(ctx, inputs, output):
    ctx.options = inputs[7:]
    ctx.save_for_backward(*inputs[:7])


def _values_backward(ctx, grad):
    refuse_create_graph()
    *heads, mask = ctx.saved_tensors
    need = list(ctx.needs_input_grad[:6])
    with torch.no_grad():
        _, *grads, grad_scale = _divergence_op(*heads, mask, grad.contiguous(), torch.ones(()), "", *ctx.options, need)
        factors = 1 / grad_scale
        head = [scale_(g, factors[i]) if need[i] else None for i, g in enumerate(grads)]
    return *head, *[None] * 11


_values_op.register_autograd(_values_backward, setup_context=_values_setup)
