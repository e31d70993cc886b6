"""The sweep and the log-probs as registered operators, so that torch.compile sees one node and autograd one formula.

sweep          every loss of the form f(S) + sum w_t (-logp_t); its gradients are computed with it and, in backward,
               only multiplied by the upstream number
logps          per-token log-probs; backward recomputes chunk by chunk (logps_backward), 8 N H V in all
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ..parallel import Shards, alike, digest, group_named
from .checks import check_held_rows
from .dispatch import choose_backend
from .objective import ROLES, Objective
from .products import multiplies_natively, result_dtype
from .registered import rebuild
from .rows import WINDOW, Stretch, to_device, windows
from .sweep import Groups, HeadSweep, Options, Result, float16_scale, rows_per_chunk, sweep

SCALE_BLOCK = 1 << 20  # elements
WHOLE = "labels, sequences, weights, groups and the objective"  # what all ranks of a group hold


class Batch(NamedTuple):
    """What a sweep is told of rows and pairs: arguments of sweep_op, in its order. A list has an entry per hidden tensor.

    Where a group shares the rows of one sequence (S_0 = 1), hidden has this rank's, and everything here is of all T_0."""

    answers: list[Tensor]  # (S_i, T_i) labels of answer tokens, or (0,) for none
    segments: list[Tensor]  # (S_i, T_i) or (S_i, 1) sequence numbers
    nll: list[Tensor]  # (S_i, T_i) labels of NLL tokens, or (0,) for none
    nll_weights: list[Tensor]  # (S_i, T_i) or (S_i, 1)
    nll_total: Tensor  # () what NLL weights are divided by
    refs: Tensor | None  # (K,)
    group: Tensor  # (K,) the group of each sequence, or (R,) that of each rejected one with roles (0,)
    role: Tensor  # (K,), or (0,) for pairs: sequences 0..G-1 are chosen answers, the rest rejected ones
    count: int  # G
    objective: str
    parameters: list[float]
    preference_weight: float
    num_groups: float
    shift: bool
    ignore_index: int
    ranks: str = ""  # the name of the process group that shares the rows

    @property
    def length(self) -> int:
        """T_0, of all rows of a sequence that a group shares."""
        return max(self.answers[0].shape[-1], self.nll[0].shape[-1])

    @property
    def sequences(self) -> int:
        """K."""
        return self.group.shape[0] + (0 if self.role.numel() else self.count)


def _stretches(
    hiddens: list[Tensor],  # (S_i, T_i, H)
    grads: list[Tensor | None],
    answers: list[Tensor],  # this and the next three as in Batch
    segments: list[Tensor],
    nll: list[Tensor],
    nll_weights: list[Tensor],
    shift: bool,
    ignore_index: int,
) -> list[Stretch]:
    """One stretch per sequence. With shift, hidden state t predicts label t + 1."""
    first, last = (1, -1) if shift else (0, None)

    def rows(tensor: Tensor, s: int) -> Tensor:
        return tensor[s] if tensor.shape[1] == 1 else tensor[s, first:]

    out = []
    for i, hidden in enumerate(hiddens):
        has_answers, has_nll = answers[i].numel() > 0, nll[i].numel() > 0
        labels = [t.cpu() if present else None for t, present in ((answers[i], has_answers), (nll[i], has_nll))]
        numbers = segments[i].cpu() if has_answers else None
        for s in range(hidden.shape[0]):
            out.append(
                Stretch(
                    hidden=hidden[s, :last],
                    grad=None if grads[i] is None else grads[i][s, :last],
                    answers=labels[0][s, first:] if has_answers else None,
                    segments=rows(numbers, s) if has_answers else None,
                    nll=labels[1][s, first:] if has_nll else None,
                    nll_weights=rows(nll_weights[i], s) if has_nll else None,
                    ignore_index=ignore_index,
                )
            )
    return out


def check_rows_labels(stretches: list[Stretch], vocab: int) -> None:
    """Raises ValueError for a label out of range, or two different labels for one row."""

    def place(number: int, row: int) -> str:
        if len(stretches) == 1:  # a pack of sequences, or rows that belong to none
            return f"row {row}"
        return f"sequence {number}, row {row} of its hidden states (chosen sequences count before rejected ones)"

    for number, s in enumerate(stretches):
        for start in range(0, len(s), WINDOW):
            window = slice(start, start + WINDOW)
            given = [labels[window] for labels in (s.answers, s.nll) if labels is not None]
            for labels in given:
                bad = (labels != s.ignore_index) & ((labels < 0) | (labels >= vocab))
                if bool(bad.any()):
                    at = int(bad.nonzero()[0])
                    raise ValueError(
                        f"labels: {int(labels[at])} in {place(number, start + at)}: "
                        f"expected 0 <= label < V={vocab}, or ignore_index={s.ignore_index}"
                    )
            if len(given) == 2:
                clash = (given[0] != given[1]) & (given[0] != s.ignore_index) & (given[1] != s.ignore_index)
                if bool(clash.any()):
                    at = int(clash.nonzero()[0])
                    raise ValueError(
                        f"labels: {place(number, start + at)} is answer token {int(given[0][at])} and NLL token "
                        f"{int(given[1][at])}: expected the same token where both are given"
                    )


