"""The float64 truth of a case at its full size: the loss, and its gradients on a sample of rows.

With g_t = dL / d logp_t and the logsumexp of every row known, any piece of the logits' gradient is cheap,

    dz[t, j] = g_t (1[j == y_t] - p_tj)                       log-probs
    dz[t, j] = p_tj (log p_tj - log q_tj - KL_t) / N          KL(student || teacher)

and of a real model's states, how far each of those rows is off where dz is rounded to bfloat16: what a sparse hidden gradient
may be off by. So d hidden[rows] = dz[rows, :] W and d weight[columns] = dz[:, columns]^T hidden cost little beside the 2 N H V
operations of the logsumexps, where a whole float64 pass would cost 6 N H V. Memory: BLOCK rows of logits, the hidden
states and the weight, in float64.

Tests: tests/benchmarks/losses/test_run.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .cases import Case, Inputs
from .peers import preference_formula, token_labels

BLOCK = 256
SAMPLE = 64
REAL_SAMPLE = 512  # of a real model's rows: their 99th percentile is asked for
ROWS, ROUNDED = "hidden by rows", "hidden by rows, dz in bfloat16"


class Truth(NamedTuple):
    loss: float
    rows: dict[str, Tensor]  # leaf -> which of its rows
    gradients: dict[str, Tensor]  # leaf -> float64 gradient of those rows
    rounded: float | None = None  # 99th percentile over hidden's rows, of a real model's states

    def errors(self, loss: float, gradients: dict[str, Tensor]) -> dict[str, float]:
        """Largest difference over the truth's largest value: of the loss, and of the sampled gradient of each leaf that has
        one (a frozen head has none)."""
        out = {"loss": abs(loss - self.loss) / abs(self.loss)}
        for name in gradients.keys() & self.gradients.keys():
            true = self.gradients[name]
            difference = gradients[name][self.rows[name]].double() - true
            out[name] = float(difference.abs().max() / true.abs().max())  # NaN stays NaN
        if self.rounded is not None:
            found = gradients["hidden"][self.rows["hidden"]]
            out |= {ROWS: by_rows(found, self.gradients["hidden"]), ROUNDED: self.rounded}
        return out


def by_rows(found: Tensor, true: Tensor) -> float:
    """The 99th percentile of how far a row is off, relative to its length."""
    return float(((found.double() - true).norm(dim=1) / true.norm(dim=1)).quantile(0.99))


@torch.no_grad()
def truth(case: Case, x: Inputs) -> Truth:
    return _divergence(x) if case.op == "kl" else _log_probs(case, x)


def _log_probs(case: Case, x: Inputs) -> Truth:
    if case.op == "preference":
        sides = ("chosen", "rejected")
        hidden = {f"{side}_hidden": x[f"{side}_hidden"].flatten(0, 1)[:-1] for side in sides}
        labels = torch.cat([token_labels(x, side).flatten() for side in sides]).clamp(min=0)
    else:
        hidden, labels = {"hidden": x["hidden"]}, x["labels"]
    states, weight = torch.cat([*hidden.values()]).double(), x["weight"].double()
    log_sum = torch.cat([(block @ weight.T).logsumexp(-1) for block in states.split(BLOCK)])
    logps = ((states * weight[labels]).sum(-1) - log_sum).requires_grad_()
    with torch.enable_grad():
        if case.op == "preference":
            loss = preference_formula(case, x, *(part[None] for part in logps.chunk(2)))
        else:
            loss = -logps.mean()
    (slopes,) = torch.autograd.grad(loss, logps)

    def dz(rows: Tensor, columns: Tensor) -> Tensor:
        p = (states[rows] @ weight[columns].T - log_sum[rows, None]).exp()
        return slopes[rows, None] * ((labels[rows, None] == columns).double() - p)

    truth = _sampled(loss, dz, hidden, states, weight, labels, REAL_SAMPLE if case.states else SAMPLE)
    if not case.states:
        return truth
    rounded = dz(truth.rows["hidden"], torch.arange(len(weight))).bfloat16().double() @ weight
    return truth._replace(rounded=by_rows(rounded, truth.gradients["hidden"]))


def _divergence(x: Inputs) -> Truth:
    states, weight = x["hidden"].double(), x["weight"].double()
    teacher_states, teacher_weight = x["teacher_hidden"].double(), x["teacher_weight"].double()
    log_sums, values = [], []
    for h, k in zip(states.split(BLOCK), teacher_states.split(BLOCK), strict=True):
        z, z_teacher = h @ weight.T, k @ teacher_weight.T
        log_sums.append(torch.stack([z.logsumexp(-1), z_teacher.logsumexp(-1)], -1))
        log_p, log_q = z - log_sums[-1][:, :1], z_teacher - log_sums[-1][:, 1:]
        values.append((log_p.exp() * (log_p - log_q)).sum(-1))
    log_sums, values = torch.cat(log_sums), torch.cat(values)

    def dz(rows: Tensor, columns: Tensor) -> Tensor:
        log_p = states[rows] @ weight[columns].T - log_sums[rows, :1]
        log_q = teacher_states[rows] @ teacher_weight[columns].T - log_sums[rows, 1:]
        return log_p.exp() * (log_p - log_q - values[rows, None]) / len(states)

    return _sampled(values.mean(), dz, {"hidden": states}, states, weight, None)


def _sampled(
    loss: Tensor,
    dz: Callable[[Tensor, Tensor], Tensor],
    hidden: dict[str, Tensor],  # leaf -> its rows, in the order of states
    states: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor | None,  # (N,)
    sample: int = SAMPLE,
) -> Truth:
    rows, gradients, start = {}, {}, 0
    everything, vocab = torch.arange(len(states)), torch.arange(len(weight))
    for name, part in hidden.items():
        rows[name] = _spread(len(part), sample)
        gradients[name] = dz(rows[name] + start, vocab) @ weight
        start += len(part)
    columns = _spread(len(weight))
    if labels is not None:  # columns that are some row's label differ from all others
        columns = torch.cat([columns, labels[_spread(len(labels))]]).unique()
    rows["weight"] = columns
    gradients["weight"] = dz(everything, columns).T @ states
    return Truth(float(loss), rows, gradients)


def _spread(count: int, sample: int = SAMPLE) -> Tensor:
    """Up to `sample` positions over 0..count - 1, both ends among them."""
    return torch.linspace(0, count - 1, min(sample, count)).round().long()
