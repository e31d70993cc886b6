"""One question with its references, how it is scored, and how it is made as long as it may be.

    units (words, lines, documents) --draft--> prompt, prefill --Counter--> tokens <= length - max_tokens

The number of units is found by the secant rule from exact counts: short texts give the tokens of a unit, a long one
corrects them, so a text of about the full length is tokenised two or three times. Memory: the text and its tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from ..engines import Request, Sampling, render

JUDGED = "judge"  # the metric of a sample that another model rates
SPARE = 4  # tokens kept free: the text still fits where the answer's beginning is put into the user's message
NEAR = 0.003  # of the room: a text this close to it is long enough
LOOKS = 20  # counts at most, more than any known text needs
FIRST, GROWTH = 64, 8  # units looked at first, and how many times as many next: short texts cost little


@dataclass(frozen=True)
class Sample:
    """One question with its references.

    length: tokens asked for; prompt, chat template, prefill and max_tokens fit in it (0: the text is as long as it
    is). prefill: how the model's answer begins. depth: the share of the context before the asked needle, 0 to 1,
    where one is asked.
    """

    id: str  # task/length/number
    task: str
    length: int
    prompt: str
    prefill: str = ""
    references: tuple[str, ...] = ()
    max_tokens: int = 128
    metric: str = "all"
    depth: float | None = None


def _all(references: tuple[str, ...], text: str) -> float:
    return sum(reference.lower() in text.lower() for reference in references) / len(references)


def _any(references: tuple[str, ...], text: str) -> float:
    return float(any(reference.lower() in text.lower() for reference in references))


METRICS: dict[str, Callable[[tuple[str, ...], str], float]] = {"all": _all, "any": _any}


def score(sample: Sample, text: str) -> float:
    """0 to 1 for an answer, as RULER scores: without case, "all" is the share of the references that the text
    contains, "any" is 1 if it contains one of them.

    Raises ValueError for an unknown metric and for a sample without references.
    """
    if sample.metric not in METRICS:
        raise ValueError(f"{sample.id}: metric {sample.metric!r}; expected one of {', '.join(METRICS)}")
    if not sample.references:
        raise ValueError(f"{sample.id} has no references to score an answer by")
    return METRICS[sample.metric](sample.references, text)


@dataclass(frozen=True)
class Draft:
    """What a task makes of a number of units; the fields are those of Sample."""

    prompt: str
    prefill: str
    references: tuple[str, ...]
    depth: float | None = None


class Task(Protocol):
    """How samples of one kind are made. A draft depends on its arguments only, more units make it longer, and prefill,
    references and question depend on seed and number alone, so a curve over lengths is about lengths.
    """

    name: str
    max_tokens: int
    metric: str

    def least(self, number: int, length: int, texts) -> int:
        """The fewest units that sample `number` of `length` tokens can be made of."""

    def draft(self, seed: str, number: int, length: int, units: int, texts) -> Draft:
        """Sample `number` of about `length` tokens, of so many units. Raises ValueError where that cannot be."""


@dataclass(frozen=True)
class Counter:
    """Counts the tokens of a user's message and the answer's beginning as the engines render them.

    tokenizer: a transformers tokenizer. Raises ValueError for one without a chat template.
    """

    tokenizer: object
    template_kwargs: dict = field(default_factory=dict)

    def __post_init__(self):
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                f"the tokenizer {getattr(self.tokenizer, 'name_or_path', '')!r} has no chat template; use an "
                "instruction-tuned model's tokenizer, or set tokenizer.chat_template"
            )

    def count(self, prompt: str, prefill: str = "", earlier: tuple[tuple[str, str], ...] = ()) -> int:
        """earlier: messages before it, (role, content). Raises ValueError where the template refuses the messages."""
        request = Request(prompt, Sampling(0), prefill=prefill, earlier=earlier)
        try:
            return len(render(self.tokenizer, request, self.template_kwargs))
        except ValueError as error:
            raise ValueError(f"{error}; use another template") from error


def fit(count: Callable[[int], int], least: int, room: int, guess: int | None = None) -> int | None:
    """The number of units, from `least` on, whose count comes close to `room` tokens without exceeding it; None if
    `least` does not fit.

    count(units): tokens, growing with the units about in proportion. guess: units to look at first.
    """
    fits, tokens = least, count(least)
    if tokens > room:
        return None
    over, beyond = None, 0  # the fewest units known to be too many, and their count
    units = max(guess or 0, least + FIRST)
    for _ in range(LOOKS):
        came = count(units)
        rate = (came - tokens) / (units - fits)
        if came <= room:
            fits, tokens = units, came
        else:
            over, beyond = units, came
        if over is not None:
            rate = (beyond - tokens) / (over - fits)
        left = room - tokens
        if left <= NEAR * room or over == fits + 1:
            break
        units = fits + max(1, int((left - NEAR * room / 2) / max(rate, 1e-3)))
        units = min(units, over - 1 if over is not None else GROWTH * fits)
    return fits
