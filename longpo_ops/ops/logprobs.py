"""Per-token log-probs and cross-entropy of a language-model head, without its logits.

logp_t = l_t[y_t] - logsumexp(l_t),   l_t = softcap * tanh(scale * (W h_t + b) / softcap) / temperature

linear_logprobs        (N,) log-probs, exact gradients for any upstream gradient; backward recomputes: 8 N H V
linear_cross_entropy   sum_t w_t * -logp_t with its gradients in one visit of the head: 6 N H V

Nothing is shifted here: row t predicts labels[t].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..parallel import Shards
from .checks import (
    check_backend,
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
from .operators import Batch, logps_op, sweep_op


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
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """-> (N,) log-probs of the labels, float32 (float64 for float64 inputs), 0 where labels == ignore_index.

    Row t of hidden predicts labels[t]: nothing is shifted. hidden and weight share one of float32, bfloat16, float16,
    float64, or autocast is on. Gradients reach hidden, weight and bias, exact for any upstream gradient; ignored rows are
    never read. Labels on the host cost no synchronisation. workspace_bytes, backend: as in fused_preference_loss.

    Raises ValueError naming the argument, what came and what was expected.
    """
    check_head(hidden, weight, bias)
    check_rows(hidden)
    labels = check_labels(labels, (hidden.shape[0],))
    ignore_index, backend = check_ignore_index(ignore_index), check_backend(backend)
    dtype = compute_dtype(hidden, weight)
    scratch = check_workspace(workspace_bytes, weight, dtype)
    map = logit_map(scale, softcap, temperature)
    return logps_op(hidden, weight, bias, labels, ignore_index, *map, scratch, dtype, backend)


def linear_cross_entropy(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,) int64
    *,
    row_weights: Tensor | None = None,  # (N,)
    reduction: str = "mean",
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    shards: Shards | None = None,
) -> Tensor:
    """-> () weighted NLL of the labels, or (N,) with reduction="none"; float32 (float64 for float64 inputs).

    reduction: "sum" of row_weights * NLL; "mean": that sum over the sum of the weights of labelled rows, 0 when there are
        none; "none": row_weights * NLL per row, where backward recomputes (8 N H V instead of 6).
    row_weights: default 1. They take a gradient with reduction="none" only.
    shards: as in packed_preference_loss: hidden are this rank's rows, labels and row_weights of all rows; the sum or mean
        is the whole row's on every rank, its gradient this rank's share. Not with reduction="none".
    Everything else as in linear_logprobs.
    """
    check_head(hidden, weight, bias)
    check_rows(hidden)
    n, group = check_shards(shards, hidden)
    labels = check_labels(labels, (n,))
    check_reduction(reduction, row_weights, n)
    ignore_index = check_ignore_index(ignore_index)
    if reduction == "none":
        if shards is not None:
            raise ValueError(
                "reduction='none' with shards: expected 'sum' or 'mean'; rows need no other ranks, give theirs"
            )
        logps = linear_logprobs(
            hidden, weight, labels, bias=bias, softcap=softcap, scale=scale, temperature=temperature,
            ignore_index=ignore_index, workspace_bytes=workspace_bytes, backend=backend,
        )  # fmt: skip
        return -logps if row_weights is None else -logps * row_weights

    backend = check_backend(backend)
    dtype = compute_dtype(hidden, weight)
    scratch = check_workspace(workspace_bytes, weight, dtype)
    map = logit_map(scale, softcap, temperature)
    weights = torch.ones(1, 1, dtype=torch.float64) if row_weights is None else row_weights.detach().cpu()[None]
    total = torch.ones((), dtype=torch.float64)
    if reduction == "mean":
        labelled = labels != ignore_index
        total = (
            labelled.sum() if row_weights is None else torch.where(labelled, weights[0], 0.0).sum(dtype=torch.float64)
        )
    grad = torch.is_grad_enabled()
    need = [grad and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    none = torch.empty(0, dtype=torch.int64)
    batch = Batch(
        answers=[none], segments=[none], nll=[labels[None]], nll_weights=[weights], nll_total=total, refs=None,
        group=none, role=none, count=0, objective="", parameters=[], preference_weight=0.0, num_groups=1.0,
        shift=False, ignore_index=ignore_index, ranks=group,
    )  # fmt: skip
    return sweep_op([hidden[None]], weight, bias, *batch, *map, scratch, dtype, need, backend)[0]
