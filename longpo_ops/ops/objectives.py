"""Preference objectives: a loss on summed log-probs, and its slopes by them.

For pair b with chosen answer sum S_w, rejected answer sums S_l (several are averaged unless said otherwise), references
R_w, R_l and answer lengths n_w, n_l, an objective is

    losses (B,) = f(S),        slopes c_k = d losses.sum() / d S_k

The slopes are what the sweep needs: they become the token weights of the answer rows. They are written out beside each
loss because the sweep runs inside a registered operator, where autograd records nothing; tests hold them to autograd.
All numbers are float64 and there are K = B + R of them.

A new objective is a frozen dataclass of floats with `terms`, and an entry in OBJECTIVES. Not covered: losses on single
tokens, which linear_logprobs is for.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kinds import check_flag, check_number, refusal


class PairLogps(NamedTuple):
    """Answer log-probs of B pairs with R rejected answers in all, float64."""

    chosen: Tensor  # (B,) sum over answer tokens
    rejected: Tensor  # (R,)
    ref_chosen: Tensor | None  # (B,)
    ref_rejected: Tensor | None  # (R,)
    chosen_lengths: Tensor  # (B,) answer tokens
    rejected_lengths: Tensor  # (R,)
    pair: Tensor  # (R,) int64: the pair each rejected answer belongs to

    def by_pair(self, values: Tensor) -> Tensor:
        """(R,) -> (B,): sums over each pair's rejected answers; a masked sum, so no atomics."""
        member = self.pair[None, :] == torch.arange(self.chosen.shape[0], device=self.pair.device)[:, None]
        return torch.where(member, values, 0.0).sum(1)

    def share(self) -> Tensor:
        """(R,): 1 / the number of rejected answers in the same pair."""
        return 1.0 / self.by_pair(torch.ones_like(self.rejected))[self.pair]

    def ratios(self) -> tuple[Tensor, Tensor]:
        """log(policy / reference) of the chosen (B,) and rejected (R,) answers."""
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected


class Terms(NamedTuple):
    losses: Tensor  # (B,)
    chosen_slopes: Tensor  # (B,)
    rejected_slopes: Tensor  # (R,)
    chosen_rewards: Tensor  # (B,) what the objective compares, as logged
    rejected_rewards: Tensor  # (R,)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Common to all: the weight of the preference term in the total loss (lambda of Eq. 14)."""

    name: ClassVar[str] = ""  # of a class in OBJECTIVES
    needs_reference: ClassVar[bool] = True
    separable: ClassVar[bool] = True  # each pair's loss depends on that pair alone
    one_rejected: ClassVar[bool] = False

    preference_weight: float = 1.0

    def __post_init__(self):
        for field in fields(self):
            check = check_flag if isinstance(field.default, bool) else check_number
            value = check(f"{type(self).__name__}: {field.name}", getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if getattr(self, "beta", 1.0) <= 0:
            raise ValueError(f"{type(self).__name__}(beta={self.beta}): expected beta > 0")
        for name in ("preference_weight", "nll_weight", "lam"):
            if getattr(self, name, 0.0) < 0:
                raise ValueError(f"{type(self).__name__}({name}={getattr(self, name)}): expected >= 0")

    def terms(self, p: PairLogps) -> Terms:
        """Losses, slopes and rewards. Subclasses define it."""
        raise TypeError(f"{type(self).__name__} defines no terms(): use one of {', '.join(OBJECTIVES)}")

    def parameters(self) -> list[float]:
        return [float(getattr(self, field.name)) for field in fields(self)]


def _pairwise(p: PairLogps, scores: tuple[Tensor, Tensor], loss: Tensor, slope: Tensor) -> Terms:
    """Terms of sum_r share_r * phi(d_r), d = a_w - a_l, from phi (R,), phi' (R,); scores are (a_w, a_l) as rewards."""
    share = p.share()
    rejected = -share * slope
    chosen_rewards, rejected_rewards = scores
    return Terms(p.by_pair(share * loss), -p.by_pair(rejected), rejected, chosen_rewards, rejected_rewards)


@dataclass(frozen=True, kw_only=True)
class DPO(Objective):
    """Sigmoid preference loss: -(1 - eps) log sg(beta d) - eps log sg(-beta d), d = (S_w - R_w) - (S_l - R_l)."""

    name: ClassVar[str] = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"DPO(label_smoothing={self.label_smoothing}): expected 0 <= label_smoothing < 0.5")

    def terms(self, p: PairLogps) -> Terms:
        chosen, rejected = (self.beta * r for r in p.ratios())
        x, eps = chosen[p.pair] - rejected, self.label_smoothing
        loss = -(1 - eps) * F.logsigmoid(x) - eps * F.logsigmoid(-x)
        slope = self.beta * (eps * torch.sigmoid(x) - (1 - eps) * torch.sigmoid(-x))
        return _pairwise(p, (chosen, rejected), loss, slope)


