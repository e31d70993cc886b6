"""What one flag changes: each training method, and the loss that it is.

A step averages over its pairs. Of one pair: s_w, s_l the policy's log-probs of all answer tokens of the chosen and of a
rejected long sequence, summed over turns; n_w, n_l how many they are; r_w, r_l the reference's sums of the same answers;
d = (s_w - r_w) - (s_l - r_l); E the mean over the rejected sequences; NLL the mean of -log p over the counted tokens
(nll_tokens) of a sequence.

| method                  | loss of a pair                                     | the reference reads |
|-------------------------|----------------------------------------------------|---------------------|
| longpo                  | 0.01 E[-log sg(0.1 d)] + NLL(chosen)               | the short inputs    |
| hinge                   | 0.01 E[max(0, 1 - 0.1 d)] + NLL(chosen)            | the short inputs    |
| ipo                     | 0.01 E[(d - 1 / 0.2)^2] + NLL(chosen)              | the short inputs    |
| kto_pair                | 0.01 (KTOPair of ops/objectives.py) + NLL(chosen)  | the short inputs    |
| dpo                     | E[-log sg(0.1 d)]                                  | the long input      |
| simpo                   | E[-log sg(2 (s_w/n_w - s_l/n_l) - 1)]              |                     |
| orpo                    | -s_w/n_w - 0.1 E[log sg(log odds_w - log odds_l)]  |                     |
| logo                    | -log sg(10 (s_w/n_w - E[s_l/n_l]) - 3)             |                     |
|                         |   - 0.1 s_w/n_w; positions spread                  |                     |
| solopo                  | E[-log sg(0.1 d')] + 3 |0.1 (a - a_L)|             | both                |
| solopo_simpo            | E[-log sg(2 (m_w - m_l) - 1)] + 2 |m_w - m_L|      |                     |
| solopo_orpo             | -m_w - 0.1 E[log sg(o_w - o_l)] + |o_w - o_L|      |                     |
| sft_chosen              | NLL(chosen)                                        |                     |
| sft_rejected            | NLL(the first rejected)                            |                     |
| sft_constraint          | NLL(chosen) + 0.1 (mean over answer tokens of KL)  | the short inputs    |
| sft_constraint_official | -s_w/n_w + 0.01 (mean over turns of the mean over  | the short inputs    |
|                         |   a turn's answer tokens of KL)                    |                     |

KL: of an answer token of the chosen sequence, KL(policy on the long input || frozen reference on the short one) over the
whole vocabulary, at the rows that predict it. Numbers are defaults: objective_options and constraint_weight set others.
A reference that reads long inputs is the policy as it begins, a new rope_theta included; one that reads short inputs alone
has the model's own. logo spreads position ids over the policy's context. Every other objective of pairs (docs/objectives.md:
robust, exo_pair, cpo, ...) is a method of its name, as dpo is: the reference reads the long input, and there is no NLL. So is
a class of one's own, module:Class, which says by `reads` and `with_nll` what is otherwise (ops/objective.py); one of triples
is trained like solopo.

SoLoPO (arXiv 2505.11166): a pair is a turn, and the loss is that of DPO, SimPO or ORPO on the turn's SHORT input plus
alpha |r(short, chosen) - r(long, chosen)|, chosen-only as published: w and l are the answers on the short input, L is the
chosen one on the long input, after the turns before it. d' = a_w - a_l of a = s - r, m = s/n, o = log odds of e^m; r is
beta a, beta m or o, and alpha 3, 1 and 1, what the paper has for a model of 7B. The paper's triple has one question, so a
record of n turns is n of them, and |...| of a sum over turns would let one turn's error hide another's. The policy reads
short inputs with gradients (data/triples.py); the rejected answer is never read at length; the reference of solopo reads all
that the policy reads, the long chosen answer among it.
Source: arXiv 2502.13922, Eq. 12-14 and its baselines; the official code for the forms beside the sigmoid, and for what
sft_constraint_official averages and weighs. docs/evolve.md has the table for readers.

Tests: tests/train/test_trainer.py.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from dataclasses import dataclass, fields

from ..ops.objective import PAIR, TRIPLE, Objective
from ..ops.objectives import OBJECTIVES, find_objective


@dataclass(frozen=True)
class Method:
    name: str
    objective: str | None = None  # of OBJECTIVES, or module:Class
    preference_weight: float | None = None  # where it differs from the objective's own
    reference: str | None = None  # which input the reference reads: "short" | "long" | "both"
    nll: str | None = None  # what the NLL term counts: "labels" (the sequence's NLL labels) | "answers"
    sequence: str = "pair"  # what a pack holds: "pair" | "chosen" | "rejected" | "triples"
    constraint: str | None = None  # what the KL term is a mean over: "answers" (their tokens) | "turns" (their means)
    constraint_weight: float = 0.1  # of the KL term, unless constraint_weight says otherwise
    spread: bool = False  # positions over the policy's whole context, unless target_length says otherwise

    @property
    def one_rejected(self) -> bool:
        """Whether a pair has one rejected answer alone."""
        return self.objective is not None and find_objective(self.objective).one_rejected

    @property
    def code(self) -> str | None:
        """A digest of the source of a class that is not ours: a run that goes on with other code is another run."""
        if self.objective is None or self.objective in OBJECTIVES:
            return None
        classes = find_objective(self.objective).__mro__[:-1]
        sources = (inspect.getsource(cls) for cls in classes if not cls.__module__.startswith("longpo_ops."))
        return hashlib.sha256("".join(sources).encode()).hexdigest()

    def make_objective(self, options: dict[str, float]) -> Objective | None:
        """The objective with some of its fields set. Raises ValueError naming an option it does not have."""
        if self.objective is None:
            if options:
                raise ValueError(
                    f"objective_options={options}: method {self.name!r} has no preference term; expected none"
                )
            return None
        cls = find_objective(self.objective)
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"objective_options: {unknown} came; {self.name!r} has {known}")
        given = {} if self.preference_weight is None else {"preference_weight": self.preference_weight}
        return cls(**given | options)


def _short(name: str, weight: float | None = 0.01) -> Method:
    return Method(name, name, weight, reference="short", nll="labels")


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        _short("longpo", None),
        _short("hinge"),
        _short("ipo"),
        _short("kto_pair"),
        Method("dpo", "dpo", reference="long"),
        Method("simpo", "simpo"),
        Method("orpo", "orpo"),
        Method("logo", "logo", spread=True),
        Method("solopo", "solopo", reference="both", sequence="triples"),
        Method("solopo_simpo", "solopo_simpo", sequence="triples"),
        Method("solopo_orpo", "solopo_orpo", sequence="triples"),
        Method("sft_chosen", nll="labels", sequence="chosen"),
        Method("sft_rejected", nll="labels", sequence="rejected"),
        Method("sft_constraint", reference="short", nll="labels", sequence="chosen", constraint="answers"),
        Method(
            "sft_constraint_official",
            reference="short",
            nll="answers",
            sequence="chosen",
            constraint="turns",
            constraint_weight=0.01,
        ),
    )
}


def resolve_method(name: str) -> Method:
    """The method of that name, of an objective of pairs, or of module:Class. Raises ValueError."""
    if name in METHODS:
        return METHODS[name]
    if ":" in name and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script's path has the folder of the script instead
    elif ":" not in name and name not in OBJECTIVES:
        others = (other for other, cls in OBJECTIVES.items() if other not in METHODS and PAIR in cls.forms)
        raise ValueError(f"objective={name!r}: expected one of {', '.join((*METHODS, *others))}, or module:Class")
    cls = find_objective(name)
    if TRIPLE in cls.forms:
        if cls.with_nll:
            raise ValueError(
                f"objective={name!r}: with_nll of groups with an anchor, which have no NLL term; expected False"
            )
        return Method(name, name, reference="both" if cls.needs_reference else None, sequence="triples")
    if PAIR not in cls.forms:
        forms = " or ".join(" + ".join(form) for form in cls.forms)
        raise ValueError(f"objective={name!r}: takes groups of {forms}; data hold pairs, use packed_objective_loss")
    return Method(
        name, name, reference=cls.reads if cls.needs_reference else None, nll="labels" if cls.with_nll else None
    )
