"""Rows that tell more than a log-prob, and losses made of it, as registered operators: the affine family.

With weights a, h, r and u of a row, any sum of

    phi = a * logp + h * H + r * lse + u * S,     H = -sum_j p_j log p_j,   lse = log sum_j exp(l_j),   S = sum_j c_j log p_j

has, by the logits, the gradient (docs/mathematics.md; C = sum_j c_j, e = sum_j p_j (l_j - m))

    dl_j = alpha * 1[j == y] + p_j * (beta + gamma * (l_j - m)) + delta * c_j
    alpha = a,   beta = r - a - u * C + h * e,   gamma = -h,   delta = u

rows            logp, H, lse, S and the token that is predicted, (N,) each; backward recomputes chunk by chunk: 8 N H V
cross_entropy   sum_t w_t (-logp) + u_t (-S) + q_t lse^2 with its gradients in one visit of the head: 6 N H V. float16 with
                q is scored first, as lse is what its gradients are scaled by: 8 N H V

A chunk is scored and pushed (sweep.py): the tile of logits waits in memory meanwhile. Scratch: as of a sweep.

Tests: tests/ops/test_affine.py.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ..parallel import Shards, alike, digest, group_named
from .batch import check_rows_labels, stretches_of, token_stretches
from .checks import check_held_rows
from .operators import backward, deliver, make_head, refuse_create_graph, scale_, setup
from .products import result_dtype
from .rows import Chunk, Stretch, to_device, windows
from .sweep import HeadSweep, Options, float16_scale
from .tiles import LOG_SUM, MEAN, TOTAL, Beside, entropies, logsumexps, predictions

WHOLE = "labels and weights of rows and classes"


class Weights(NamedTuple):
    """dL / d of a row's logp, H, lse and S, (n,) float64 each; None is 0."""

    logp: Tensor | None = None
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    smooth: Tensor | None = None

    def coefficients(self, stats: Tensor, classes_sum: Tensor | float) -> Tensor:
        """(n, 4): alpha, beta, gamma, delta, in the dtype of stats."""
        zero = torch.zeros(len(stats), dtype=torch.float64, device=stats.device)
        a, h, r, u = (zero if w is None else w for w in self)
        beta = r - a - u * classes_sum
        if self.entropy is not None:
            beta = beta + h * stats[:, MEAN]
        return torch.stack([a, beta, -h, u], 1).to(stats.dtype)

    def bound(self, vocab: int, classes: Tensor | None) -> Tensor:
        """(n,) that no |dl_j| exceeds by much: 0 <= -e <= log V, and x e^x is at most 1/e."""
        one = 1.0 if classes is None else classes.abs().double().sum() + classes.abs().amax()
        factors = (1.0, math.log(vocab) + 1, 1.0, one if classes is not None else vocab + 1.0)
        return sum(w.double().abs() * f for w, f in zip(self, factors, strict=True) if w is not None)


def classes_sum(classes: Tensor | None, vocab: int) -> Tensor | float:
    """C, without waiting for the device."""
    return float(vocab) if classes is None else classes.sum(dtype=torch.float64)


def smooth_logps(stats: Tensor, total: Tensor | float) -> Tensor:
    """(n, 5) stats with the total, C -> (n,) float64 sum_j c_j log p_j."""
    return stats[:, TOTAL].double() - stats[:, LOG_SUM].double() * total


# ---- what rows tell ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("longpo_ops::rows", mutates_args=())
def rows_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    classes: Tensor | None,
    labels: Tensor,
    asked: list[bool],
    ignore_index: int,
    scale: float,
    softcap: float,
    workspace_bytes: int,
    compute_dtype: torch.dtype,
    sparse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """asked: of entropy, S and what is predicted. -> logps, entropies, logsumexps, S, predicted; (0,) for what is not."""
    options = Options(scale, softcap, workspace_bytes, compute_dtype, False, False, False)
    outputs = _empty_outputs(hidden, weight, asked)
    for output, nothing in zip(outputs, (0.0, 0.0, 0.0, 0.0, -1), strict=True):
        output.fill_(nothing)
    total = classes_sum(classes, weight.shape[0])
    with torch.autocast(weight.device.type, enabled=False):
        stretches = token_stretches(hidden, None, labels, torch.ones(1, 1), ignore_index)
        check_rows_labels(stretches, weight.shape[0])
        head = make_head(weight, bias, options, backend, hidden.shape[0])
        beside = Beside(*asked, None if classes is None else classes.to(head.dtype).contiguous())
        for chunk in head.chunks(windows(stretches), Stretch.nll_mask):
            logps, stats = head.stats(chunk, beside)
            found = (
                logps,
                entropies(stats) if asked[0] else None,
                logsumexps(stats),
                smooth_logps(stats, total) if asked[1] else None,
                predictions(stats) if asked[2] else None,
            )
            for output, rows in zip(outputs, found, strict=True):
                if rows is not None:
                    chunk.write(rows.to(output.dtype), output)
    return outputs


