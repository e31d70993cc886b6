"""TRL's loss types as our objectives: one by its name, several by their weighted sum, also under an f-divergence.

    f = sum_m w_m f_m(S)                    f_m the objective of loss type m (ops/objectives.py), w_m of loss_weights
    sft: f = -sum_b S_wb / sum_b n_wb       the mean NLL of the chosen answers' tokens of a batch, the same for each pair
    f-divergence (arXiv 2309.16240): rho = S - R becomes f'(e^rho) wherever chosen and rejected are compared,
        forward_kl        1 - e^-rho
        js_divergence     log 2 + log sg(rho)
        alpha_divergence  (e^((a - 1) rho) - 1) / (a - 1), the exponent at most 80; rho itself for a = 1

Read from TRL 1.16 and held to it by tests. Not covered: LD-DPO (ld_alpha) and WPO (use_weighting), which weigh tokens.

Tests: tests/integrations/test_trl.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from trl import DPOConfig

from ..ops.objective import Answers, Objective
from ..ops.objectives import (
    AOT,
    DPO,
    IPO,
    APODown,
    APOZero,
    BCOPair,
    DiscoPOP,
    EXOPair,
    Hinge,
    NCAPair,
    Robust,
    SPPOHard,
)

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
LARGEST_EXPONENT = 80.0


@dataclass(frozen=True, kw_only=True)
class ChosenNLL(Objective):
    """-sum_b S_wb / sum_b n_wb, the same for each pair."""

    name: ClassVar[str] = "trl_sft"
    needs_reference: ClassVar[bool] = False
    separable: ClassVar[bool] = False

    def losses(self, answers: Answers) -> Tensor:
        logps, lengths = answers.chosen(answers.logps), answers.chosen(answers.lengths)
        return (-logps.sum() / lengths.sum()).expand(answers.count)


# beta, label_smoothing and tau as of DPOConfig -> the objective of each loss type
LOSSES: dict[str, Callable[[float, float, float], Objective]] = {
    "sigmoid": lambda beta, smoothing, tau: DPO(beta=beta),
    "hinge": lambda beta, smoothing, tau: Hinge(beta=beta),
    "ipo": lambda beta, smoothing, tau: IPO(beta=beta, average=True),
    "exo_pair": lambda beta, smoothing, tau: EXOPair(beta=beta, label_smoothing=smoothing),
    "nca_pair": lambda beta, smoothing, tau: NCAPair(beta=beta),
    "robust": lambda beta, smoothing, tau: Robust(beta=beta, label_smoothing=smoothing),
    "bco_pair": lambda beta, smoothing, tau: BCOPair(beta=beta),
    "sppo_hard": lambda beta, smoothing, tau: SPPOHard(beta=beta),
    "aot": lambda beta, smoothing, tau: AOT(beta=beta, label_smoothing=smoothing),
    "aot_unpaired": lambda beta, smoothing, tau: AOT(beta=beta, label_smoothing=smoothing, paired=False),
    "apo_zero": lambda beta, smoothing, tau: APOZero(beta=beta),
    "apo_down": lambda beta, smoothing, tau: APODown(beta=beta),
    "discopop": lambda beta, smoothing, tau: DiscoPOP(beta=beta, tau=tau),
    "sft": lambda beta, smoothing, tau: ChosenNLL(),
    "sigmoid_norm": lambda beta, smoothing, tau: DPO(beta=beta, average=True),
}
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")  # that read label_smoothing
OVER_BATCH = ("sft", "aot", "aot_unpaired")  # whose pairs see each other
DIVERGING = (
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "exo_pair",
    "robust",
    "discopop",
    "sft",
)  # that compare two rewards


@dataclass(frozen=True, kw_only=True)
class Combined(Objective):
    """The weighted sum of loss types, a field with the weight of each, under one of DIVERGENCES (by its number)."""

    name: ClassVar[str] = "trl_combined"
    one_rejected: ClassVar[bool] = True
    beta: float = 0.1
    label_smoothing: float = 0.0
    tau: float = 0.05
    divergence: int = 0
    alpha: float = 0.5
    sigmoid: float = 0.0
    hinge: float = 0.0
    ipo: float = 0.0
    exo_pair: float = 0.0
    nca_pair: float = 0.0
    robust: float = 0.0
    bco_pair: float = 0.0
    sppo_hard: float = 0.0
    aot: float = 0.0
    aot_unpaired: float = 0.0
    apo_zero: float = 0.0
    apo_down: float = 0.0
    discopop: float = 0.0
    sft: float = 0.0
    sigmoid_norm: float = 0.0

    def parts(self) -> list[tuple[float, Objective]]:
        """Weight and objective of each loss type."""
        numbers = (self.beta, self.label_smoothing, self.tau)
        return [(weight, make(*numbers)) for name, make in LOSSES.items() if (weight := getattr(self, name))]

    def check(self) -> None:
        super().check()
        self.parts()  # each looks at its numbers

    def losses(self, answers: Answers) -> Tensor:
        diverged, total = self._diverged(answers), 0.0
        for weight, part in self.parts():
            total = total + weight * part.losses(diverged if part.needs_reference else answers)
        return total

    def _diverged(self, answers: Answers) -> Answers:
        """The answers with f'(e^rho) as their log-ratios."""
        kind, ratios = DIVERGENCES[self.divergence], answers.log_ratios
        if kind == "reverse_kl" or (kind == "alpha_divergence" and abs(self.alpha - 1) < 1e-6):
            return answers
        if kind == "forward_kl":
            scores = 1 - torch.exp(-ratios)
        elif kind == "js_divergence":
            scores = math.log(2) + F.logsigmoid(ratios)
        else:
            power = self.alpha - 1
            scores = (torch.exp((power * ratios).clamp(max=LARGEST_EXPONENT)) - 1) / power
        return Answers(**vars(answers) | {"logps": scores, "ref_logps": torch.zeros_like(scores)})


