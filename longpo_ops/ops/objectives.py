"""The preference objectives that people use: each a loss on summed log-probs, with the paper it is from.

S_w, S_l: summed log-probs of a chosen and a rejected answer; R_w, R_l: the reference's; n_w, n_l: answer tokens;
rho = S - R; d = rho_w - rho_l; sg the sigmoid. Losses of several rejected answers are averaged, unless said otherwise.
docs/objectives.md is the table for readers; objective.py says how to write one's own.

Not covered: DPO's f-divergences, and losses that keep a state from batch to batch (running means of rewards).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kinds import refusal
from .objective import CHOSEN, REJECTED, TRIPLE, Answers, Objective
from .registered import REGISTERED


def _smoothed(x: Tensor, eps: float) -> Tensor:
    """-log sg(x), where the label is wrong with probability eps."""
    return -(1 - eps) * F.logsigmoid(x) - eps * F.logsigmoid(-x)


# -- with a reference ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DPO(Objective):
    """-(1 - eps) log sg(beta d) - eps log sg(-beta d), eps = label_smoothing (arXiv 2305.18290).

    average=True: each rho is divided by its answer's tokens first (length-averaged DPO, arXiv 2411.15124).
    """

    name: ClassVar[str] = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    average: bool = False

    def losses(self, answers: Answers) -> Tensor:
        return answers.mean_over_rejected(_smoothed(self._margins(answers), self.label_smoothing))

    def slopes(self, answers: Answers) -> Tensor:
        x, eps = self._margins(answers), self.label_smoothing
        slopes = answers.pair_slopes(self.beta * (eps * torch.sigmoid(x) - (1 - eps) * torch.sigmoid(-x)))
        return slopes / answers.lengths if self.average else slopes

    def rewards(self, answers: Answers) -> Tensor:
        return self.beta * (answers.log_ratios / answers.lengths if self.average else answers.log_ratios)

    def _margins(self, answers: Answers) -> Tensor:
        chosen, rejected = answers.pairs(self.rewards(answers))
        return chosen - rejected


@dataclass(frozen=True, kw_only=True)
class LongPO(DPO):
    """Eq. 12-14: DPO's sigmoid with references that read the SHORT input, weighted 0.01 beside the NLL term.

    Whether a reference read the short or the long input is a matter of the numbers passed in, not of this object.
    """

    name: ClassVar[str] = "longpo"
    reads: ClassVar[str] = "short"
    with_nll: ClassVar[bool] = True
    preference_weight: float = 0.01


@dataclass(frozen=True, kw_only=True)
class Robust(Objective):
    """[-(1 - eps) log sg(beta d) + eps log sg(-beta d)] / (1 - 2 eps): unbiased where a share eps of labels is wrong
    (arXiv 2403.00409)."""

    name: ClassVar[str] = "robust"
    beta: float = 0.1
    label_smoothing: float = 0.1

    def losses(self, answers: Answers) -> Tensor:
        chosen, rejected = answers.pairs(self.beta * answers.log_ratios)
        x, eps = chosen - rejected, self.label_smoothing
        return answers.mean_over_rejected((-(1 - eps) * F.logsigmoid(x) + eps * F.logsigmoid(-x)) / (1 - 2 * eps))


@dataclass(frozen=True, kw_only=True)
class Hinge(Objective):
    """max(0, 1 - beta d) (SLiC, arXiv 2305.10425, as DPO's relatives write it)."""

    name: ClassVar[str] = "hinge"
    beta: float = 0.1

    def losses(self, answers: Answers) -> Tensor:
        chosen, rejected = answers.pairs(self.beta * answers.log_ratios)
        return answers.mean_over_rejected((1 - (chosen - rejected)).relu())


@dataclass(frozen=True, kw_only=True)
class IPO(Objective):
    """(d - 1 / (2 beta))^2, on summed log-ratios as in the official LongPO code, or length-averaged (average=True)
    (arXiv 2310.12036)."""

    name: ClassVar[str] = "ipo"
    beta: float = 0.1
    average: bool = False

    def losses(self, answers: Answers) -> Tensor:
        chosen, rejected = answers.pairs(self._ratios(answers))
        return answers.mean_over_rejected((chosen - rejected - 1 / (2 * self.beta)).square())

    def rewards(self, answers: Answers) -> Tensor:
        return self.beta * self._ratios(answers)

    def _ratios(self, answers: Answers) -> Tensor:
        return answers.log_ratios / answers.lengths if self.average else answers.log_ratios


@dataclass(frozen=True, kw_only=True)
class EXOPair(Objective):
    """KL(q || p) of q = (sg(beta d), sg(-beta d)) and p = (1 - eps, eps), eps = label_smoothing > 0 (arXiv 2402.00856,
    Eq. 16)."""

    name: ClassVar[str] = "exo_pair"
    beta: float = 0.1
    label_smoothing: float = 1e-3

    def check(self) -> None:
        super().check()
        if self.label_smoothing == 0:
            raise self.refusal("label_smoothing", "0 < label_smoothing < 0.5, as the loss has its logarithm")

    def losses(self, answers: Answers) -> Tensor:
        chosen, rejected = answers.pairs(self.beta * answers.log_ratios)
        x, eps = chosen - rejected, self.label_smoothing
        better = torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-eps))
        return answers.mean_over_rejected(better + torch.sigmoid(-x) * (F.logsigmoid(-x) - math.log(eps)))


