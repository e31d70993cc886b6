"""What a per-token objective is: a loss of each row by its log-prob, and the one that ships, the clipped policy gradient.

    L = (1 / D) sum_t w_t phi(logp_t, numbers of row t),        g_t = dL / d logp_t = (w_t / D) phi'(logp_t)

A row's g_t needs that row alone, so a chunk of rows is scored, decided and swept in one visit: 6 N H V (tokens.py). phi is one
method in plain PyTorch on n log-probs and n of each number, float64; its slopes come from autograd inside the operator:

    @dataclass(frozen=True, kw_only=True)
    class Focal(TokenObjective):
        power: float = 2.0

        def losses(self, logps: Tensor) -> Tensor:  # (n,)
            return -((1 - logps.exp()) ** self.power) * logps

It is registered by name, and examined when it is made, as objectives of answers are (objective.py). Not covered: losses in
which rows see each other, as sums over an answer: objective.py.

Tests: tests/ops/test_tokens.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .recording import derivative, recorded
from .registered import Registered


@dataclass(frozen=True, kw_only=True)
class TokenObjective(Registered):
    """Subclasses define losses(self, logps (n,), **numbers (n,) each) -> (n,) float64.

    takes, may_take   names of the numbers of a row that it needs, and of those that it also takes
    """

    takes: ClassVar[tuple[str, ...]] = ()
    may_take: ClassVar[tuple[str, ...]] = ()

    def examine(self) -> None:
        """Raises ValueError for losses that are not finite, of another shape, that ignore the log-probs, or see other rows."""
        for names in {self.takes, (*self.takes, *self.may_take)}:
            logps = torch.linspace(-6, -0.01, 9, dtype=torch.float64)
            numbers = {name: torch.cos((k + 2) * logps) - (1 if "logps" in name else 0) for k, name in enumerate(names)}
            losses, slopes = decide(self, logps, numbers)
            if losses.shape != logps.shape:
                raise self.wrong(f"its losses of 9 rows have the shape {tuple(losses.shape)}", "(n,), one per row")
            for name, value in (("losses", losses), ("slopes", slopes)):
                if not bool(value.isfinite().all()):
                    raise self.wrong(
                        f"its {name} are {value.tolist()}", f"finite numbers for log-probs {logps.tolist()}"
                    )
            for t in range(9):
                alone = decide(self, logps[t : t + 1], {name: x[t : t + 1] for name, x in numbers.items()})
                if not all(
                    torch.allclose(a, b[t : t + 1], rtol=1e-9) for a, b in zip(alone, (losses, slopes), strict=True)
                ):
                    raise self.wrong(f"its loss of row {t} changes with other rows", "a loss of each row alone")
            if not bool(slopes.any()):
                raise self.wrong(
                    "its losses do not depend on the log-probs", "losses of logps, without detach or item()"
                )


def decide(objective: TokenObjective, logps: Tensor, numbers: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """-> losses and slopes (n,) float64; NaN where a log-prob or a loss is none."""
    with recorded(logps.device):
        given = {name: value.double().clone() for name, value in numbers.items()}  # inference tensors cannot be saved
        losses, slopes = derivative(lambda x: objective.losses(x, **given), logps.double())
    if losses.shape != logps.shape:
        return losses, slopes
    none = logps.isnan() | losses.isnan()
    return losses.masked_fill(none, torch.nan), slopes.masked_fill(none, torch.nan)


@dataclass(frozen=True, kw_only=True)
class ClippedPolicy(TokenObjective):
    """-min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A) + beta (e^q - q - 1), r = exp(logp - old), q = ref - logp.

    PPO's clipped policy gradient as GRPO has it (arXiv 1707.06347, 2402.03300), per token, with the estimate k3 of the KL to a
    reference. advantages: A. old_logps: of the policy that sampled; without them r = 1 with its gradient, as in the first
    step after sampling. delta > 0: r is at most delta in the unclipped part, for A < 0 (arXiv 2505.07291); 0 is none.
    """

    name: ClassVar[str] = "clipped_policy"
    takes: ClassVar[tuple[str, ...]] = ("advantages",)
    may_take: ClassVar[tuple[str, ...]] = ("old_logps", "ref_logps")
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float = 0.0
    beta: float = 0.0

    def check(self) -> None:
        for name in ("epsilon_low", "epsilon_high", "delta", "beta"):
            if getattr(self, name) < 0:
                raise self.refusal(name, ">= 0")
        if self.epsilon_low > 1:
            raise self.refusal("epsilon_low", "<= 1")

    def losses(
        self, logps: Tensor, advantages: Tensor, old_logps: Tensor | None = None, ref_logps: Tensor | None = None
    ):
        ratio = torch.exp(logps - (logps.detach() if old_logps is None else old_logps))
        clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        unclipped = ratio.clamp(max=self.delta) if self.delta else ratio
        losses = -torch.minimum(unclipped * advantages, clipped * advantages)
        if ref_logps is None:
            return losses
        q = ref_logps - logps
        return losses + self.beta * (torch.exp(q) - q - 1)