def _empty_outputs(hidden: Tensor, weight: Tensor, asked: list[bool]) -> tuple[Tensor, ...]:
    real, n = result_dtype(weight.dtype), hidden.shape[0]
    given = (True, asked[0], True, asked[1], asked[2])
    dtypes = (real, real, real, real, torch.int64)
    return tuple(hidden.new_empty(n if there else 0, dtype=d) for there, d in zip(given, dtypes, strict=True))


@rows_op.register_fake
def _(hidden, weight, bias, classes, labels, asked, *_):
    return _empty_outputs(hidden, weight, asked)


@torch.library.custom_op("longpo_ops::rows_backward", mutates_args=())
def rows_backward_op(
    upstream: list[Tensor],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    classes: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    workspace_bytes: int,
    compute_dtype: torch.dtype,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """upstream: the gradients of logp, H, lse and S, (N,) each, or (0,) for one that has none."""
    options = Options(scale, softcap, workspace_bytes, compute_dtype, *need)
    dh = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if need[0] else None
    weights = Weights(*(w.double() if w.numel() else None for w in upstream))
    vocab = weight.shape[0]
    with torch.autocast(weight.device.type, enabled=False):
        head = make_head(weight, bias, options, backend, hidden.shape[0])
        classes = None if classes is None else classes.to(head.dtype).contiguous()
        bound = (
            weights.bound(vocab, classes)
            if hidden.shape[0] and any(w is not None for w in weights)
            else hidden.new_zeros(0)
        )
        stretches = token_stretches(hidden, dh, labels, bound[None], ignore_index)
        grad_scale = torch.ones((), device=weight.device)
        if compute_dtype == torch.float16 and bound.shape[0]:
            labelled = to_device(labels != ignore_index, bound.device)
            grad_scale = float16_scale(torch.where(labelled, bound, 0.0).amax())
        total, beside = classes_sum(classes, vocab), Beside(mean=weights.entropy is not None)
        for chunk in head.chunks(windows(stretches), Stretch.nll_mask):
            of_chunk = Weights(*(None if w is None else chunk.read(w, head.device) * grad_scale for w in weights))
            if all(w is None for w in weights[1:]):
                head.visit(chunk, of_chunk.logp.to(head.dtype))
                continue
            _, held = head.score(chunk, beside, affine=True)
            head.push(held, of_chunk.coefficients(held.stats, total), classes)
        found = (dh, head.weight_gradient(), head.db)
        dh, dw, db = (None if g is None else scale_(g, 1 / grad_scale) for g in found)
    return (
        hidden.new_empty(0) if dh is None else dh,
        weight.new_empty(0) if dw is None else dw.to(weight.dtype),
        weight.new_empty(0) if db is None else db.to(bias.dtype),
    )


@rows_backward_op.register_fake
def _(upstream, hidden, weight, bias, *rest):
    need = rest[-2]
    return (
        hidden.new_empty(hidden.shape if need[0] else 0),
        weight.new_empty(weight.shape if need[1] else 0),
        bias.new_empty(bias.shape) if need[2] else weight.new_empty(0),
    )


def _rows_setup(ctx, inputs, output):
    hidden, weight, bias, classes, labels, _, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, bias, classes, labels)
    ctx.mark_non_differentiable(output[4])
    ctx.set_materialize_grads(False)


def _rows_backward(ctx, *grads):
    refuse_create_graph()
    hidden, weight, bias, classes, labels = ctx.saved_tensors
    nothing = hidden.new_empty(0, dtype=result_dtype(weight.dtype))
    upstream = [nothing if g is None else g.contiguous() for g in grads[:4]]
    if all(g is None for g in grads[:4]):
        return (None,) * 13
    if grads[0] is None:
        upstream[0] = torch.zeros_like(next(g for g in grads[:4] if g is not None))
    need = ctx.needs_input_grad[:3]
    *options, sparse, backend = ctx.options
    found = rows_backward_op(upstream, hidden, weight, bias, classes, labels, *options, [*need, sparse], backend)
    return *(g if needed else None for g, needed in zip(found, need, strict=True)), *[None] * 10


rows_op.register_autograd(_rows_backward, setup_context=_rows_setup)