@dataclass(frozen=True, kw_only=True)
class NCAPair(Objective):
    """-log sg(beta rho_w) - (log sg(-beta rho_w) + log sg(-beta rho_l)) / 2 (arXiv 2402.05369)."""

    name: ClassVar[str] = "nca_pair"
    beta: float = 0.1

    def losses(self, answers: Answers) -> Tensor:
        chosen, rejected = answers.pairs(self.beta * answers.log_ratios)
        return answers.mean_over_rejected(
            -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))
        )


@dataclass(frozen=True, kw_only=True)
class BCOPair(Objective):
    """-log sg(beta rho_w) - log sg(-beta rho_l): binary classification of pairs, without a running mean (arXiv 2404.04656)."""

    name: ClassVar[str] = "bco_pair"
    beta: float = 0.1

    def losses(self, answers: Answers) -> Tensor:
        chosen, rejected = answers.pairs(self.beta * answers.log_ratios)
        return answers.mean_over_rejected(-F.logsigmoid(chosen) - F.logsigmoid(-rejected))


@dataclass(frozen=True, kw_only=True)
class SPPOHard(Objective):
    """(rho_w - 1 / (2 beta))^2 + (rho_l + 1 / (2 beta))^2: wins are certain (arXiv 2405.00675, Eq. 4.7)."""

    name: ClassVar[str] = "sppo_hard"
    beta: float = 0.1

    def losses(self, answers: Answers) -> Tensor:
        chosen, rejected = answers.pairs(answers.log_ratios)
        return answers.mean_over_rejected((chosen - 0.5 / self.beta).square() + (rejected + 0.5 / self.beta).square())


@dataclass(frozen=True, kw_only=True)
class APOZero(Objective):
    """1 - sg(beta rho_w) + sg(beta rho_l): the chosen up, the rejected down (arXiv 2408.06266, Eq. 7)."""

    name: ClassVar[str] = "apo_zero"
    beta: float = 0.1

    def losses(self, answers: Answers) -> Tensor:
        chosen, rejected = answers.pairs(self.beta * answers.log_ratios)
        return answers.mean_over_rejected(torch.sigmoid(-chosen) + torch.sigmoid(rejected))


@dataclass(frozen=True, kw_only=True)
class APODown(Objective):
    """sg(beta rho_w) + 1 - sg(beta d): both down, the rejected more (arXiv 2408.06266, Eq. 8)."""

    name: ClassVar[str] = "apo_down"
    beta: float = 0.1

    def losses(self, answers: Answers) -> Tensor:
        chosen, rejected = answers.pairs(self.beta * answers.log_ratios)
        return answers.mean_over_rejected(torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen))


