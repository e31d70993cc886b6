"""What a preference objective is: a loss of each group of answers, and its slopes by their log-probs.

    losses (G,) = f(S),        slopes c_k = d losses.sum() / d S_k,        S (K,) summed log-probs of K answers in G groups

A pair is a group of a chosen answer and one or more rejected ones, an unpaired answer a group of one. The slopes are what
the sweep needs: they become the token weights of the answer rows. An objective is one method in plain PyTorch:

    @dataclass(frozen=True, kw_only=True)
    class Squared(Objective):
        beta: float = 0.1

        def losses(self, answers: Answers) -> Tensor:  # (G,)
            chosen, rejected = answers.pairs(answers.log_ratios)  # (R,) each
            return answers.mean_over_rejected((self.beta * (chosen - rejected) - 1).square())

Its class is registered by name when it is made (registered.py).
The slopes come from autograd on K numbers inside the operator (recording.py), or from a method `slopes` that writes them out.
When an object is made, it is asked about a few made-up groups: a loss that is not finite, of another shape, that ignores the
log-probs, that sees other groups although it is declared separable, or written-out slopes that are wrong are refused.

All numbers are float64. Not covered: losses on single tokens (token_objective.py), and numbers of a group beside its answers'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .recording import derivative, recorded
from .registered import Registered
from .rows import to_device

ROLES = ("chosen", "rejected", "answer", "anchor")
CHOSEN, REJECTED, ANSWER, ANCHOR = range(4)
PAIR = ("chosen", "rejected")
TRIPLE = ("chosen", "rejected", "anchor")  # as SoLoPO has it: the anchor is the chosen answer on another input


@dataclass(frozen=True, eq=False)
class Answers:
    """K answers in G groups, as an objective sees them: numbers on the device, float64."""

    logps: Tensor  # (K,) the policy's log-probs, summed over an answer's tokens
    lengths: Tensor  # (K,) answer tokens
    ref_logps: Tensor | None  # (K,) the reference's sums
    group: Tensor  # (K,) int64
    role: Tensor  # (K,) int64: CHOSEN, REJECTED, ANSWER or ANCHOR
    count: int  # G
    places: tuple[Tensor, ...]  # for each role the numbers k of its answers, by group
    single: bool  # each group has one rejected answer

    @classmethod
    def of(
        cls, logps: Tensor, lengths: Tensor, ref_logps: Tensor | None, group: Tensor, role: Tensor, count: int
    ) -> Answers:
        """Answers of numbers on a device, with group and role (K,) on the host."""
        order, device = torch.argsort(group, stable=True), logps.device
        places = [order[role[order] == r] for r in range(len(ROLES))]
        single = torch.equal(group[places[REJECTED]], torch.arange(count))
        on_device = (to_device(host, device) for host in (group, role))
        return cls(logps, lengths, ref_logps, *on_device, count, tuple(to_device(p, device) for p in places), single)

    @property
    def log_ratios(self) -> Tensor:
        """(K,) log(policy / reference)."""
        return self.logps - self.ref_logps

    def chosen(self, values: Tensor) -> Tensor:
        """(K,) -> (G,): those of the chosen answers, where each group has one."""
        return values[self.places[CHOSEN]]

    def anchors(self, values: Tensor) -> Tensor:
        """(K,) -> (G,): those of the anchors, where each group has one."""
        return values[self.places[ANCHOR]]

    def pairs(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(K,) -> (R,), (R,): for each rejected answer the value of its group's chosen one, and its own."""
        chosen, rejected = self.chosen(values), values[self.places[REJECTED]]
        return chosen if self.single else chosen[self.group[self.places[REJECTED]]], rejected

    def mean_over_rejected(self, values: Tensor) -> Tensor:
        """(R,) -> (G,): means over the rejected answers of each group."""
        if self.single:
            return values
        group = self.group[self.places[REJECTED]]
        return self._sums(values, group) / self._sums(torch.ones_like(values), group)

    def pair_slopes(self, slopes: Tensor) -> Tensor:
        """(R,) -> (K,): slopes of mean_over_rejected(phi(chosen - rejected)) from phi'(R,), for who writes them out."""
        group = self.group[self.places[REJECTED]]
        share = slopes if self.single else slopes / self._sums(torch.ones_like(slopes), group)[group]
        by_group = share if self.single else self._sums(share, group)
        out = torch.zeros_like(self.logps).index_put((self.places[CHOSEN],), by_group)
        return out.index_put((self.places[REJECTED],), -share)

    def sums(self, values: Tensor) -> Tensor:
        """(K,) -> (G,): sums over the answers of each group."""
        return self._sums(values, self.group)

    def _sums(self, values: Tensor, group: Tensor) -> Tensor:
        return values.new_zeros(self.count).index_put((group,), values, accumulate=True)  # in one order on every device