@dataclass(frozen=True, kw_only=True)
class CombinedOverBatch(Combined):
    """With loss types whose pairs see each other."""

    name: ClassVar[str] = "trl_combined_over_batch"
    separable: ClassVar[bool] = False


def own_objective(objective: Objective, args: DPOConfig) -> Objective:
    """-> objective. Raises ValueError for an option beside it that it would not read."""
    for name in ("loss_type", "loss_weights", "beta", "label_smoothing", "discopop_tau", "f_divergence_type"):
        field = next(field for field in fields(DPOConfig) if field.name == name)
        default = field.default if field.default is not MISSING else field.default_factory()
        if (value := getattr(args, name)) != default:
            raise ValueError(
                f"{name}={value!r} beside objective={objective}, which has its own numbers; leave one of them out"
            )
    return objective


def make_objective(args: DPOConfig) -> Objective:
    """What loss_type, loss_weights, beta and the numbers beside them say. Raises ValueError for loss types that are not here,
    and for numbers that TRL would not read."""
    types, weights = args.loss_type, args.loss_weights or [1.0] * len(args.loss_type)
    if unknown := [name for name in types if name not in LOSSES]:
        raise ValueError(
            f"loss_type={unknown[0]!r}: expected {', '.join(LOSSES)}; give an objective of your own (objective=), or use TRL's "
            "DPOTrainer"
        )
    if args.label_smoothing and not set(types) & set(SMOOTHED):
        smoothing = f"label_smoothing={args.label_smoothing:g}"
        raise ValueError(
            f"{smoothing}: TRL reads it for {', '.join(SMOOTHED)}, and not for loss_type={types}; set it to 0, or give "
            f"objective=DPO(beta={args.beta:g}, {smoothing})"
        )
    kind = args.f_divergence_type
    if kind not in DIVERGENCES:
        raise ValueError(f"f_divergence_type={kind!r}: expected one of {', '.join(DIVERGENCES)}")
    if kind != "reverse_kl" and (others := sorted(set(types) - set(DIVERGING))):
        raise ValueError(
            f"f_divergence_type={kind!r}: {', '.join(others)} does not compare two rewards; set 'reverse_kl'"
        )
    numbers = (args.beta, args.label_smoothing, args.discopop_tau)
    if (
        len(types) == 1 and weights == [1.0] and kind == "reverse_kl" and types != ["sft"]
    ):  # whose rewards TRL logs, too
        return LOSSES[types[0]](*numbers)
    of_types = {name: sum(w for each, w in zip(types, weights, strict=True) if each == name) for name in types}
    cls = CombinedOverBatch if set(types) & set(OVER_BATCH) else Combined
    names = ("beta", "label_smoothing", "tau")
    divergence = {"divergence": DIVERGENCES.index(kind), "alpha": args.f_alpha_divergence_coef}
    return cls(**dict(zip(names, numbers, strict=True)) | divergence | of_types)