@dataclass(frozen=True, kw_only=True)
class DiscoPOP(Objective):
    """(1 - m) (-log sg(x)) + m e^-x with x = beta d and m = sg(x / tau) (arXiv 2406.08414, Eq. 5)."""

    name: ClassVar[str] = "discopop"
    beta: float = 0.1
    tau: float = 0.05

    def check(self) -> None:
        super().check()
        if self.tau <= 0:
            raise self.refusal("tau", "tau > 0")

    def losses(self, answers: Answers) -> Tensor:
        chosen, rejected = answers.pairs(self.beta * answers.log_ratios)
        x = chosen - rejected
        share = torch.sigmoid(x / self.tau)
        return answers.mean_over_rejected(-F.logsigmoid(x) * (1 - share) + torch.exp(-x) * share)


@dataclass(frozen=True, kw_only=True)
class KTO(Objective):
    """Answers alone: desirable_weight [1 - sg(beta (rho - kl))] of a chosen one, undesirable_weight [1 - sg(beta (kl - rho))]
    of a rejected one (arXiv 2402.01306, Eq. 8).

    kl: the estimate z_0 >= 0 of the batch, which the caller makes. One on the device, which is not to be waited for, is added
    to ref_logps instead; logged rewards are then less by beta * kl.
    """

    name: ClassVar[str] = "kto"
    forms: ClassVar[tuple[tuple[str, ...], ...]] = (("chosen",), ("rejected",))
    beta: float = 0.1
    kl: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def check(self) -> None:
        super().check()
        for name in ("kl", "desirable_weight", "undesirable_weight"):
            if getattr(self, name) < 0:
                raise self.refusal(name, ">= 0")

    def losses(self, answers: Answers) -> Tensor:
        x, wanted = self.beta * (answers.log_ratios - self.kl), answers.role == CHOSEN
        good, bad = self.desirable_weight * torch.sigmoid(-x), self.undesirable_weight * torch.sigmoid(x)
        return answers.sums(torch.where(wanted, good, bad))


@dataclass(frozen=True, kw_only=True)
class KTOPair(Objective):
    """Half of [1 - sg(beta (rho_w - KL_l))] + [1 - sg(beta (KL_w - rho_l))] per pair.

    KL_w and KL_l are means of rho over the pairs of this call, clamped at 0; gradients flow through them, as in the
    official LongPO code. The half makes the mean over pairs equal that code's mean over its 2B terms.
    """

    name: ClassVar[str] = "kto_pair"
    separable: ClassVar[bool] = False
    one_rejected: ClassVar[bool] = True
    beta: float = 0.1

    def losses(self, answers: Answers) -> Tensor:
        chosen, rejected = answers.pairs(answers.log_ratios)
        kl_chosen, kl_rejected = (ratios.mean().clamp(min=0) for ratios in (chosen, rejected))
        good = torch.sigmoid(self.beta * (kl_rejected - chosen))
        return 0.5 * (good + torch.sigmoid(self.beta * (rejected - kl_chosen)))


@dataclass(frozen=True, kw_only=True)
class AOT(Objective):
    """DPO on sorted margins: d_(i) = sorted(S_w - S_l)_i - sorted(R_w - R_l)_i (arXiv 2406.05882), or with paired=False
    sorted(rho_w)_i - sorted(rho_l)_i. Over the pairs of a call."""

    name: ClassVar[str] = "aot"
    separable: ClassVar[bool] = False
    one_rejected: ClassVar[bool] = True
    beta: float = 0.1
    label_smoothing: float = 0.0
    paired: bool = True

    def losses(self, answers: Answers) -> Tensor:
        if self.paired:
            (w, l), (ref_w, ref_l) = answers.pairs(answers.logps), answers.pairs(answers.ref_logps)
            a, b = w - l, ref_w - ref_l
        else:
            a, b = answers.pairs(answers.log_ratios)
        return _smoothed(self.beta * (a.sort().values - b.sort().values), self.label_smoothing)