class Decision(NamedTuple):
    losses: Tensor  # (G,)
    slopes: Tensor  # (K,)
    rewards: Tensor  # (K,) what is logged


@dataclass(frozen=True, kw_only=True)
class Objective(Registered):
    """Common to all: the weight of the preference term in the total loss (lambda of Eq. 14). Subclasses define
    losses(self, answers) -> (G,) float64.

    Fields are numbers (float, int or bool). Class variables say what an objective takes:

    needs_reference   it reads ref_logps
    separable         each group's loss depends on that group alone; other objectives are scored before they are swept
    one_rejected      a pair has one rejected answer, not several
    forms             the roles that a group may have; "rejected" stands for one or several, if not one_rejected
    reads, with_nll   in `longpo train`: whether the reference reads the "long" input or the "short" ones, and whether the
                      NLL of the chosen sequence is added
    """

    needs_reference: ClassVar[bool] = True
    separable: ClassVar[bool] = True
    one_rejected: ClassVar[bool] = False
    forms: ClassVar[tuple[tuple[str, ...], ...]] = (PAIR,)
    reads: ClassVar[str] = "long"
    with_nll: ClassVar[bool] = False

    preference_weight: float = 1.0

    def check(self) -> None:
        """Raises ValueError for numbers that make no loss; common names are checked for every objective."""
        if getattr(self, "beta", 1.0) <= 0:
            raise self.refusal("beta", "beta > 0")
        for name in ("preference_weight", "nll_weight", "lam", "alpha"):
            if getattr(self, name, 0.0) < 0:
                raise self.refusal(name, ">= 0")
        if not 0 <= getattr(self, "label_smoothing", 0.0) < 0.5:
            raise self.refusal("label_smoothing", "0 <= label_smoothing < 0.5")

    def examine(self) -> None:
        _examine(self)

    def rewards(self, answers: Answers) -> Tensor:
        """-> (K,) what is logged: beta * log(policy / reference), or beta * log-probs without one."""
        return getattr(self, "beta", 1.0) * (answers.log_ratios if self.needs_reference else answers.logps)


def decide(objective: Objective, answers: Answers) -> Decision:
    """Losses, slopes and rewards; nothing of it carries a gradient. Works wherever autograd is off, in an operator too."""
    with recorded(answers.logps.device):
        answers = Answers(*(_cloned(value) for value in vars(answers).values()))
        written = _written_slopes(type(objective))
        if written is None:
            losses, slopes = derivative(lambda logps: objective.losses(_with(answers, logps)), answers.logps)
        else:
            losses, slopes = objective.losses(answers).detach(), written(objective, answers).detach()
        if losses.shape == (answers.count,):  # a maximum may have a slope where there is no number
            slopes = torch.where(losses.isnan()[answers.group], torch.nan, slopes)
        return Decision(losses, slopes, objective.rewards(answers).detach())


def _cloned(value):
    """Tensors made in inference mode cannot be saved for a backward; their copies can."""
    if isinstance(value, tuple):
        return tuple(map(_cloned, value))
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _with(answers: Answers, logps: Tensor) -> Answers:
    return Answers(**vars(answers) | {"logps": logps})


def _written_slopes(cls: type[Objective]) -> Callable | None:
    """The method `slopes`, unless `losses` was defined anew in a class below it."""
    for owner in cls.__mro__:
        if "slopes" in vars(owner):
            return vars(owner)["slopes"]
        if "losses" in vars(owner):
            return None
    return None


