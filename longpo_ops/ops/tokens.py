"""Per-token losses straight from hidden states, scored, decided and swept in one visit: no logits, 6 N H V.

    L = (1 / D) sum_t w_t phi(logp_t, numbers of row t)

hidden (N, H), weight (V, H)  ->  L, logp (N,), and with them dh (N, H), dW (V, H). Scratch: workspace_bytes, for any N. float16
keeps its gradients near 1 by one power of two, for which all rows are scored first: 8 N H V. Not covered: rows on several ranks
(Shards): rows need no others, so give each rank its own with reduction="sum".

Tests: tests/ops/test_tokens.py.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..kinds import check_choice, check_flag, check_object, check_tensor
from .batch import check_rows_labels, token_stretches
from .checks import (
    check_backend,
    check_head,
    check_ignore_index,
    check_labels,
    check_numbers,
    check_rows,
    check_workspace,
    compute_dtype,
    logit_map,
)
from .operators import backward, deliver, make_head, setup
from .products import result_dtype
from .registered import REGISTERED, rebuild
from .rows import Chunk, Stretch, to_device, windows
from .sweep import HeadSweep, Options, float16_scale
from .tiles import Beside
from .tiles import entropies as entropies_of
from .token_objective import ClippedPolicy, TokenObjective, decide


class TokenOutput(NamedTuple):
    """loss carries the gradient, the rest is detached; float32 (float64 for float64 inputs)."""

    loss: Tensor  # ()
    logps: Tensor  # (N,) of the labels; 0 for rows without a label or with a row weight of 0
    entropies: Tensor | None = None  # (N,) in nats, 0 for the same rows; None where not asked for


def fused_token_loss(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,) int64
    *,
    objective: TokenObjective,
    numbers: dict[str, Tensor] | None = None,  # (N,) each
    row_weights: Tensor | None = None,  # (N,)
    reduction: str = "mean",
    entropies: bool = False,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    workspace_bytes: int | None = None,
    sparse_hidden_gradient: bool = False,
    backend: str | None = None,
) -> TokenOutput:
    """A loss of each row's log-prob, with gradients in hidden states, weight and bias. Row t predicts labels[t].

    objective: a TokenObjective, one's own or ClippedPolicy.  numbers: of each row, by name, as the objective takes them;
        constants: a gradient does not reach them.
    row_weights: default 1. "sum" is sum_t w_t phi_t, "mean" that over the sum of the weights of labelled rows. Rows without
        weight or label are never read. Weights and labels on the host cost no synchronisation.
    entropies: of the rows' distributions, too, in the same visit; for reports, a gradient does not reach them.
    Everything else as in linear_cross_entropy. Raises ValueError naming the argument, what came and what was expected.
    """
    check_head(hidden, weight, bias)
    check_rows(hidden)
    n = hidden.shape[0]
    labels = check_labels(labels, (n,))
    check_choice("reduction", reduction, ("mean", "sum"))
    check_object("objective", objective, TokenObjective, "a TokenObjective")
    if REGISTERED.get(objective.name) is not type(objective):
        raise ValueError(
            f"objective={objective!r}: another class is registered as {objective.name!r}; make the object anew"
        )
    names = _check_names(objective, numbers or {})
    for name in names:
        check_tensor(f"numbers[{name!r}]", numbers[name], shape=(n,))
    check_numbers(row_weights, (n,), "row_weights")
    for name, tensor in {"row_weights": row_weights, **(numbers or {})}.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, and none would reach it: expected {name}.detach()")
    ignore_index, backend = check_ignore_index(ignore_index), check_backend(backend)
    dtype = compute_dtype(hidden, weight)
    options = (*logit_map(scale, softcap, temperature), check_workspace(workspace_bytes, weight, dtype), dtype)
    weights = torch.ones(1, 1, dtype=torch.float64) if row_weights is None else row_weights.detach().cpu()[None]
    total = torch.ones((), dtype=torch.float64)
    if reduction == "mean":
        total = torch.where(labels != ignore_index, weights[0], 0.0).sum(dtype=torch.float64)
    grad = torch.is_grad_enabled()
    need = [grad and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    need.append(check_flag("sparse_hidden_gradient", sparse_hidden_gradient))
    given, asked = [numbers[name].detach() for name in names], check_flag("entropies", entropies)
    objective_of_op = ",".join(names), objective.name, objective.parameters(), asked
    loss, logps, found, *_ = token_sweep_op(
        [hidden], weight, bias, labels, weights, total, given, *objective_of_op, ignore_index, *options, need, backend
    )
    return TokenOutput(loss, logps.detach(), found.detach() if asked else None)


def fused_policy_loss(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,) int64
    *,
    advantages: Tensor,  # (N,)
    old_logps: Tensor | None = None,  # (N,)
    ref_logps: Tensor | None = None,  # (N,)
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float = 0.0,
    beta: float = 0.0,
    **options,
) -> TokenOutput:
    """The clipped policy gradient of GRPO and its relatives, per token, from hidden states: ClippedPolicy's loss.

    advantages: of each token; one of an answer is repeated over its tokens.  old_logps: of the policy that sampled, or None
        in the first step after sampling.  ref_logps: of the reference, with beta > 0 and only then.
    labels: ignore_index for prompts, padding, tool output.
    options: of fused_token_loss. Normalisation is by row_weights, w, with B answers of T_b tokens:
        GRPO (a mean over answers of means)   w = 1 / T_b, reduction="mean"
        BNPO, DAPO (a mean over tokens)       no weights, reduction="mean"; over several batches w = 1 / all tokens, "sum"
        Dr. GRPO                              w = 1 / (B max_completion_length), reduction="sum"
    Raises ValueError as fused_token_loss does. Source: arXiv 1707.06347, 2402.03300. Not covered: ratios of whole answers.
    """
    if (beta > 0) != (ref_logps is not None):
        raise ValueError(
            f"beta={beta}, ref_logps {'missing' if ref_logps is None else 'given'}: expected beta > 0 and ref_logps, or neither"
        )
    objective = ClippedPolicy(epsilon_low=epsilon_low, epsilon_high=epsilon_high, delta=delta, beta=beta)
    given = {"advantages": advantages, "old_logps": old_logps, "ref_logps": ref_logps}
    numbers = {name: value for name, value in given.items() if value is not None}
    return fused_token_loss(hidden, weight, labels, objective=objective, numbers=numbers, **options)


def _check_names(objective: TokenObjective, numbers: dict[str, Tensor]) -> list[str]:
    """-> the names, in the objective's order. Raises ValueError for one that is missing or not taken."""
    known = (*objective.takes, *objective.may_take)
    missing, unknown = set(objective.takes) - set(numbers), set(numbers) - set(known)
    if missing or unknown:
        also = f", and may take {', '.join(objective.may_take)}" if objective.may_take else ""
        raise ValueError(
            f"numbers: {', '.join(sorted(numbers)) or 'none'} came; objective {objective.name} takes "
            f"{', '.join(objective.takes) or 'none'}{also}"
        )
    return [name for name in known if name in numbers]