# -- without a reference ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CPO(Objective):
    """-(1 - eps) log sg(x) - eps log sg(-x) - nll_weight S_w/n_w, x = beta (S_w - S_l) (arXiv 2401.08417)."""

    name: ClassVar[str] = "cpo"
    needs_reference: ClassVar[bool] = False
    beta: float = 0.1
    label_smoothing: float = 0.0
    nll_weight: float = 1.0

    def losses(self, answers: Answers) -> Tensor:
        chosen, rejected = answers.pairs(self.beta * answers.logps)
        preference = answers.mean_over_rejected(_smoothed(chosen - rejected, self.label_smoothing))
        return preference - self.nll_weight * answers.chosen(answers.logps / answers.lengths)


@dataclass(frozen=True, kw_only=True)
class _MeanRewards(Objective):
    """What compares beta S/n, and logs it."""

    needs_reference: ClassVar[bool] = False

    def rewards(self, answers: Answers) -> Tensor:
        return self.beta * answers.logps / answers.lengths


@dataclass(frozen=True, kw_only=True)
class SimPO(_MeanRewards):
    """-(1 - eps) log sg(x) - eps log sg(-x), x = beta (S_w/n_w - S_l/n_l) - gamma (arXiv 2405.14734)."""

    name: ClassVar[str] = "simpo"
    beta: float = 2.0
    gamma: float = 1.0
    label_smoothing: float = 0.0

    def losses(self, answers: Answers) -> Tensor:
        chosen, rejected = answers.pairs(self.rewards(answers))
        return answers.mean_over_rejected(_smoothed(chosen - rejected - self.gamma, self.label_smoothing))


@dataclass(frozen=True, kw_only=True)
class LOGO(_MeanRewards):
    """-log sg(beta (S_w/n_w - mean_j S_lj/n_lj) - gamma) - nll_weight * S_w/n_w, several rejected (arXiv 2410.18533)."""

    name: ClassVar[str] = "logo"
    beta: float = 10.0
    gamma: float = 3.0
    nll_weight: float = 0.1

    def losses(self, answers: Answers) -> Tensor:
        means = answers.logps / answers.lengths
        chosen, rejected = answers.chosen(means), answers.mean_over_rejected(means[answers.places[REJECTED]])
        return -F.logsigmoid(self.beta * (chosen - rejected) - self.gamma) - self.nll_weight * chosen


@dataclass(frozen=True, kw_only=True)
class ORPO(Objective):
    """-nll_weight S_w/n_w - lam * log sg(log odds_w - log odds_l), odds of p = exp(S/n) (arXiv 2403.07691).

    log(1 - p) goes through expm1, and S/n is clamped at -1e-7, where the odds stop being a number float32 log-probs carry.
    nll_weight=0 with nll_labels of the whole chosen sequence is TRL's form, whose NLL counts the prompt, too.
    """

    name: ClassVar[str] = "orpo"
    needs_reference: ClassVar[bool] = False
    lam: float = 0.1
    nll_weight: float = 1.0

    def losses(self, answers: Answers) -> Tensor:
        chosen, rejected = answers.pairs(self.log_odds(answers))
        preference = -self.lam * answers.mean_over_rejected(F.logsigmoid(chosen - rejected))
        return preference - self.nll_weight * answers.chosen(answers.logps / answers.lengths)

    def log_odds(self, answers: Answers) -> Tensor:
        """(K,)."""
        capped = (answers.logps / answers.lengths).clamp(max=-1e-7)
        return capped - torch.log(-torch.expm1(capped))

    def rewards(self, answers: Answers) -> Tensor:
        return self.lam * answers.logps / answers.lengths


# -- on a short input, the chosen answer on a long one, too: the anchor -----------------------------------------------


