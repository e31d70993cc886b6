"""The sweep and the log-probs as registered operators, so that torch.compile sees one node and autograd one formula.

sweep          every loss of the form f(S) + sum w_t (-logp_t); its gradients are computed with it and, in backward,
               only multiplied by the upstream number
logps          per-token log-probs; backward recomputes chunk by chunk (logps_backward), 8 N H V in all
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from ..parallel import Shards, alike, group_named
from .batch import Batch, check_rows_labels, checked, digest_of, token_stretches
from .dispatch import choose_backend
from .exponentials import ExpsSweep
from .products import multiplies_natively, result_dtype
from .rows import WINDOW, Stretch, to_device, windows
from .sweep import HeadSweep, Options, Result, float16_scale, rows_per_chunk, sparse_bytes, sweep

SCALE_BLOCK = 1 << 20  # elements
WHOLE = "labels, sequences, weights, groups and the objective"  # what all ranks of a group hold


def make_head(weight: Tensor, bias: Tensor | None, options: Options, backend: str, rows: int) -> HeadSweep:
    """A sweep with room for the rows that fit."""
    dtype = options.compute_dtype
    tiles = choose_backend(weight.device, dtype, backend or None)
    native = multiplies_natively(weight, dtype, tiles.name)
    sparse = sparse_bytes(weight, dtype, tiles) if options.sparse else 0
    limit = rows_per_chunk(options.workspace_bytes, weight, dtype, 1, native, tiles.name == "torch", sparse)
    sweeper = HeadSweep if tiles.scaled_exps is None else ExpsSweep
    return sweeper(weight, bias, tiles, options, max(1, min(limit, rows)))


def run_sweep(
    hiddens: list[Tensor],
    grads: list[Tensor | None],
    weight: Tensor,
    bias: Tensor | None,
    batch: Batch,
    options: Options,
    backend: str,
    clear: bool = False,
) -> Result:
    """The sweep on plain tensors. `grads` receive the hidden gradients of visited rows; other rows stay as they are, or
    become zero with `clear`."""
    with torch.autocast(weight.device.type, enabled=False), torch.no_grad():
        shards = Shards(batch.length, group_named(batch.ranks)) if batch.ranks else None
        with nullcontext() if shards is None else alike(shards.group, weight.device, digest_of(batch), WHOLE):
            stretches, groups = checked(hiddens, grads, weight, batch, shards)
        head = make_head(weight, bias, options, backend, sum(map(len, stretches)))
        result = sweep(stretches, head, groups, batch.nll_total, shards)
        if clear:
            _clear_unvisited(stretches, grads, batch.shift)
        return result


def _clear_unvisited(stretches: list[Stretch], grads: list[Tensor], shift: bool) -> None:
    for s in stretches:
        for start in range(0, len(s), WINDOW):
            window = slice(start, start + WINDOW)
            unvisited = ~(s.nll_mask(window) | (s.segments_at(window) >= 0))
            s.grad.index_fill_(0, to_device(unvisited.nonzero().squeeze(-1) + start, s.grad.device), 0.0)
    for grad in grads if shift else ():
        grad[:, -1:].zero_()


def numbers_of(result: Result, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """-> loss, preference_loss, nll_loss (Eq. 14), summed log-probs and rewards (K,), correct tokens (K,)
    or, where they are not counted, (0,): copies in that dtype."""
    preference = result.losses.sum() / batch.num_groups
    loss = batch.preference_weight * preference + result.nll
    correct = result.correct if batch.correct else result.correct[:0]
    numbers = (loss, preference, result.nll, result.sums, result.rewards, correct)
    return tuple(x.to(dtype, copy=True) for x in numbers)


@torch.library.custom_op("longpo_ops::sweep", mutates_args=())
def sweep_op(
    hiddens: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    answers: list[Tensor],
    segments: list[Tensor],
    nll: list[Tensor],
    nll_weights: list[Tensor],
    nll_total: Tensor,
    refs: Tensor | None,
    group: Tensor,
    role: Tensor,
    count: int,
    objective: str,
    parameters: list[float],
    preference_weight: float,
    num_groups: float,
    shift: bool,
    ignore_index: int,
    ranks: str,
    correct: bool,
    scale: float,
    softcap: float,
    workspace_bytes: int,
    compute_dtype: torch.dtype,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    options = Options(scale, softcap, workspace_bytes, compute_dtype, *need)
    grads = [torch.zeros_like(h, memory_format=torch.contiguous_format) if need[0] else None for h in hiddens]
    batch = Batch(
        answers, segments, nll, nll_weights, nll_total, refs, group, role, count, objective, parameters,
        preference_weight, num_groups, shift, ignore_index, ranks, correct,
    )  # fmt: skip
    result = run_sweep(hiddens, grads, weight, bias, batch, options, backend)
    dw, dw_scale = deliver(result.dw, weight)
    db, db_scale = deliver(result.db, bias if need[2] else weight)
    return (
        *numbers_of(result, batch, result_dtype(weight.dtype)),
        [h.new_empty(0) if g is None else g for h, g in zip(hiddens, grads, strict=True)],
        dw,
        db,
        result.grad_scale * torch.stack([torch.ones_like(dw_scale), dw_scale, db_scale]),
    )


def deliver(gradient: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """A gradient (or none) in the dtype of what it belongs to, and the power of two () it was multiplied by.

    float16 does not hold sums over many rows of numbers near 1, so they are brought near 1 themselves, in place.
    """
    scale = torch.ones((), device=like.device)
    if gradient is None:
        return like.new_empty(0), scale
    if like.dtype == torch.float16 and gradient.dtype != torch.float16:
        scale = float16_scale(gradient.abs().amax())
        gradient.mul_(scale)
    return gradient.to(like.dtype), scale


@sweep_op.register_fake
def _(hiddens, weight, bias, *rest):
    batch, need = Batch(*rest[: len(Batch._fields)]), rest[-2]
    k = batch.sequences
    shapes = ((), (), (), k, k, k if batch.correct else 0)
    return (
        *(weight.new_empty(shape, dtype=result_dtype(weight.dtype)) for shape in shapes),
        [h.new_empty(h.shape if need[0] else 0) for h in hiddens],
        weight.new_empty(weight.shape if need[1] else 0),
        weight.new_empty(0) if not need[2] else bias.new_empty(bias.shape),
        weight.new_empty(3, dtype=torch.float32),
    )


def setup(ctx, inputs, output):
    """Of an operator from (hiddens, weight, bias, ..., need, backend) to (..., their gradients, three scales)."""
    ctx.need = inputs[-2]
    # autograd wants a list of None for a list of tensors, and for an empty list, among the inputs without a gradient
    ctx.blank = [
        [None] * len(x) if isinstance(x, list) and all(isinstance(t, Tensor) for t in x) else None for x in inputs[3:]
    ]
    ctx.nothing = [None] * len(inputs[0]), None, None, *ctx.blank
    ctx.save_for_backward(*output[-4], *output[-3:])
    ctx.set_materialize_grads(False)  # or the engine makes a zero tensor as large as each gradient


def backward(ctx, grad, *_):
    if grad is None:  # only a detached output was asked for
        return ctx.nothing
    refuse_create_graph()
    *hiddens, dw, db, grad_scale = ctx.saved_tensors
    factors = grad / grad_scale.double()
    dh = [scaled(h, factors[0]) if ctx.need[0] else None for h in hiddens]
    head = (scaled(g, factors[i]) if ctx.need[i] else None for i, g in ((1, dw), (2, db)))
    return dh, *head, *ctx.blank


sweep_op.register_autograd(backward, setup_context=setup)


def scaled(saved: Tensor, factor: Tensor) -> Tensor:
    """saved * factor, in saved's own memory unless the graph is kept for another backward."""
    return scale_(saved.clone() if keeps_graph() else saved, factor)


