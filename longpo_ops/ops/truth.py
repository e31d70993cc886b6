"""The plain PyTorch truth of every op: full logits, autograd, any dtype. Tests and benchmarks call it in float64.

Memory is what the library avoids: logits (N, V), their log-softmax and their gradient.

Tests: tests/ops/test_operators.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .objective import Answers, Objective


def logits(hidden, weight, bias=None, softcap=None, scale=1.0, temperature=1.0) -> Tensor:
    """(..., H), (V, H) -> (..., V)."""
    z = F.linear(hidden, weight, bias) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def logprobs(hidden, weight, labels, *, ignore_index=-100, **map) -> Tensor:
    """(..., H), (V, H), (...) -> (...) log-probs of the labels in at least float32, 0 where ignored."""
    labelled = labels != ignore_index
    z = logits(hidden, weight, **map)
    z = z if z.dtype == torch.float64 else z.float()
    return torch.where(labelled, z.log_softmax(-1).gather(-1, labels.where(labelled, 0)[..., None]).squeeze(-1), 0.0)


def row_outputs(hidden, weight, labels, *, ignore_index=-100, **map) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> (...) log-probs, entropies and logsumexps, 0 where ignored, and the tokens predicted, -1 where ignored."""
    labelled = labels != ignore_index
    z = logits(hidden, weight, **map)
    z = z if z.dtype == torch.float64 else z.float()
    log_p = z.log_softmax(-1)
    entropy = -torch.where(log_p == -math.inf, 0.0, log_p.exp() * log_p).sum(-1)
    logps = log_p.gather(-1, labels.where(labelled, 0)[..., None]).squeeze(-1)
    numbers = (torch.where(labelled, x, 0.0) for x in (logps, entropy, z.logsumexp(-1)))
    return *numbers, z.argmax(-1).where(labelled, -1)


def cross_entropy(
    hidden,
    weight,
    labels,
    *,
    row_weights=None,
    class_weights=None,
    label_smoothing=0.0,
    z_loss_weight=0.0,
    reduction="mean",
    ignore_index=-100,
    **map,
) -> Tensor:
    labelled = labels != ignore_index
    z = logits(hidden, weight, **map)
    z = z if z.dtype == torch.float64 else z.float()
    classes = None if class_weights is None else class_weights.to(z)
    options = dict(ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
    losses = F.cross_entropy(z, labels, classes, **options)
    squares = torch.where(labelled, z.logsumexp(-1), 0.0).square() * z_loss_weight
    weights = torch.ones_like(losses) if row_weights is None else row_weights.to(losses)
    if reduction == "none":
        return (losses + squares) * weights
    of_label = 1.0 if classes is None else classes[labels.where(labelled, 0)]
    total, rows = ((w * labelled).sum() if reduction == "mean" else 1.0 for w in (weights * of_label, weights))
    return (losses * weights).sum() / total + (squares * weights).sum() / rows


def divergence(log_p: Tensor, log_q: Tensor, kind: str, beta: float = 0.5) -> Tensor:
    """(..., V) student and teacher log-probabilities -> (...). forward KL(q||p), reverse KL(p||q), jsd of both."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b, a, log_target=True, reduction="none").sum(-1)

    if kind != "jsd":
        return kl(log_q, log_p) if kind == "forward" else kl(log_p, log_q)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))  # p and q themselves may underflow
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def preference_loss(
    chosen_hidden,  # (B, Tc, H)
    rejected_hidden,  # (R, Tr, H)
    weight,
    chosen_labels,
    rejected_labels,
    *,
    objective: Objective,
    ref_chosen_logps=None,
    ref_rejected_logps=None,
    nll_labels=None,
    rejected_pair=None,
    num_pairs=None,
    shift=True,
    ignore_index=-100,
    **map,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss, summed chosen log-probs (B,), summed rejected log-probs (R,), from full logits."""
    first, last = (1, -1) if shift else (0, None)

    def per_token(hidden, labels):
        return logprobs(hidden[:, :last], weight, labels[:, first:], ignore_index=ignore_index, **map).double()

    def lengths(labels):
        return (labels[:, first:] != ignore_index).sum(1).double()

    chosen = per_token(chosen_hidden, chosen_labels).sum(1)
    rejected = per_token(rejected_hidden, rejected_labels).sum(1)
    pair = torch.arange(len(chosen)) if rejected_pair is None else rejected_pair.cpu()
    refs = None if ref_chosen_logps is None else torch.cat([ref_chosen_logps, ref_rejected_logps]).double()
    tokens = torch.cat([lengths(chosen_labels), lengths(rejected_labels)])
    group, role = torch.cat([torch.arange(len(chosen)), pair]), torch.tensor([0] * len(chosen) + [1] * len(pair))
    losses = objective.losses(Answers.of(torch.cat([chosen, rejected]), tokens, refs, group, role, len(chosen)))
    count = num_pairs or len(chosen)
    loss = objective.preference_weight * losses.sum() / count
    if nll_labels is not None:
        loss = loss - (per_token(chosen_hidden, nll_labels).sum(1) / lengths(nll_labels)).sum() / count
    return loss, chosen, rejected