def _distances(answers: Answers, rewards: Tensor) -> Tensor:
    """(K,) -> (G,): |r(x_short, y_w) - r(x_long, y_w)|; its slope is 0 where they are equal."""
    return (answers.chosen(rewards) - answers.anchors(rewards)).abs()


@dataclass(frozen=True, kw_only=True)
class SoLoDPO(DPO):
    """DPO on the short input + alpha |r(x_short, y_w) - r(x_long, y_w)|, r = beta rho: SoLoPO, chosen-only as published
    (arXiv 2505.11166). The reference reads both inputs.

    alpha: 3, the paper's for SoLo-DPO of a model of 7B.
    """

    name: ClassVar[str] = "solopo"
    forms: ClassVar[tuple[tuple[str, ...], ...]] = (TRIPLE,)
    alpha: float = 3.0

    def losses(self, answers: Answers) -> Tensor:
        return super().losses(answers) + self.alpha * _distances(answers, self.rewards(answers))


@dataclass(frozen=True, kw_only=True)
class SoLoSimPO(SimPO):
    """SimPO on the short input + alpha |r(x_short, y_w) - r(x_long, y_w)|, r = beta S/n (arXiv 2505.11166)."""

    name: ClassVar[str] = "solopo_simpo"
    forms: ClassVar[tuple[tuple[str, ...], ...]] = (TRIPLE,)
    alpha: float = 1.0

    def losses(self, answers: Answers) -> Tensor:
        return super().losses(answers) + self.alpha * _distances(answers, self.rewards(answers))


@dataclass(frozen=True, kw_only=True)
class SoLoORPO(ORPO):
    """ORPO on the short input + alpha |r(x_short, y_w) - r(x_long, y_w)|, r = log odds (arXiv 2505.11166)."""

    name: ClassVar[str] = "solopo_orpo"
    forms: ClassVar[tuple[tuple[str, ...], ...]] = (TRIPLE,)
    alpha: float = 1.0

    def losses(self, answers: Answers) -> Tensor:
        return super().losses(answers) + self.alpha * _distances(answers, self.log_odds(answers))


OBJECTIVES: dict[str, type[Objective]] = {
    cls.name: cls
    for cls in (
        *(
            LongPO,
            DPO,
            Robust,
            Hinge,
            IPO,
            EXOPair,
            NCAPair,
            BCOPair,
            SPPOHard,
            APOZero,
            APODown,
            DiscoPOP,
            KTO,
            KTOPair,
        ),
        *(AOT, CPO, SimPO, LOGO, ORPO, SoLoDPO, SoLoSimPO, SoLoORPO),
    )
}


def resolve_objective(objective: Objective | str) -> Objective:
    """An objective, or the name of one for its defaults. Raises ValueError for an unknown name or type."""
    cls = REGISTERED.get(objective if isinstance(objective, str) else getattr(objective, "name", None))
    if isinstance(objective, str) and cls is not None and issubclass(cls, Objective):
        return cls()
    if isinstance(objective, Objective) and cls is type(objective):
        return objective
    raise refusal("objective", objective, f"one of {', '.join(OBJECTIVES)}, or an object of an Objective class")


def find_objective(name: str) -> type[Objective]:
    """The class of a registered name, or of module:Class, which is imported. Raises ValueError."""
    module, _, path = name.partition(":")
    if name not in REGISTERED and path:
        try:
            found = functools.reduce(getattr, path.split("."), import_module(module))
        except (ImportError, AttributeError) as error:
            raise ValueError(f"objective={name!r}: {error}; expected module:Class that Python can import") from error
        if not isinstance(found, type) or not issubclass(found, Objective):
            raise ValueError(f"objective={name!r}: expected a subclass of longpo_ops.Objective")
        return found
    if name not in REGISTERED:
        raise refusal("objective", name, f"one of {', '.join(OBJECTIVES)}, or module:Class")
    return REGISTERED[name]