@dataclass(frozen=True, kw_only=True)
class LongPO(DPO):
    """Eq. 12-14: DPO's sigmoid with references that read the SHORT input, weighted 0.01 beside the NLL term.

    Whether a reference read the short or the long input is a matter of the numbers passed in, not of this object.
    """

    name: ClassVar[str] = "longpo"
    preference_weight: float = 0.01


@dataclass(frozen=True, kw_only=True)
class Hinge(Objective):
    """max(0, 1 - beta d)."""

    name: ClassVar[str] = "hinge"
    beta: float = 0.1

    def terms(self, p: PairLogps) -> Terms:
        chosen, rejected = (self.beta * r for r in p.ratios())
        x = 1 - (chosen[p.pair] - rejected)
        return _pairwise(p, (chosen, rejected), x.relu(), torch.where(x > 0, -self.beta, 0.0 * x))


@dataclass(frozen=True, kw_only=True)
class IPO(Objective):
    """(d - 1 / (2 beta))^2, on summed log-ratios as in the official LongPO code, or length-averaged (average=True)."""

    name: ClassVar[str] = "ipo"
    beta: float = 0.1
    average: bool = False

    def terms(self, p: PairLogps) -> Terms:
        chosen, rejected = p.ratios()
        n_w, n_l = (p.chosen_lengths, p.rejected_lengths) if self.average else (1.0, 1.0)
        chosen, rejected = chosen / n_w, rejected / n_l
        x = chosen[p.pair] - rejected - 1 / (2 * self.beta)
        t = _pairwise(p, (self.beta * chosen, self.beta * rejected), x.square(), 2 * x)
        return t._replace(chosen_slopes=t.chosen_slopes / n_w, rejected_slopes=t.rejected_slopes / n_l)


@dataclass(frozen=True, kw_only=True)
class KTOPair(Objective):
    """Half of [1 - sg(beta (rho_w - KL_l))] + [1 - sg(beta (KL_w - rho_l))] per pair, rho = S - R.

    KL_w and KL_l are means of rho over the pairs of this call, clamped at 0; gradients flow through them, as in the
    official code. The half makes the mean over pairs equal that code's mean over its 2B terms.
    """

    name: ClassVar[str] = "kto_pair"
    separable: ClassVar[bool] = False
    one_rejected: ClassVar[bool] = True
    beta: float = 0.1

    def terms(self, p: PairLogps) -> Terms:
        rho_w, rho_l = p.ratios()
        kl_w, kl_l = rho_w.mean().clamp(min=0), rho_l.mean().clamp(min=0)
        good, bad = torch.sigmoid(self.beta * (rho_w - kl_l)), torch.sigmoid(self.beta * (kl_w - rho_l))
        slope_good, slope_bad = (0.5 * self.beta * s * (1 - s) for s in (good, bad))
        through_kl_w = torch.where(rho_w.mean() >= 0, slope_bad.sum() / rho_w.shape[0], 0.0)
        through_kl_l = torch.where(rho_l.mean() >= 0, slope_good.sum() / rho_l.shape[0], 0.0)
        losses = 0.5 * (1 - good) + p.by_pair(0.5 * (1 - bad))
        return Terms(losses, -slope_good - through_kl_w, slope_bad + through_kl_l, self.beta * rho_w, self.beta * rho_l)