class _TokenSweep:
    """told: (N,) log-probs and, where they are asked for, entropies: filled in."""

    def __init__(
        self, head: HeadSweep, objective: TokenObjective, numbers: dict[str, Tensor], total: Tensor, told: list[Tensor]
    ):
        self.head, self.objective, self.numbers, self.told = head, objective, numbers, told
        self.beside = Beside(mean=len(told) > 1)
        total = to_device(total, head.device, torch.float64)
        self.factor = torch.where(total != 0, 1 / total, 0.0)
        self.loss = torch.zeros((), device=head.device, dtype=torch.float64)
        self.grad_scale = torch.ones((), device=head.device)

    def run(self, stretches: list[Stretch]) -> None:
        places = windows(stretches)
        visit = self._visit if self.head.options.need_any else self._score
        if self.head.options.need_any and self.head.options.compute_dtype == torch.float16:
            slopes = torch.zeros_like(self.told[0], dtype=torch.float64)
            for chunk in self.head.chunks(places, Stretch.nll_mask):
                chunk.write(self._score(chunk), slopes)
            self.grad_scale = float16_scale(slopes.abs().amax() if slopes.shape[0] else slopes.sum())
            visit = functools.partial(self._push, slopes)
        for chunk in self.head.chunks(places, Stretch.nll_mask):
            visit(chunk)

    def _score(self, chunk: Chunk) -> Tensor:
        return self._decide(chunk, *self.head.stats(chunk, self.beside))

    def _visit(self, chunk: Chunk) -> None:
        logps, held = self.head.score(chunk, self.beside)
        self.head.push(held, self._decide(chunk, logps, held.stats).to(self.head.dtype))

    def _push(self, slopes: Tensor, chunk: Chunk) -> None:
        g = chunk.read(slopes, self.head.device) * self.grad_scale
        self.head.visit(chunk, g.to(self.head.dtype))

    def _decide(self, chunk: Chunk, logps: Tensor, stats: Tensor) -> Tensor:
        """-> g (n,) float64; the chunk's share of the loss is added, what rows tell is kept."""
        for row, kept in zip((logps, entropies_of(stats) if self.beside.mean else None), self.told, strict=False):
            chunk.write(row, kept)
        numbers = {name: chunk.read(x, self.head.device) for name, x in self.numbers.items()}
        losses, slopes = decide(self.objective, logps, numbers)
        weights = chunk.nll_weights(self.head.device, torch.float64) * self.factor
        self.loss += (weights * losses).sum()
        return weights * slopes