def make_head(weight: Tensor, bias: Tensor | None, options: Options, backend: str, rows: int) -> HeadSweep:
    """A sweep with room for the rows that fit."""
    dtype = options.compute_dtype
    tiles = choose_backend(weight.device, dtype, backend or None)
    native = multiplies_natively(weight, dtype, tiles.name)
    limit = rows_per_chunk(options.workspace_bytes, weight, dtype, native=native, blocks=tiles.name == "torch")
    return HeadSweep(weight, bias, tiles, options, max(1, min(limit, rows)))


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
        with nullcontext() if shards is None else alike(shards.group, weight.device, _digest(batch), WHOLE):
            stretches, groups = _checked(hiddens, grads, weight, batch, shards)
        head = make_head(weight, bias, options, backend, sum(map(len, stretches)))
        result = sweep(stretches, head, groups, batch.nll_total, shards)
        if clear:
            _clear_unvisited(stretches, grads, batch.shift)
        return result


def _checked(
    hiddens: list[Tensor], grads: list[Tensor | None], weight: Tensor, batch: Batch, shards: Shards | None
) -> tuple[list[Stretch], Groups | None]:
    """-> the stretches of rows that are here, and the groups. Raises ValueError for anything wrong in the whole batch."""
    group, role = _group_and_role(batch)
    nll_weights = [weights.cpu() for weights in batch.nll_weights]
    refs = _references(batch, role, weight.device)
    labels = (batch.answers, batch.segments, batch.nll, nll_weights)
    stretches = _stretches(hiddens, grads, *labels, batch.shift, batch.ignore_index)
    check_rows_labels(stretches, weight.shape[0])
    _check_segments(stretches, batch.sequences)
    groups = None
    if batch.count:
        objective = rebuild(batch.objective, batch.parameters)
        _check_forms(objective, group, role, batch.count)
        lengths = _answer_rows(stretches, role)
        weight_of_group = batch.preference_weight / batch.num_groups
        groups = Groups(objective, refs, group, role, batch.count, lengths, weight_of_group)
    if shards is not None:
        check_held_rows(hiddens[0][0], shards)
        stretches = [stretch.held(shards.rows) for stretch in stretches]
    return stretches, groups


def _digest(batch: Batch) -> int:
    """Of what all ranks of a group must hold alike. Not of references: each may have made them, in its own rounding."""
    tensors = (
        *batch.answers,
        *batch.segments,
        *batch.nll,
        *batch.nll_weights,
        batch.nll_total,
        batch.group,
        batch.role,
    )
    plain = (
        batch.count,
        batch.objective,
        batch.parameters,
        batch.preference_weight,
        batch.num_groups,
        batch.ignore_index,
    )
    return digest((tensor.cpu() for tensor in tensors), *plain)


def _group_and_role(batch: Batch) -> tuple[Tensor, Tensor]:
    """-> (K,), (K,) on the host. Raises ValueError for groups that are none of 0..G-1."""
    group, role, count = batch.group.cpu(), batch.role.cpu(), batch.count
    name = "groups" if role.numel() else "rejected_pair"
    number = "group < G" if role.numel() else "pair < B"
    if group.shape[0] and not 0 <= int(group.min()) <= int(group.max()) < count:
        raise ValueError(f"{name}: {int(group.min())} to {int(group.max())}: expected 0 <= {number}={count}")
    if role.numel():
        if not 0 <= int(role.min()) <= int(role.max()) < len(ROLES):
            known = ", ".join(f"{number} ({name})" for number, name in enumerate(ROLES))
            raise ValueError(f"roles: {int(role.min())} to {int(role.max())}: expected {known}")
        return group, role
    if torch.unique(group).shape[0] != count:
        raise ValueError(
            f"rejected_pair={group.tolist()}: expected at least one rejected sequence for each of {count} pairs"
        )
    chosen = torch.arange(count)
    return torch.cat([chosen, group]), torch.cat([torch.zeros_like(chosen), torch.ones_like(group)])


def _check_forms(objective: Objective, group: Tensor, role: Tensor, count: int) -> None:
    """Raises ValueError for a group whose roles are none of the objective's forms."""
    counts = torch.zeros(count, len(ROLES), dtype=torch.int64)
    counts.index_put_((group, role), torch.ones_like(group), accumulate=True)
    fits = torch.zeros(count, dtype=torch.bool)
    for form in objective.forms:
        wanted = torch.tensor([form.count(name) for name in ROLES])
        several = torch.tensor([name == "rejected" and name in form and not objective.one_rejected for name in ROLES])
        fits |= ((counts == wanted) | (several & (counts >= wanted))).all(1)
    if not bool(fits.all()):
        g = int((~fits).nonzero()[0])
        came = ", ".join(f"{int(n)} {name}" for n, name in zip(counts[g], ROLES, strict=True) if n)
        forms = " or ".join(" + ".join(form) for form in objective.forms)
        several = "" if objective.one_rejected else ", the rejected ones may be several"
        raise ValueError(
            f"groups: group {g} of {count} has {came or 'no sequence'}: expected {forms}{several}, as objective "
            f"{objective.name} takes"
        )


