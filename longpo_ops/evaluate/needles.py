"""Needles in a haystack: facts of a key and a value hidden in a long text, and a question about some keys.

    k keys, v values each  ->  k v needles, between the units of the haystack  ->  `asked` keys, their values the references

RULER's eight needle tasks are eight values of NeedleTask; a user's own is another, written as a YAML file (`own`).

Memory: the text, and what `text` holds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random
from uuid import UUID

from .samples import Draft
from .sources import Texts
from .text import HOLE, NOISE, fill, scatter
from .vocabulary import draw, draw_keys

HAYSTACKS = ("prose", "essay", "noise", "needles")
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
Kind = str | int | tuple[str, ...]  # "words", "uuids", a number of digits, or what there is to draw from


@dataclass(frozen=True, kw_only=True)
class NeedleTask:
    """A needle task.

    needle: with {key} and {value}; the whitespace it begins with parts it from the text before it. question, prefill:
    with {key}. template: with {context} and {question}. keys, value: "words", "uuids", a number of digits, or a tuple
    to draw from. needles_per_sample: keys in a text; every: instead, one key per so many tokens of length.
    values_per_key: needles of each key. asked: keys in the question.
    haystack: "prose" (local text as it is), "essay" (with single spaces for whitespace), "noise" (one line that
    repeats), "needles" (further needles with other keys).

    Raises ValueError for fields that make no sense together.
    """

    name: str
    needle: str
    question: str
    keys: Kind
    value: Kind
    template: str = "{context}\n\n{question}"
    prefill: str = ""
    needles_per_sample: int = 1
    every: int | None = None
    values_per_key: int = 1
    asked: int = 1
    haystack: str = "prose"
    max_tokens: int = 128

    metric = "all"

    def __post_init__(self):
        if not (isinstance(self.name, str) and NAME.fullmatch(self.name)):
            raise ValueError(f"needle task {self.name!r}: a name has letters, digits and any of . _ - and no space")
        self._check_texts()
        for field in ("keys", "value"):
            self._check_kind(field)
        for field in ("needles_per_sample", "every", "values_per_key", "asked", "max_tokens"):
            number = getattr(self, field)
            if not (field == "every" and number is None) and (type(number) is not int or number < 1):
                self._refuse(f"{field} is {number!r}; expected a whole number of at least 1")
        if self.haystack not in HAYSTACKS:
            self._refuse(f"haystack is {self.haystack!r}; expected one of {', '.join(HAYSTACKS)}")
        if self.haystack == "needles" and isinstance(self.keys, tuple):
            self._refuse("a haystack of needles takes any number of keys; set keys to words, uuids or {digits: n}")
        if self.every is None:
            self._check_keys(self.needles_per_sample, self.needles_per_sample, "")

    def _refuse(self, what: str) -> None:
        raise ValueError(f"needle task {self.name!r}: {what}")

    def _check_texts(self) -> None:
        holes = {"needle": {"key", "value"}, "question": {"key"}, "template": {"context", "question"}}
        for field in ("needle", "question", "template", "prefill"):
            text = getattr(self, field)
            if not isinstance(text, str):
                self._refuse(f"{field} is {text!r}; expected text")
            if missing := sorted(holes.get(field, set()) - set(HOLE.findall(text))):
                names = " and ".join(f"{{{name}}}" for name in missing)
                self._refuse(f"{field} {text!r} lacks {names}, which stands for what is put in")

    def _check_kind(self, field: str) -> None:
        kind = getattr(self, field)
        if isinstance(kind, tuple):
            if not kind or not all(isinstance(item, str) and item.strip() for item in kind):
                self._refuse(f"{field} {kind!r}; expected a list of texts (in YAML, quote numbers, yes and no)")
            if len(set(kind)) < len(kind):
                self._refuse(f"{field} has an entry twice: {max(kind, key=kind.count)!r}")
        elif not (kind in ("words", "uuids") or (type(kind) is int and 1 <= kind <= 18)):
            self._refuse(f"{field} is {kind!r}; expected a list, words, uuids, or {{digits: n}} of 1 to 18 digits")

    def _check_keys(self, needed: int, may_ask: int, at: str) -> None:
        have = _count(self.keys)
        if have is not None and needed > have:
            self._refuse(f"needs {needed} keys{at} and there are {have}; give more keys, or set fewer needles")
        if self.asked > may_ask:
            self._refuse(f"asks for {self.asked} keys of {may_ask}{at}; ask for fewer, or set more needles")

    def least(self, number: int, length: int, texts: Texts) -> int:
        return 1

    def draft(self, seed: str, number: int, length: int, units: int, texts: Texts) -> Draft:
        """`units` are words of prose, lines of noise, or further needles."""
        random = Random(seed)
        count = self.needles_per_sample if self.every is None else max(1, length // self.every)
        more = units if self.haystack == "needles" else 0
        self._check_keys(count + more, count, f" at {length} tokens")
        keys = _different(Random(f"{seed}|keys"), self.keys, count + more)  # apart: they are more in a longer text
        values = [[_one(random, self.value) for _ in range(self.values_per_key)] for _ in range(count)]
        asked = keys[: self.asked]  # keys are in no order
        needles = [(key, value) for key, told in zip(keys, values) for value in told]
        random.shuffle(needles)
        gaps = None
        if self.haystack == "noise":
            hay = [f"\n{NOISE}"] * units
        elif self.haystack == "needles":
            hay = [self._needle(key, _one(random, self.value)) for key in keys[count:]]
        else:
            hay, gaps = getattr(texts, self.haystack).stretch(random, units)
        context, starts = scatter(random, hay, [self._needle(*needle) for needle in needles], gaps)
        named = ", ".join(asked[:-1]) + f", and {asked[-1]}" if len(asked) > 1 else asked[0]
        depth = None
        if len(asked) * self.values_per_key == 1:
            depth = starts[[key for key, _ in needles].index(asked[0])] / len(context)
        return Draft(
            fill(self.template, context=context, question=fill(self.question, key=named)),
            fill(self.prefill, key=named),
            tuple(value for told in values[: self.asked] for value in told),
            depth,
        )

    def _needle(self, key: str, value: str) -> str:
        return fill(self.needle, key=key, value=value)


def _count(kind: Kind) -> int | None:
    """How many different ones there are; None for as many as anyone needs."""
    if isinstance(kind, tuple):
        return len(kind)
    return 9 * 10 ** (kind - 1) if isinstance(kind, int) else None


def _different(random: Random, kind: Kind, count: int) -> list[str]:
    """`count` different ones; the first are the same for any count."""
    if kind == "words":
        return draw_keys(random, count)
    if kind == "uuids":
        return [_one(random, kind) for _ in range(count)]
    if isinstance(kind, tuple):
        return [kind[i] for i in draw(random, len(kind), count)]
    return [str(10 ** (kind - 1) + i) for i in draw(random, _count(kind), count)]


def _one(random: Random, kind: Kind) -> str:
    if kind == "words":
        return draw_keys(random, 1)[0]
    if kind == "uuids":
        return str(UUID(int=random.getrandbits(128), version=4))
    if isinstance(kind, tuple):
        return random.choice(kind)
    return str(random.randrange(10 ** (kind - 1), 10**kind))


def ruler(name: str, haystack: str, *, keys: Kind = "words", value: Kind = 7, **counts: int) -> NeedleTask:
    """One of RULER's tasks. Its wording is singular where one value is asked for."""
    kind = "uuids" if value == "uuids" else "numbers"
    some, are, every = "Some", "are", "are all"
    if counts.get("asked", 1) * counts.get("values_per_key", 1) == 1:
        some, are, every = "A", "is", "is"
    asked = kind if some == "Some" else kind[:-1]
    return NeedleTask(
        name=name,
        needle=("\n" if haystack in ("noise", "needles") else " ")
        + f"One of the special magic {kind} for {{key}} is: {{value}}.",
        template=f"{some} special magic {asked} {are} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {asked} afterwards.\n{{context}}\n{{question}}",
        question=f"What {every} the special magic {asked} for {{key}} mentioned in the provided text?",
        prefill=f" The special magic {asked} for {{key}} mentioned in the provided text {are}",
        keys=keys,
        value=value,
        haystack=haystack,
        **counts,
    )


RULER = (
    ruler("niah_single_1", "noise"),
    ruler("niah_single_2", "essay"),
    ruler("niah_single_3", "essay", value="uuids"),
    ruler("niah_multikey_1", "essay", needles_per_sample=4),
    ruler("niah_multikey_2", "needles"),
    ruler("niah_multikey_3", "needles", keys="uuids", value="uuids"),
    ruler("niah_multivalue", "essay", values_per_key=4),
    ruler("niah_multiquery", "essay", needles_per_sample=4, asked=4),
)