@torch.library.custom_op("longpo_ops::token_sweep", mutates_args=())
def token_sweep_op(
    hiddens: list[Tensor],  # one, (N, H)
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor,  # (1, N) or (1, 1), host
    total: Tensor,  # () what weights are divided by
    numbers: list[Tensor],  # (N,) each
    names: str,  # of the numbers, with commas
    objective: str,
    parameters: list[float],
    asked: bool,  # for entropies
    ignore_index: int,
    scale: float,
    softcap: float,
    workspace_bytes: int,
    compute_dtype: torch.dtype,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    (hidden,) = hiddens
    options = Options(scale, softcap, workspace_bytes, compute_dtype, *need)
    dh = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if need[0] else None
    dtype = result_dtype(weight.dtype)
    with torch.autocast(weight.device.type, enabled=False), torch.no_grad():
        stretches = token_stretches(hidden, dh, labels, weights.cpu(), ignore_index)
        check_rows_labels(stretches, weight.shape[0])
        head = make_head(weight, bias, options, backend, hidden.shape[0])
        logps = torch.zeros(hidden.shape[0], dtype=dtype, device=hidden.device)
        told = [logps, torch.zeros_like(logps)] if asked else [logps]
        named = dict(zip(names.split(",") if names else [], numbers, strict=True))
        sweep = _TokenSweep(head, rebuild(objective, parameters), named, total, told)
        sweep.run(stretches)
    dw, dw_scale = deliver(head.weight_gradient(), weight)
    db, db_scale = deliver(head.db, bias if need[2] else weight)
    scales = sweep.grad_scale * torch.stack([torch.ones_like(dw_scale), dw_scale, db_scale])
    return (
        sweep.loss.to(dtype),
        logps,
        told[1] if asked else logps.new_empty(0),
        [hidden.new_empty(0) if dh is None else dh],
        dw,
        db,
        scales,
    )


@token_sweep_op.register_fake
def _(hiddens, weight, bias, *rest):
    (hidden,), need = hiddens, rest[-2]
    dtype = result_dtype(weight.dtype)
    return (
        weight.new_empty((), dtype=dtype),
        weight.new_empty(hidden.shape[0], dtype=dtype),
        weight.new_empty(hidden.shape[0] if rest[8] else 0, dtype=dtype),
        [hidden.new_empty(hidden.shape if need[0] else 0)],
        weight.new_empty(weight.shape if need[1] else 0),
        weight.new_empty(0) if not need[2] else bias.new_empty(bias.shape),
        weight.new_empty(3, dtype=torch.float32),
    )


token_sweep_op.register_autograd(backward, setup_context=setup)