# -- what an objective is asked when it is made ----------------------------------------------------------------------

NEAR, FAR = 0.5, 12.0  # how far the policy is from its reference in the groups that are made up


def _examine(objective: Objective) -> None:
    """Raises ValueError for an objective that does not do what it declares. A few milliseconds."""
    cls = type(objective)
    whole = _made_up(cls)
    decision = _asked(objective, whole)
    if _written_slopes(cls) is not None:
        with recorded(whole.logps.device):
            _, truth = derivative(lambda logps: objective.losses(_with(whole, logps)), whole.logps)
        if not torch.allclose(decision.slopes, truth, rtol=1e-9, atol=1e-12):
            raise objective.wrong(
                f"its slopes are {decision.slopes.tolist()}", f"{truth.tolist()}, as autograd has them"
            )
    for g in range(whole.count if cls.separable else 0):
        alone = _asked(objective, _part(whole, g))
        together = decision.losses[g : g + 1], decision.slopes[whole.group == g], decision.rewards[whole.group == g]
        if not all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(alone, together, strict=True)):
            raise objective.wrong(
                f"its loss of a group alone is {alone.losses.tolist()}, among {whole.count} it is {together[0].tolist()}",
                "the same, or `separable: ClassVar[bool] = False`; a mean over groups is taken for you",
            )
    if not bool(decision.slopes.any()):
        raise objective.wrong(
            "its losses do not depend on the log-probs", "losses of answers.logps, without detach or item()"
        )


def _asked(objective: Objective, answers: Answers) -> Decision:
    """decide() on made-up groups. Raises ValueError for what no losses, slopes and rewards are."""
    cls = type(objective)
    try:
        decision = decide(objective, answers)
    except Exception as error:
        several = "" if cls.one_rejected else ", some with two rejected answers where one_rejected is False"
        error.add_note(f"raised by objective {cls.name} for {answers.count} made-up groups{several}")
        raise
    sizes = {"losses": answers.count, "slopes": len(answers.logps), "rewards": len(answers.logps)}
    for (name, size), value in zip(sizes.items(), decision, strict=True):
        if value.shape != (size,):
            shape = "(G,), one per group" if name == "losses" else "(K,), one per answer"
            raise objective.wrong(f"its {name} of {size} have the shape {tuple(value.shape)}", shape)
        if not bool(value.isfinite().all()):
            raise objective.wrong(
                f"its {name} are {value.tolist()}", f"finite numbers for log-probs {answers.logps.tolist()}"
            )
    return decision


def _made_up(cls: type[Objective]) -> Answers:
    """Groups of every form the class takes, near and far from the reference, better and worse than it."""
    role, group, distance, g = [], [], [], 0
    for form in cls.forms:
        unknown = sorted(set(form) - set(ROLES))
        if unknown or not form:
            raise ValueError(f"objective {cls.name}: forms has {unknown or form}: expected some of {', '.join(ROLES)}")
        several = [] if cls.one_rejected or "rejected" not in form else ["rejected"]
        for size in (NEAR, -NEAR, FAR, -FAR, 0.0):
            roles = [*form, *several] if g % 2 else form
            role += [ROLES.index(name) for name in roles]
            group += [g] * len(roles)
            distance += [size * (-1) ** k / (1 + k) for k in range(len(roles))]
            g += 1
    k = torch.arange(len(role), dtype=torch.float64)
    refs = -20 - 7 * torch.sin(3 * k)
    logps = refs + torch.tensor(distance, dtype=torch.float64)
    numbers = logps, 5 + k % 4, refs if cls.needs_reference else None
    return Answers.of(*numbers, torch.tensor(group), torch.tensor(role), g)


def _part(answers: Answers, g: int) -> Answers:
    """Group g alone."""
    here = answers.group == g
    cut = (None if value is None else value[here] for value in (answers.logps, answers.lengths, answers.ref_logps))
    return Answers.of(*cut, torch.zeros(int(here.sum()), dtype=torch.int64), answers.role[here], 1)
