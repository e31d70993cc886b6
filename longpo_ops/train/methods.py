"""What one flag changes: each training method of the paper as an objective, a reference's reading and an NLL term.

| method             | preference term          | the reference reads | NLL term                                |
|--------------------|--------------------------|---------------------|-----------------------------------------|
| longpo             | sigmoid, weight 0.01     | the short input     | whole chosen sequence                   |
| hinge ipo kto_pair | those forms, weight 0.01 | the short input     | whole chosen sequence                   |
| dpo                | sigmoid, weight 1        | the long input      | none                                    |
| simpo orpo         | reference-free, weight 1 | nothing             | none (ORPO has its own)                 |
| logo               | reference-free, weight 1 | nothing             | none (LOGO has its own)                 |
| sft_chosen         | none                     | nothing             | whole chosen sequence                   |
| sft_rejected       | none                     | nothing             | whole rejected sequence, the first one  |
| sft_constraint     | none                     | the short input     | whole chosen sequence, plus KL(policy on|
|                    |                          |                     | long || reference on short) of answers  |

logo also spreads position ids over the policy's context.
Source: arXiv 2502.13922, Eq. 12-14 and its baselines; the official code for the forms beside the sigmoid.

Tests: tests/train/test_trainer.py.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..ops.objectives import OBJECTIVES, Objective


@dataclass(frozen=True)
class Method:
    name: str
    objective: str | None = None  # a key of OBJECTIVES
    preference_weight: float | None = None  # where it differs from the objective's own
    reference: str | None = None  # which input the reference reads: "short" | "long"
    nll: bool = False
    sequence: str = "pair"  # what a pack holds: "pair" | "chosen" | "rejected"
    constraint: bool = False
    spread: bool = False  # positions over the policy's whole context, unless target_length says otherwise

    def make_objective(self, options: dict[str, float]) -> Objective | None:
        """The objective with some of its fields set. Raises ValueError naming an option it does not have."""
        if self.objective is None:
            if options:
                raise ValueError(
                    f"objective_options={options}: method {self.name!r} has no preference term; expected none"
                )
            return None
        cls = OBJECTIVES[self.objective]
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"objective_options: {unknown} came; {self.name!r} has {known}")
        given = {} if self.preference_weight is None else {"preference_weight": self.preference_weight}
        return cls(**given | options)


def _short(name: str, weight: float | None = 0.01) -> Method:
    return Method(name, name, weight, reference="short", nll=True)


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
        Method("sft_chosen", nll=True, sequence="chosen"),
        Method("sft_rejected", nll=True, sequence="rejected"),
        Method("sft_constraint", reference="short", nll=True, sequence="chosen", constraint=True),
    )
}


def resolve_method(name: str) -> Method:
    """The method of that name. Raises ValueError."""
    if name not in METHODS:
        raise ValueError(f"objective={name!r}: expected one of {', '.join(METHODS)}")
    return METHODS[name]