def refuse_create_graph() -> None:
    """Raises RuntimeError in a backward that is itself recorded: its results would be constants to whoever differentiates
    them, in silence."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "backward with create_graph=True: longpo_ops has no second derivatives, its gradients are made together with "
            "the loss; expected create_graph=False. For gradients of gradients take the loss from plain logits, "
            "F.linear(hidden, weight, bias)"
        )


def keeps_graph() -> bool:
    """Whether the backward that is running keeps its graph, and so may come again."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient *= factor (); 16 bits by a factor (1,) in float32, as a 0-dim one would be rounded to their dtype first.

    On the CPU torch converts what it multiplies beforehand, so it goes by blocks of rows; a GPU converts in the one kernel.
    """
    known = type(factor) is Tensor and factor.device.type == "cpu"  # no tracer, and nothing to wait for
    if known and factor == 1:
        return gradient
    if gradient.dtype.itemsize > 2 or not gradient.numel():
        return gradient.mul_(factor)
    rows = max(0, gradient.dim() - 2)  # of (S, T, H), (V, H) or (V,), in any layout
    limit = max(1, SCALE_BLOCK * gradient.shape[rows] // gradient.numel())
    for block in gradient.split(limit, rows) if gradient.device.type == "cpu" else [gradient]:
        block.mul_(factor.to(torch.float32).view(1))
    return gradient


@torch.library.custom_op("longpo_ops::logps", mutates_args=())
def logps_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    workspace_bytes: int,
    compute_dtype: torch.dtype,
    sparse: bool,
    backend: str,
) -> Tensor:
    options = Options(scale, softcap, workspace_bytes, compute_dtype, False, False, False)
    out = torch.zeros(hidden.shape[0], dtype=result_dtype(weight.dtype), device=hidden.device)
    with torch.autocast(weight.device.type, enabled=False):
        stretches = token_stretches(hidden, None, labels, torch.ones(1, 1), ignore_index)
        check_rows_labels(stretches, weight.shape[0])
        head = make_head(weight, bias, options, backend, hidden.shape[0])
        for chunk in head.chunks(windows(stretches), Stretch.nll_mask):
            chunk.write(head.logps(chunk), out)
    return out


@logps_op.register_fake
def _(hidden, weight, *_):
    return hidden.new_empty(hidden.shape[0], dtype=result_dtype(weight.dtype))


@torch.library.custom_op("longpo_ops::logps_backward", mutates_args=())
def logps_backward_op(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    workspace_bytes: int,
    compute_dtype: torch.dtype,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(scale, softcap, workspace_bytes, compute_dtype, *need)
    dh = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if need[0] else None
    with torch.autocast(weight.device.type, enabled=False):
        stretches = token_stretches(hidden, dh, labels, grad[None], ignore_index)
        nll_total = torch.full((), -1.0)  # the weight of a negative log-prob is the negative gradient
        result = sweep(stretches, make_head(weight, bias, options, backend, hidden.shape[0]), None, nll_total)
        dh, dw, db = (None if g is None else scale_(g, 1 / result.grad_scale) for g in (dh, result.dw, result.db))
    return (
        hidden.new_empty(0) if dh is None else dh,
        weight.new_empty(0) if dw is None else dw.to(weight.dtype),
        weight.new_empty(0) if db is None else db.to(bias.dtype),
    )


@logps_backward_op.register_fake
def _(grad, hidden, weight, bias, *rest):
    need = rest[-2]
    return (
        hidden.new_empty(hidden.shape if need[0] else 0),
        weight.new_empty(weight.shape if need[1] else 0),
        bias.new_empty(bias.shape) if need[2] else weight.new_empty(0),
    )


def _logps_setup(ctx, inputs, output):
    hidden, weight, bias, labels, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, bias, labels)


def _logps_backward(ctx, grad):
    refuse_create_graph()
    hidden, weight, bias, labels = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    *options, sparse, backend = ctx.options
    grads = logps_backward_op(grad.contiguous(), hidden, weight, bias, labels, *options, [*need, sparse], backend)
    return *(g if needed else None for g, needed in zip(grads, need, strict=True)), *[None] * 8


logps_op.register_autograd(_logps_backward, setup_context=_logps_setup)