# ---- a loss of rows ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("longpo_ops::cross_entropy", mutates_args=())
def cross_entropy_op(
    hiddens: list[Tensor],  # one, (N, H)
    weight: Tensor,
    bias: Tensor | None,
    classes: Tensor | None,
    labels: Tensor,
    row_weights: list[Tensor],
    ignore_index: int,
    group: str,
    scale: float,
    softcap: float,
    workspace_bytes: int,
    compute_dtype: torch.dtype,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    """row_weights: w, u and q of all rows, (N,) float64 each. -> the loss; dh, dw, db, and what divides each of them (3,)."""
    (hidden,) = hiddens
    options = Options(scale, softcap, workspace_bytes, compute_dtype, *need)
    dh = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if need[0] else None
    with torch.autocast(weight.device.type, enabled=False):
        shards = Shards(labels.shape[0], group_named(group)) if group else None
        row_weights = [w.cpu() for w in row_weights]
        with nullcontext() if shards is None else _alike(shards, weight, labels, row_weights, classes):
            none, any_weight = torch.empty(0, dtype=torch.int64), sum(w.abs() for w in row_weights)
            stretches = stretches_of(
                [hidden[None]], [None if dh is None else dh[None]], [none], [none], [labels[None]], [any_weight[None]],
                False, ignore_index,
            )  # fmt: skip
            check_rows_labels(stretches, weight.shape[0])
            if shards is not None:
                check_held_rows(hidden, shards)
                stretches = [stretch.held(shards.rows) for stretch in stretches]
                row_weights = [w[shards.rows] for w in row_weights]
        head = make_head(weight, bias, options, backend, hidden.shape[0])
        loss, grad_scale = _Visit(head, stretches, row_weights, classes).run()
        if shards is not None:
            shards.sum_(loss)
    dw, dw_scale = deliver(head.weight_gradient(), weight)
    db, db_scale = deliver(head.db, bias if need[2] else weight)
    return (
        loss[0].to(result_dtype(weight.dtype)),
        [hidden.new_empty(0) if dh is None else dh],
        dw,
        db,
        grad_scale * torch.stack([torch.ones_like(dw_scale), dw_scale, db_scale]),
    )


class _Visit:
    """All rows with a weight, scored and pushed chunk by chunk."""

    def __init__(self, head: HeadSweep, stretches: list[Stretch], row_weights: list[Tensor], classes: Tensor | None):
        self.head, self.places, self.row_weights = head, windows(stretches), row_weights
        self.classes = None if classes is None else classes.to(head.dtype).contiguous()
        self.total = classes_sum(self.classes, head.vocab)
        self.smooth, self.squared = (bool((w != 0).any()) for w in row_weights[1:])
        self.beside = Beside(total=self.smooth, classes=self.classes)
        self.loss = torch.zeros(1, dtype=torch.float64, device=head.device)

    def run(self) -> tuple[Tensor, Tensor]:
        """-> loss (1,) of these rows, and the power of two that their gradients carry."""
        grad_scale = torch.ones((), device=self.head.device)
        if not self.head.options.need_any:
            for chunk in self._chunks():
                self._add(chunk, *self.head.stats(chunk, self.beside))
            return self.loss, grad_scale
        if self.head.options.compute_dtype == torch.float16:
            grad_scale = self._float16_scale()
        for chunk in self._chunks():
            logps, held = self.head.score(chunk, self.beside, affine=True)
            self._add(chunk, logps, held.stats)
            coefficients = self._weights(chunk, held.stats, grad_scale).coefficients(held.stats, self.total)
            self.head.push(held, coefficients, self.classes)
        return self.loss, grad_scale

    def _chunks(self):
        return self.head.chunks(self.places, Stretch.nll_mask)

    def _read(self, chunk: Chunk) -> list[Tensor]:
        return [chunk.read(w, self.head.device) for w in self.row_weights]

    def _add(self, chunk: Chunk, logps: Tensor, stats: Tensor) -> None:
        w, u, q = self._read(chunk)
        terms = -logps.double() * w
        terms = torch.where(w != 0, terms, 0.0)  # a label of no weight may have no probability
        if self.smooth:
            terms = terms - torch.where(u != 0, smooth_logps(stats, self.total) * u, 0.0)
        if self.squared:
            terms = terms + logsumexps(stats).square() * q
        self.loss.add_(terms.sum())

    def _weights(self, chunk: Chunk, stats: Tensor, grad_scale: Tensor) -> Weights:
        w, u, q = (x * grad_scale for x in self._read(chunk))
        squared = 2 * q * logsumexps(stats) if self.squared else None
        return Weights(-w, None, squared, -u if self.smooth else None)

    def _float16_scale(self) -> Tensor:
        """Brings max |dl| near 1. Of rows squared, lse must be known."""
        w, u, q = self.row_weights
        largest = torch.zeros(1, dtype=torch.float64, device=self.head.device)
        for chunk in self._chunks() if self.squared else ():
            _, stats = self.head.stats(chunk)
            carried = (2 * chunk.read(q, self.head.device) * logsumexps(stats)).abs()
            largest = torch.maximum(largest, carried.amax())
        host = None if self.classes is None else self.classes.cpu()
        linear = Weights(w, None, None, u if self.smooth else None).bound(self.head.vocab, host)
        return float16_scale(largest[0] + to_device(linear.amax() if len(w) else torch.zeros(()), self.head.device))


def _alike(shards: Shards, weight: Tensor, labels: Tensor, row_weights: list[Tensor], classes: Tensor | None):
    given = [labels, *row_weights, *([] if classes is None else [classes])]
    return alike(shards.group, weight.device, digest(tensor.cpu().contiguous() for tensor in given), WHOLE)


@cross_entropy_op.register_fake
def _(hiddens, weight, bias, *rest):
    (hidden,), need = hiddens, rest[-2]
    return (
        weight.new_empty((), dtype=result_dtype(weight.dtype)),
        [hidden.new_empty(hidden.shape if need[0] else 0)],
        weight.new_empty(weight.shape if need[1] else 0),
        bias.new_empty(bias.shape) if need[2] else weight.new_empty(0),
        weight.new_empty(3, dtype=torch.float32),
    )


cross_entropy_op.register_autograd(backward, setup_context=setup)
