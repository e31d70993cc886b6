"""Preference losses straight from hidden states: no logits, gradients in one sweep, scratch of a size you choose.

    L = lambda * (1/P) sum_b f_b(S) + (1/P) sum_b (1/T_b) sum_t -logp_t              (Eq. 14, P = num_pairs)

S_k is the sum of log-probs over the answer tokens of sequence k, over all turns (Eq. 13), summed in float64; f_b is the
objective's loss of pair b, or of another group of answers (objective.py); the second term is the NLL over the T_b labelled
tokens of the whole chosen sequence. docs/mathematics.md derives the sweep and its cost: 6 N H V operations, rows without
weight never read. Not covered: full-vocabulary KL (divergence.py).

fused_preference_loss   chosen (B, Tc, H) and rejected (R, Tr, H)
packed_preference_loss  pairs in flat rows (N, H), as batches that share a prefix have them
packed_objective_loss   any groups of answers in flat rows
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kinds import check_flag, check_number, check_tensor, check_whole
from ..parallel import Shards
from .batch import Batch
from .checks import (
    check_backend,
    check_head,
    check_ignore_index,
    check_labels,
    check_numbers,
    check_rows,
    check_shards,
    check_workspace,
    compute_dtype,
    logit_map,
)
from .objective import PAIR, Objective
from .objectives import resolve_objective
from .operators import keeps_graph, numbers_of, refuse_create_graph, run_sweep, scaled, sweep_op
from .products import result_dtype
from .rows import to_device
from .sweep import Options


class PreferenceOutput(NamedTuple):
    """loss carries the gradient; everything else is detached. All float32 (float64 for float64 inputs), on the device."""

    loss: Tensor  # () preference_weight * preference_loss + nll_loss
    preference_loss: Tensor  # () mean over pairs
    nll_loss: Tensor  # () mean over each chosen sequence's tokens, then over pairs; 0 without nll_labels
    chosen_logps: Tensor  # (B,) summed over answer tokens
    rejected_logps: Tensor  # (R,)
    chosen_rewards: Tensor  # (B,) beta * (logps - reference) where the objective has a reference
    rejected_rewards: Tensor  # (R,)
    chosen_correct: Tensor | None = None  # (B,) answer tokens that are the likeliest one; None where not asked for
    rejected_correct: Tensor | None = None  # (R,)


class ObjectiveOutput(NamedTuple):
    """loss carries the gradient; everything else is detached. All float32 (float64 for float64 inputs), on the device."""

    loss: Tensor  # () preference_weight * objective_loss + nll_loss
    objective_loss: Tensor  # () mean over groups
    nll_loss: Tensor  # () sum of nll_weights * NLL over the denominator; 0 without nll_weights
    logps: Tensor  # (K,) summed over answer tokens
    rewards: Tensor  # (K,) as the objective logs them
    correct: Tensor | None = None  # (K,) answer tokens that are the likeliest one; None where not asked for


def fused_preference_loss(
    chosen_hidden: Tensor,  # (B, Tc, H)
    rejected_hidden: Tensor,  # (R, Tr, H)
    weight: Tensor,  # (V, H)
    chosen_labels: Tensor,  # (B, Tc) int64
    rejected_labels: Tensor,  # (R, Tr) int64
    *,
    ref_chosen_logps: Tensor | None = None,  # (B,)
    ref_rejected_logps: Tensor | None = None,  # (R,)
    nll_labels: Tensor | None = None,  # (B, Tc) int64
    objective: Objective | str = "longpo",
    rejected_pair: Tensor | None = None,  # (R,) int64
    bias: Tensor | None = None,  # (V,)
    shift: bool = True,
    num_pairs: float | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    workspace_bytes: int | None = None,
    sparse_hidden_gradient: bool = False,
    reuse_hidden: bool = False,
    backend: str | None = None,
) -> PreferenceOutput:
    """The preference loss of B chosen and R rejected sequences, with gradients in hidden states, weight and bias.

    chosen_hidden, rejected_hidden: last hidden states of the model body (after its final norm), float32, bfloat16,
        float16 or float64, any strides.
    weight, bias: the language-model head. A frozen one costs no gradient work; so does a frozen body.
    chosen_labels, rejected_labels: token ids aligned with the input ids; ignore_index where a token is no answer token.
        On the host they cost no synchronisation; on the device they are copied to the host once.
    ref_chosen_logps, ref_rejected_logps: summed answer log-probs of the reference; for LongPO it reads the SHORT input.
        None exactly for reference-free objectives. They are constants: a gradient does not reach them.
    nll_labels: which tokens of the chosen sequences carry the NLL term (Eq. 14); None for no such term.
    objective: an object of objectives.py, or the name of one for its defaults.
    rejected_pair: the pair of each rejected sequence; None when R == B and they correspond.
    shift: hidden state t predicts label t + 1 (labels aligned with ids). False: it predicts label t.
    num_pairs: what sums over pairs are divided by, default B. Give the number over all ranks and accumulation steps to
        make their summed gradients equal one large batch; DDP averages over ranks, so multiply the loss by the world size.
    softcap, scale: logits are softcap * tanh(scale * (h W^T + bias) / softcap), or scale * (h W^T + bias).
    workspace_bytes: scratch beyond inputs, delivered gradients and the float32 head gradient; default 64 MiB on CPU,
        2.75 GiB on CUDA. The same for any length and batch.
    sparse_hidden_gradient: hidden gradients from the columns of the vocabulary that matter: less work on a trained model's
        states, off by less than rounding the logits' gradient to bfloat16; the loss and the head's gradient stay exact
        (docs/mathematics.md#a-sparse-hidden-gradient). On CUDA with a back-end other than triton the host waits once a chunk.
    reuse_hidden: write the hidden gradients over the hidden states, whose values are then gone (not under torch.compile).
    backend: torch, cpu, triton or cuda; default: explain_backend().

    Raises ValueError naming the argument, what came and what was expected, before anything is allocated; labels out of
    range, pairs without answer tokens and references that are not finite are found while rows are planned, before the
    first product; a reference on the device that is not finite makes its pair's loss NaN instead.
    Source: arXiv 2502.13922, Eq. 12-14; the other objectives name theirs.
    """
    for name, hidden in (("chosen_hidden", chosen_hidden), ("rejected_hidden", rejected_hidden)):
        check_head(hidden, weight, bias, name)
        if hidden.dim() != 3:
            raise ValueError(f"{name}.shape={tuple(hidden.shape)}: expected (sequences, tokens, H)")
    if rejected_hidden.dtype != chosen_hidden.dtype:
        raise ValueError(
            f"rejected_hidden is {rejected_hidden.dtype}, chosen_hidden {chosen_hidden.dtype}: expected one"
        )
    (b, tc, _), (r, tr, _) = chosen_hidden.shape, rejected_hidden.shape
    chosen_labels = check_labels(chosen_labels, (b, tc), "chosen_labels", "chosen_hidden")
    rejected_labels = check_labels(rejected_labels, (r, tr), "rejected_labels", "rejected_hidden")
    if nll_labels is not None:
        nll_labels = check_labels(nll_labels, (b, tc), "nll_labels", "chosen_hidden")
    shift, ignore_index = check_flag("shift", shift), check_ignore_index(ignore_index)
    groups = _check_pairs(objective, b, r, rejected_pair, ref_chosen_logps, ref_rejected_logps, num_pairs)

    none = torch.empty(0, dtype=torch.int64)
    out = _run(
        hiddens=[chosen_hidden, rejected_hidden],
        weight=weight,
        bias=bias,
        answers=[chosen_labels, rejected_labels],
        segments=[torch.arange(b)[:, None], torch.arange(b, b + r)[:, None]],
        nll=[none if nll_labels is None else nll_labels, none],
        nll_weights=[_token_means(nll_labels, shift, ignore_index), torch.zeros(r, 1)],
        groups=groups,
        shift=shift,
        ignore_index=ignore_index,
        map=logit_map(scale, softcap),
        workspace_bytes=workspace_bytes,
        sparse=sparse_hidden_gradient,
        reuse_hidden=reuse_hidden,
        backend=backend,
    )
    return _of_pairs(out, b)


def packed_preference_loss(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,) int64
    sequences: Tensor,  # (N,) int64
    *,
    num_chosen: int,
    rejected_pair: Tensor,  # (R,) int64
    nll_weights: Tensor | None = None,  # (N,)
    ref_chosen_logps: Tensor | None = None,  # (B,)
    ref_rejected_logps: Tensor | None = None,  # (R,)
    objective: Objective | str = "longpo",
    bias: Tensor | None = None,  # (V,)
    num_pairs: float | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    workspace_bytes: int | None = None,
    sparse_hidden_gradient: bool = False,
    reuse_hidden: bool = False,
    correct_tokens: bool = False,
    backend: str | None = None,
    shards: Shards | None = None,
) -> PreferenceOutput:
    """The preference loss of flat rows: what batches that share a prefix use. Never shifts: row t predicts labels[t].

    hidden: all rows of all sequences, in any order.
    labels: the token each row predicts, ignore_index for none.
    sequences: the number of the sequence whose answer token a row predicts, -1 for rows that predict none: the chosen
        sequence of pair b has number b in 0..B-1, the rejected sequence r has number B + r. Labels, sequences and
        nll_weights on the host cost no synchronisation.
    num_chosen: B.  rejected_pair: the pair of each rejected sequence.
    nll_weights: the weight of each labelled row in the NLL term, 1 / (tokens of its sequence) for Eq. 14; divided by
        num_pairs here. None for no such term.
    correct_tokens: whether to count, of each answer, the tokens that have the largest logit where they are predicted (the first
        of equals; none in a row that is NaN): what a token accuracy is made of, seen in the same visit at no further product.
    shards: which of N rows each rank of a process group holds. hidden are this rank's (n_r, H), everything else is of all
        N, the same on every rank. Every output is the whole row's, the same on every rank; the gradient of hidden is that
        of this rank's rows, those of weight and bias are its rows' share, and shares add up over the ranks. FSDP and DDP
        average gradients over all their ranks: multiply the loss by the world size. Every rank raises the same ValueError,
        before any row is read, for rows, labels, sequences, pairs and references that are wrong on one of them, and for
        arguments that differ between them (of references that is not looked at); kinds, shapes and dtypes of arguments are
        each rank's own. The host waits for the device once; K and 1 float64 numbers go round beside that.
    Everything else, errors and source as in fused_preference_loss.
    """
    check_tensor("rejected_pair", rejected_pair, (torch.int64,))
    if rejected_pair.dim() != 1:
        raise ValueError(
            f"rejected_pair.shape={tuple(rejected_pair.shape)}: expected (R,), the pair of each rejected one"
        )
    num_chosen = check_whole("num_chosen", num_chosen, 0, "the number of chosen sequences, an int >= 0")
    r = rejected_pair.shape[0]
    groups = _check_pairs(objective, num_chosen, r, rejected_pair, ref_chosen_logps, ref_rejected_logps, num_pairs)
    out = _packed(
        hidden, weight, labels, sequences, groups, nll_weights, bias, softcap, scale, ignore_index, workspace_bytes,
        sparse_hidden_gradient, reuse_hidden, correct_tokens, backend, shards,
    )  # fmt: skip
    return _of_pairs(out, num_chosen)


def packed_objective_loss(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,) int64
    sequences: Tensor,  # (N,) int64
    *,
    groups: Tensor,  # (K,) int64
    roles: Tensor,  # (K,) int64
    num_groups: int,
    objective: Objective | str,
    denominator: float | None = None,
    ref_logps: Tensor | None = None,  # (K,)
    nll_weights: Tensor | None = None,  # (N,)
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    workspace_bytes: int | None = None,
    sparse_hidden_gradient: bool = False,
    reuse_hidden: bool = False,
    correct_tokens: bool = False,
    backend: str | None = None,
    shards: Shards | None = None,
) -> ObjectiveOutput:
    """Any objective of the summed log-probs of K answers in groups, from flat rows: pairs, answers alone, threes.

    sequences: the number k of the answer whose token a row predicts, -1 for rows that predict none.
    groups: the group of each answer, 0 to G - 1, in any order.  roles: what it is there: longpo_ops.ops.objective's CHOSEN 0,
        REJECTED 1, ANSWER 2 or ANCHOR 3. An objective's `forms` say which roles a group has. Groups and roles on the host
        cost no synchronisation, as labels and sequences.
    num_groups: G.  denominator: what sums over groups, and the NLL, are divided by, default G; as num_pairs in
        fused_preference_loss.
    ref_logps: the reference's log-probs of each answer, for objectives that have one.
    Everything else, errors and source as in packed_preference_loss.
    """
    check_tensor("groups", groups, (torch.int64,))
    if groups.dim() != 1 or not groups.shape[0]:
        raise ValueError(f"groups.shape={tuple(groups.shape)}: expected (K,), the group of each answer, at least one")
    k = groups.shape[0]
    groups, roles = check_labels(groups, (k,), "groups", "an answer"), check_labels(roles, (k,), "roles", "an answer")
    objective = resolve_objective(objective)
    _check_reference(objective, "ref_logps", ref_logps, k, "answer")
    count = check_whole("num_groups", num_groups, 1, "the number of groups, an int >= 1")
    refs = None if ref_logps is None else ref_logps.detach()
    given = _Groups(objective, count, groups, roles, refs, _check_total("denominator", denominator, count))
    out = _packed(
        hidden, weight, labels, sequences, given, nll_weights, bias, softcap, scale, ignore_index, workspace_bytes,
        sparse_hidden_gradient, reuse_hidden, correct_tokens, backend, shards,
    )  # fmt: skip
    return ObjectiveOutput(*out)


def _packed(
    hidden, weight, labels, sequences, groups, nll_weights, bias, softcap, scale, ignore_index, workspace_bytes,
    sparse_hidden_gradient, reuse_hidden, correct_tokens, backend, shards,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The numbers of an ObjectiveOutput, from flat rows."""
    check_head(hidden, weight, bias)
    check_rows(hidden)
    n, ranks = check_shards(shards, hidden)
    labels = check_labels(labels, (n,))
    sequences = check_labels(sequences, (n,), "sequences")
    check_numbers(nll_weights, (n,), "nll_weights")
    if nll_weights is not None and nll_weights.requires_grad and torch.is_grad_enabled():
        raise ValueError("nll_weights requires a gradient, and none would reach it: expected nll_weights.detach()")
    return _run(
        hiddens=[hidden[None]],
        weight=weight,
        bias=bias,
        answers=[labels[None]],
        segments=[sequences[None]],
        nll=[torch.empty(0, dtype=torch.int64) if nll_weights is None else labels[None]],
        nll_weights=[torch.zeros(1, 1) if nll_weights is None else nll_weights.detach().cpu()[None]],
        groups=groups,
        shift=False,
        ignore_index=check_ignore_index(ignore_index),
        map=logit_map(scale, softcap),
        workspace_bytes=workspace_bytes,
        sparse=sparse_hidden_gradient,
        reuse_hidden=reuse_hidden,
        correct=check_flag("correct_tokens", correct_tokens),
        backend=backend,
        ranks=ranks,
    )


class _Groups(NamedTuple):
    """As in operators.Batch."""

    objective: Objective
    count: int
    group: Tensor
    role: Tensor
    refs: Tensor | None
    total: float  # what sums over groups are divided by


def _check_pairs(objective, b: int, r: int, pair, ref_chosen, ref_rejected, num_pairs) -> _Groups:
    """Everything about pairs that can be said without their rows. Raises ValueError."""
    objective = resolve_objective(objective)
    if PAIR not in objective.forms:
        forms = " or ".join(" + ".join(form) for form in objective.forms)
        raise ValueError(f"objective {objective.name}: takes groups of {forms}, no pairs; use packed_objective_loss")
    if pair is None:
        if r != b:
            raise ValueError(
                f"{r} rejected sequences for {b} chosen ones: expected as many, or rejected_pair=(R,) indices"
            )
        pair = torch.arange(b)
    pair = check_labels(pair, (r,), "rejected_pair", "rejected sequence")
    if objective.one_rejected and r != b:
        raise ValueError(f"objective {objective.name}: takes one rejected sequence per pair, got {r} for {b} pairs")
    for kind, reference, length in (("chosen", ref_chosen, b), ("rejected", ref_rejected, r)):
        _check_reference(objective, f"ref_{kind}_logps", reference, length, f"{kind} sequence")
    refs = None if ref_chosen is None else _joined(ref_chosen.detach(), ref_rejected.detach())
    return _Groups(objective, b, pair, torch.empty(0, dtype=torch.int64), refs, _check_total("num_pairs", num_pairs, b))


def _check_reference(objective: Objective, name: str, reference: Tensor | None, length: int, of: str) -> None:
    """Raises ValueError unless references are there where the objective reads them, one per sequence."""
    if objective.needs_reference and reference is None:
        raise ValueError(
            f"{name} is missing: objective {objective.name!r} compares with a reference; expected ({length},)"
        )
    if not objective.needs_reference and reference is not None:
        raise ValueError(f"{name} was given: objective {objective.name!r} is reference-free; expected None")
    check_numbers(reference, (length,), name, f", one per {of}")


def _check_total(name: str, given: float | None, count: int) -> float:
    return float(max(count, 1)) if given is None else check_number(name, given, above=0)


def _joined(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(B,), (R,) -> (K,) float64; on the host where both are, else on the device of one."""
    device = rejected.device if chosen.device.type == "cpu" else chosen.device
    return torch.cat([to_device(numbers.double(), device) for numbers in (chosen, rejected)])


def _of_pairs(numbers: tuple[Tensor, ...], b: int) -> PreferenceOutput:
    *totals, logps, rewards, correct = numbers
    parts = ((None, None) if told is None else (told[:b], told[b:]) for told in (logps, rewards, correct))
    return PreferenceOutput(*totals, *(part for of_both in parts for part in of_both))


def _token_means(nll_labels: Tensor | None, shift: bool, ignore_index: int) -> Tensor:
    """(B, T) labels -> (B, 1) float64: 1 / labelled tokens of each sequence, 0 for a sequence that has none."""
    if nll_labels is None:
        return torch.zeros(1, 1, dtype=torch.float64)
    counts = (nll_labels[:, int(shift) :] != ignore_index).sum(1, keepdim=True).double()
    return torch.where(counts > 0, 1 / counts.clamp(min=1), 0.0)


def _run(
    *, hiddens, weight, bias, answers, segments, nll, nll_weights, groups, shift, ignore_index, map, workspace_bytes,
    sparse, reuse_hidden, backend, ranks="", correct=False,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = compute_dtype(hiddens[0], weight, "hidden" if len(hiddens) == 1 else "chosen_hidden")
    backend, reuse_hidden = check_backend(backend), check_flag("reuse_hidden", reuse_hidden)
    grad = torch.is_grad_enabled()
    need = [grad and any(t is not None and t.requires_grad for t in some) for some in (hiddens, [weight], [bias])]
    need.append(check_flag("sparse_hidden_gradient", sparse))
    options = Options(*map, check_workspace(workspace_bytes, weight, dtype), dtype, *need)
    nll_total = torch.full((), groups.total, dtype=torch.float64)
    objective = groups.objective
    batch = Batch(
        answers, segments, nll, nll_weights, nll_total, groups.refs, groups.group, groups.role, groups.count,
        objective.name, objective.parameters(), objective.preference_weight, groups.total, shift, ignore_index, ranks,
        correct,
    )  # fmt: skip
    if reuse_hidden and need[0]:
        numbers = _reuse(hiddens, weight, bias, batch, options, backend)
    else:
        scratch = options.workspace_bytes
        numbers = sweep_op(hiddens, weight, bias, *batch, *map, scratch, dtype, need, backend)
    return numbers[0], *(x.detach() for x in numbers[1:5]), numbers[5].detach() if correct else None


def _reuse(hiddens, weight, bias, batch, options, backend) -> tuple[Tensor, ...]:
    """The sweep with gradients written over the hidden states."""
    if torch.compiler.is_compiling():
        raise ValueError("reuse_hidden=True: expected False under torch.compile, which cannot see memory being reused")
    if any(_shares_memory(h) for h in hiddens):
        raise ValueError(
            "reuse_hidden=True: an expanded or sliding view shares memory among its rows; expected one row of memory each"
        )
    if len(hiddens) == 2 and _share_rows(*hiddens):
        raise ValueError(
            "reuse_hidden=True: chosen_hidden and rejected_hidden share rows of memory; expected one row of memory each"
        )
    return _Reuse.apply(batch, options, backend, weight, bias, *hiddens)


def _shares_memory(view: Tensor) -> bool:
    """Whether two elements may be one place in memory: a stride that does not pass all that smaller ones reach."""
    reach = 0
    for stride, size in sorted(zip(view.stride(), view.shape, strict=True)):
        if size > 1 and view.numel():
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _share_rows(a: Tensor, b: Tensor) -> bool:
    """Whether two (S, T, H) views begin any row at the same place in memory."""
    if not (a.numel() and b.numel()) or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    places = (
        x.storage_offset() + torch.arange(x.shape[0])[:, None] * x.stride(0) + torch.arange(x.shape[1]) * x.stride(1)
        for x in (a, b)
    )
    return bool(torch.isin(*places).any())


class _Reuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, batch, options, backend, weight, bias, *hiddens):
        grads = [h.detach() for h in hiddens]
        result = run_sweep(grads, grads, weight, bias, batch, options, backend, clear=True)
        ctx.grads = grads, result.dw, result.db
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.grad_scale = result.grad_scale
        out = numbers_of(result, batch, result_dtype(weight.dtype))
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    def backward(ctx, grad, *_):
        refuse_create_graph()
        if ctx.grads is None:
            raise RuntimeError("reuse_hidden=True: backward ran twice; give retain_graph=True to all but the last one")
        (hiddens, dw, db), factor = ctx.grads, grad / ctx.grad_scale
        if not keeps_graph():
            ctx.grads = None
        head = (
            None if g is None else scaled(g, factor).to(dtype) for g, dtype in zip((dw, db), ctx.dtypes, strict=True)
        )
        return *[None] * 3, *head, *(scaled(h, factor) for h in hiddens)
