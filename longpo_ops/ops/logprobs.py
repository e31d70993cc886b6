"""Per-token log-probs and cross-entropy of a language-model head, without its logits.

logp_t = l_t[y_t] - logsumexp(l_t),   l_t = softcap * tanh(scale * (W h_t + b) / softcap) / temperature

linear_logprobs        (N,) log-probs, exact gradients for any upstream gradient; backward recomputes: 8 N H V. Beside them
                       entropies, logsumexps and predicted tokens of the same rows, with gradients where they have any
linear_cross_entropy   with its gradients in one visit of the head: 6 N H V. Of a row with weight w, label y, smoothing eps,
                       class weights c (1 without) and a z-loss of weight zeta (affine.py, docs/mathematics.md)

    w * ((1 - eps) * c_y * -logp_y + eps / V * sum_j c_j * -log p_j + zeta * logsumexp(l)^2)

Nothing is shifted here: row t predicts labels[t].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kinds import check_flag, check_number, refusal
from ..parallel import Shards
from .affine import cross_entropy_op, rows_op
from .batch import Batch
from .checks import (
    check_backend,
    check_class_weights,
    check_head,
    check_ignore_index,
    check_labels,
    check_reduction,
    check_rows,
    check_shards,
    check_workspace,
    compute_dtype,
    logit_map,
)
from .operators import logps_op, sweep_op

OUTPUTS = ("entropy", "logsumexp", "predicted")
MOST_TOKENS = 1 << 24  # whose ids a float32 tells apart: what is predicted is a column of stats


class RowOutputs(NamedTuple):
    """What linear_logprobs tells of N rows; None for what was not asked for. float32 (float64 for float64 inputs)."""

    logps: Tensor  # (N,) 0 where labels == ignore_index
    entropy: Tensor | None = None  # (N,) -sum_j p_j log p_j, in nats; 0 there
    logsumexp: Tensor | None = None  # (N,) log sum_j exp(l_j); 0 there
    predicted: Tensor | None = None  # (N,) int64, the token of the largest logit, the first of equals; -1 there


def linear_logprobs(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = (),
    workspace_bytes: int | None = None,
    sparse_hidden_gradient: bool = False,
    backend: str | None = None,
) -> Tensor | RowOutputs:
    """-> (N,) log-probs of the labels, float32 (float64 for float64 inputs), 0 where labels == ignore_index.

    Row t of hidden predicts labels[t]: nothing is shifted. hidden and weight share one of float32, bfloat16, float16,
    float64, or autocast is on. Gradients reach hidden, weight and bias, exact for any upstream gradient; ignored rows are
    never read. Labels on the host cost no synchronisation. workspace_bytes, sparse_hidden_gradient, backend: as in
    fused_preference_loss.

    outputs: of "entropy", "logsumexp" and "predicted"; with any, a RowOutputs comes instead. Gradients reach the inputs
        through entropy and logsumexp, too, exact for any upstream gradients; what is predicted has none. The entropy is the
        logarithm of the sum less the expected shifted logit, two numbers of at most log V: its rounding is at most a few
        units of float32 at log V, some 2e-6 nats, however large logits are. A row whose logits hold NaN or +inf, or nothing
        finite, has NaN for all of them and predicts -1.

    Raises ValueError naming the argument, what came and what was expected.
    """
    check_head(hidden, weight, bias)
    check_rows(hidden)
    labels = check_labels(labels, (hidden.shape[0],))
    ignore_index, backend = check_ignore_index(ignore_index), check_backend(backend)
    dtype = compute_dtype(hidden, weight)
    scratch = check_workspace(workspace_bytes, weight, dtype)
    sparse = check_flag("sparse_hidden_gradient", sparse_hidden_gradient)
    options = (ignore_index, *logit_map(scale, softcap, temperature), scratch, dtype, sparse, backend)
    if not _check_outputs(outputs, weight):
        return logps_op(hidden, weight, bias, labels, *options)
    asked = ["entropy" in outputs, False, "predicted" in outputs]
    logps, entropy, logsumexp, _, predicted = rows_op(hidden, weight, bias, None, labels, asked, *options)
    found = zip(OUTPUTS, (entropy, logsumexp, predicted), strict=True)
    return RowOutputs(logps, *(output if name in outputs else None for name, output in found))


def _check_outputs(outputs: tuple[str, ...], weight: Tensor) -> tuple[str, ...]:
    """-> outputs. Raises ValueError for what is no tuple of some of their names, and for a vocabulary too large."""
    if (
        not isinstance(outputs, tuple)
        or not all(name in OUTPUTS for name in outputs)
        or len({*outputs}) != len(outputs)
    ):
        raise refusal("outputs", outputs, f"a tuple of some of {', '.join(OUTPUTS)}, each once at most")
    if "predicted" in outputs and weight.shape[0] > MOST_TOKENS:
        raise ValueError(f"outputs: 'predicted' with V={weight.shape[0]}: expected at most {MOST_TOKENS} tokens")
    return outputs


def linear_cross_entropy(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,) int64
    *,
    row_weights: Tensor | None = None,  # (N,)
    class_weights: Tensor | None = None,  # (V,)
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    reduction: str = "mean",
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    workspace_bytes: int | None = None,
    sparse_hidden_gradient: bool = False,
    backend: str | None = None,
    shards: Shards | None = None,
) -> Tensor:
    """-> () weighted NLL of the labels, or (N,) with reduction="none"; float32 (float64 for float64 inputs).

    reduction: "sum" of row_weights * NLL; "mean": that sum over the sum of the weights of labelled rows, 0 when there are
        none; "none": row_weights * NLL per row, where backward recomputes (8 N H V instead of 6).
    row_weights: default 1. They take a gradient with reduction="none" only.
    class_weights: what a label's row counts, as weight= of torch.nn.functional.cross_entropy: "mean" divides by the sum of
        row_weights * class_weights[labels]. Constants, on the host or on the device.
    label_smoothing: eps in [0, 1), as there: of a label's weight eps goes to all V classes alike, each times its class weight.
    z_loss_weight: adds z_loss_weight * logsumexp^2 to each row, which holds the logarithm of the softmax's denominator near
        0 (PaLM, arXiv 2204.02311, section 5: 1e-4; ST-MoE, arXiv 2202.08906). It is no NLL: class weights do not reach it,
        and "mean" divides its sum by that of row_weights, as a mean over rows.
    With smoothing or a z-loss a tile of logits is visited twice instead of once, at the same products (docs/mathematics.md);
        float16 with a z-loss is scored first (8 N H V).
    shards: as in packed_preference_loss: hidden are this rank's rows, labels and row_weights of all rows; the sum or mean
        is the whole row's on every rank, its gradient this rank's share. Not with reduction="none".
    Everything else as in linear_logprobs.
    """
    check_head(hidden, weight, bias)
    check_rows(hidden)
    n, group = check_shards(shards, hidden)
    labels = check_labels(labels, (n,))
    check_reduction(reduction, row_weights, n)
    ignore_index, backend = check_ignore_index(ignore_index), check_backend(backend)
    check_class_weights(class_weights, weight)
    smoothing = check_number("label_smoothing", label_smoothing)
    if not 0 <= smoothing < 1:
        raise refusal("label_smoothing", label_smoothing, "a number in [0, 1)")
    squared = check_number("z_loss_weight", z_loss_weight)
    if squared < 0:
        raise refusal("z_loss_weight", z_loss_weight, "a finite number >= 0")
    if reduction == "none" and shards is not None:
        raise ValueError(
            "reduction='none' with shards: expected 'sum' or 'mean'; rows need no other ranks, give theirs"
        )
    dtype = compute_dtype(hidden, weight)
    scratch = check_workspace(workspace_bytes, weight, dtype)
    options = (*logit_map(scale, softcap, temperature), scratch, dtype)
    sparse = check_flag("sparse_hidden_gradient", sparse_hidden_gradient)
    classes = None if class_weights is None else class_weights.detach()
    of_label = None if classes is None else classes.cpu()[labels.clamp(0, len(classes) - 1)].double()  # (N,) c_y
    spread = None if classes is None else classes.to(weight.device)
    if reduction == "none":
        head = (hidden, weight, bias), labels, (ignore_index, *options, sparse, backend)
        losses = _each_row(*head, spread, of_label, smoothing, squared)
        return losses if row_weights is None else losses * row_weights

    labelled = labels != ignore_index
    rows = torch.ones(1, dtype=torch.float64) if row_weights is None else row_weights.detach().cpu()
    weights = rows if of_label is None else rows * of_label
    total = _total(weights, labelled, reduction)
    grad = torch.is_grad_enabled()
    need = [grad and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    need.append(sparse)
    if smoothing or squared:
        wide = rows.double()
        each = (weights.double() * (1 - smoothing), total), (wide * (smoothing / len(weight)), total)
        each = *each, (wide * squared, _total(rows, labelled, reduction))
        each = [torch.where(labelled & (divisor != 0), x / divisor, 0.0) for x, divisor in each]
        head = [hidden], weight, bias, spread, labels
        return cross_entropy_op(*head, each, ignore_index, group, *options, need, backend)[0]
    none = torch.empty(0, dtype=torch.int64)
    batch = Batch(
        answers=[none], segments=[none], nll=[labels[None]], nll_weights=[weights[None]], nll_total=total,
        refs=None, group=none, role=none, count=0, objective="", parameters=[], preference_weight=0.0, num_groups=1.0,
        shift=False, ignore_index=ignore_index, ranks=group,
    )  # fmt: skip
    return sweep_op([hidden[None]], weight, bias, *batch, *options, need, backend)[0]


def _total(weights: Tensor, labelled: Tensor, reduction: str) -> Tensor:
    """What a sum over labelled rows is divided by, () float64."""
    if reduction == "sum":
        return torch.ones((), dtype=torch.float64)
    return torch.where(labelled, weights, 0.0).sum(dtype=torch.float64)


def _each_row(head, labels, options, classes, of_label, smoothing: float, squared: float) -> Tensor:
    """(N,) losses of rows, by autograd on what rows tell."""
    if smoothing or squared:
        asked = [False, bool(smoothing), False]
        logps, _, logsumexps, smooth, _ = rows_op(*head, classes if smoothing else None, labels, asked, *options)
    else:
        logps = logps_op(*head, labels, *options)
    losses = -logps
    if of_label is not None:
        of_label = of_label.to(logps)
        losses = torch.where(of_label != 0, losses * of_label, 0.0)  # a label of no weight may have no probability
    if smoothing:
        losses = losses * (1 - smoothing) - smooth * (smoothing / head[1].shape[0])
    return losses + logsumexps.square() * squared if squared else losses