@dataclass(frozen=True, kw_only=True)
class SimPO(Objective):
    """-log sg(beta (S_w/n_w - S_l/n_l) - gamma): reference-free, length-normalised (arXiv 2405.14734)."""

    name: ClassVar[str] = "simpo"
    needs_reference: ClassVar[bool] = False
    beta: float = 2.0
    gamma: float = 1.0

    def terms(self, p: PairLogps) -> Terms:
        chosen, rejected = self.beta * p.chosen / p.chosen_lengths, self.beta * p.rejected / p.rejected_lengths
        x = chosen[p.pair] - rejected - self.gamma
        t = _pairwise(p, (chosen, rejected), -F.logsigmoid(x), -self.beta * torch.sigmoid(-x))
        return t._replace(
            chosen_slopes=t.chosen_slopes / p.chosen_lengths, rejected_slopes=t.rejected_slopes / p.rejected_lengths
        )


@dataclass(frozen=True, kw_only=True)
class LOGO(Objective):
    """-log sg(beta (S_w/n_w - mean_j S_lj/n_lj) - gamma) - nll_weight * S_w/n_w, several rejected (arXiv 2410.18533)."""

    name: ClassVar[str] = "logo"
    needs_reference: ClassVar[bool] = False
    beta: float = 10.0
    gamma: float = 3.0
    nll_weight: float = 0.1

    def terms(self, p: PairLogps) -> Terms:
        mean_w, mean_l, share = p.chosen / p.chosen_lengths, p.rejected / p.rejected_lengths, p.share()
        x = self.beta * (mean_w - p.by_pair(share * mean_l)) - self.gamma
        slope = -self.beta * torch.sigmoid(-x)
        return Terms(
            -F.logsigmoid(x) - self.nll_weight * mean_w,
            (slope - self.nll_weight) / p.chosen_lengths,
            -slope[p.pair] * share / p.rejected_lengths,
            self.beta * mean_w,
            self.beta * mean_l,
        )


@dataclass(frozen=True, kw_only=True)
class ORPO(Objective):
    """-S_w/n_w - lam * log sg(log odds_w - log odds_l), odds of p = exp(S/n) (arXiv 2403.07691).

    log(1 - p) goes through expm1, and S/n is clamped at -1e-7, where the odds stop being a number float32 log-probs carry.
    """

    name: ClassVar[str] = "orpo"
    needs_reference: ClassVar[bool] = False
    lam: float = 0.1

    def terms(self, p: PairLogps) -> Terms:
        mean_w, mean_l = p.chosen / p.chosen_lengths, p.rejected / p.rejected_lengths
        (odds_w, odds_slope_w), (odds_l, odds_slope_l) = _log_odds(mean_w), _log_odds(mean_l)
        x = odds_w[p.pair] - odds_l
        rewards = (self.lam * mean_w, self.lam * mean_l)
        t = _pairwise(p, rewards, -self.lam * F.logsigmoid(x), -self.lam * torch.sigmoid(-x))
        return t._replace(
            losses=t.losses - mean_w,
            chosen_slopes=(t.chosen_slopes * odds_slope_w - 1) / p.chosen_lengths,
            rejected_slopes=t.rejected_slopes * odds_slope_l / p.rejected_lengths,
        )


def _log_odds(mean: Tensor) -> tuple[Tensor, Tensor]:
    """m -> m - log(1 - e^m) and its slope 1 / (1 - e^m), with m <= -1e-7; the slope is 0 where clamped."""
    x = mean.clamp(max=-1e-7)
    one_minus_p = -torch.expm1(x)
    return x - one_minus_p.log(), torch.where(mean <= -1e-7, 1 / one_minus_p, 0.0)


OBJECTIVES: dict[str, type[Objective]] = {
    cls.name: cls for cls in (LongPO, DPO, Hinge, IPO, KTOPair, SimPO, LOGO, ORPO)
}


def resolve_objective(objective: Objective | str) -> Objective:
    """An objective, or the name of one for its defaults. Raises ValueError for an unknown name or type."""
    if isinstance(objective, str) and objective in OBJECTIVES:
        return OBJECTIVES[objective]()
    if isinstance(objective, Objective) and OBJECTIVES.get(objective.name) is type(objective):
        return objective
    raise refusal("objective", objective, f"one of {', '.join(OBJECTIVES)}, or an object of those classes")


def rebuild_objective(name: str, parameters: list[float]) -> Objective:
    """The inverse of (name, parameters()): how an objective passes through a registered operator."""
    cls = OBJECTIVES[name]
    given = zip(fields(cls), parameters, strict=True)
    return cls(**{f.name: bool(value) if isinstance(f.default, bool) else value for f, value in given})