def _named_reference(batch: Batch, k: int) -> tuple[str, int]:
    """What the caller knows the reference of sequence k as."""
    if batch.role.numel():
        return "ref_logps", k
    return ("ref_chosen_logps", k) if k < batch.count else ("ref_rejected_logps", k - batch.count)


def _references(batch: Batch, role: Tensor, device: torch.device) -> Tensor | None:
    """Reference log-probs on the device, float64; a number that is not finite is NaN there, and so is its group's loss.
    Raises ValueError for such a number in a tensor on the host."""
    refs = batch.refs
    if refs is None:
        return None
    if refs.device.type == "cpu" and not bool(refs.isfinite().all()):
        k = int((~refs.isfinite()).nonzero()[0])
        name, at = _named_reference(batch, k)
        raise ValueError(f"{name}: {float(refs[k])} at {at}: expected finite log-probs, sums over answer tokens")
    refs = to_device(refs, device, torch.float64)
    return torch.where(refs.isfinite(), refs, torch.nan)


def _check_segments(stretches: list[Stretch], sequences: int) -> None:
    """Raises ValueError for a sequence number out of range."""
    for s in stretches:
        for start in range(0, len(s) if s.segments is not None else 0, WINDOW):
            numbers = s.segments[start : start + WINDOW]
            if numbers.shape[0] and not -1 <= int(numbers.min()) <= int(numbers.max()) < sequences:
                raise ValueError(
                    f"sequences: {int(numbers.min())} to {int(numbers.max())}: expected -1, or 0 <= number < {sequences}, "
                    "the chosen sequences first, then the rejected ones"
                )


def _answer_rows(stretches: list[Stretch], role: Tensor) -> Tensor:
    """(K,) int64, how many answer tokens each sequence has. Raises ValueError for one without."""
    counts = torch.zeros_like(role)
    for stretch, start in windows(stretches):
        segments = stretch.segments_at(slice(start, start + WINDOW)) + 1
        counts += torch.bincount(segments, minlength=role.shape[0] + 1)[1:]
    if not bool(counts.all()):
        k = int((counts == 0).nonzero()[0])
        before = int((role[:k] == role[k]).sum())  # sequences of a role are counted from 0
        raise ValueError(
            f"labels: {ROLES[int(role[k])]} answer {before} has no answer tokens; expected at least one label other than "
            "ignore_index"
        )
    return counts


def _clear_unvisited(stretches: list[Stretch], grads: list[Tensor], shift: bool) -> None:
    for s in stretches:
        for start in range(0, len(s), WINDOW):
            window = slice(start, start + WINDOW)
            unvisited = ~(s.nll_mask(window) | (s.segments_at(window) >= 0))
            s.grad.index_fill_(0, to_device(unvisited.nonzero().squeeze(-1) + start, s.grad.device), 0.0)
    for grad in grads if shift else ():
        grad[:, -1:].zero_()


def numbers_of(result: Result, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """-> loss, preference_loss, nll_loss (Eq. 14), summed log-probs and rewards (K,): copies in that dtype."""
    preference = result.losses.sum() / batch.num_groups
    loss = batch.preference_weight * preference + result.nll
    numbers = (loss, preference, result.nll, result.sums, result.rewards)
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
    scale: float,
    softcap: float,
    workspace_bytes: int,
    compute_dtype: torch.dtype,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    options = Options(scale, softcap, workspace_bytes, compute_dtype, *need)
    grads = [torch.zeros_like(h, memory_format=torch.contiguous_format) if need[0] else None for h in hiddens]
    batch = Batch(
        answers, segments, nll, nll_weights, nll_total, refs, group, role, count, objective, parameters,
        preference_weight, num_groups, shift, ignore_index, ranks,
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
    return (
        *(weight.new_empty(shape, dtype=result_dtype(weight.dtype)) for shape in ((), (), (), k, k)),
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


def token_stretches(hidden: Tensor, grad: Tensor | None, labels: Tensor, weights: Tensor, ignore_index: int):
    """(N, H) rows with one label each and per-row weights (1, N), or one weight (1, 1), as a single stretch."""
    none = torch.empty(0, dtype=torch.int64)
    grads = [None if grad is None else grad[None]]
    return _stretches([hidden[None]], grads, [none], [none], [labels[None]], [weights], False, ignore_index)


def _logps_setup(ctx, inputs, output):
    hidden, weight, bias, labels, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, bias, labels)


def _logps_backward(ctx, grad):
    refuse_create_graph()
    hidden, weight, bias, labels = ctx.saved_tensors
    need = list(ctx.needs_input_grad[:3])
    *options, backend = ctx.options
    grads = logps_backward_op(grad.contiguous(), hidden, weight, bias, labels, *options, need, backend)
    return *(g if needed else None for g, needed in zip(grads, need, strict=True)), *[None] * 7


logps_op.register_autograd(_logps_backward, setup_context=_logps_setup)
