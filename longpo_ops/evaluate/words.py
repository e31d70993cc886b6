"""Which words occur most often? Common words in a numbered list, and frequent words in a coded text.

    cwe  10 words 30 times each, all others 3 times (6 and 1 below 4096 tokens), shuffled; asked: the 10;
         u units of text beyond the w words there are: 30 u / w and 3 u / w times
    fwe  of N words, floor(N k^-2 / zeta(2)) are the one of rank k; rank 1 is "...", asked: ranks 2 to 4

As in RULER, with its solved example before cwe's list; the words come from `vocabulary`. Where RULER's words end (near
128K tokens) it takes rarer ones from another list. Here they recur more often instead, so all lengths have one kind.

Tests: tests/evaluate/test_tasks.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from random import Random
from string import ascii_lowercase

from .samples import Draft
from .sources import Texts
from .text import fill
from .vocabulary import words

SHORT = 4096  # tokens below which RULER repeats words less often
COMMON = 10
COMMON_TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
COMMON_PREFILL = " Answer: The top 10 words that appear most often in the list are:"

LETTERS, ALPHA, ZETA = 6, 2.0, pi**2 / 6
FREQUENT_TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?"
)
FREQUENT_PREFILL = " Answer: According to the coded text above, the three most frequently appeared words are:"


@dataclass(frozen=True)
class CommonWords:
    """RULER's cwe. Its units are different words, as far as there are so many."""

    name: str = "cwe"
    max_tokens: int = 120
    metric: str = "all"

    def least(self, number: int, length: int, texts: Texts) -> int:
        return COMMON + 1

    def draft(self, seed: str, number: int, length: int, units: int, texts: Texts) -> Draft:
        example, often, seldom = (20, 3, 1) if length < SHORT else (40, 10, 3)
        solved, answer = _list(Random(f"{seed}|example"), example, often, seldom)
        often, seldom = (6, 1) if length < SHORT else (30, 3)
        prompt, common = _list(Random(seed), units, often, seldom)
        return Draft(f"{solved}{COMMON_PREFILL} {_numbered(answer)}\n{prompt}", COMMON_PREFILL, tuple(common))


def _list(random: Random, units: int, often: int, seldom: int) -> tuple[str, list[str]]:
    """-> the question about a list of `units` different words, and its common ones, the same for any number of units."""
    common = random.sample(words(), COMMON)
    taken = set(common)
    others = random.sample([word for word in words() if word not in taken], min(units, len(words())) - COMMON)
    times, rest = divmod(seldom * (units - COMMON), len(others))  # seldom and 0, unless the words run out
    entries = common * (often * (units - COMMON) // len(others)) + others * times + others[:rest]
    random.shuffle(entries)
    return fill(COMMON_TEMPLATE, context=_numbered(entries)), common


def _numbered(entries: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1))


@dataclass(frozen=True)
class FrequentWords:
    """RULER's fwe. Its units are N."""

    name: str = "fwe"
    max_tokens: int = 50
    metric: str = "all"

    def least(self, number: int, length: int, texts: Texts) -> int:
        return 100  # from here on rank 4 is more frequent than rank 5

    def draft(self, seed: str, number: int, length: int, units: int, texts: Texts) -> Draft:
        random, coded = Random(seed), {"...": None}
        while len(coded) < max(7, length // 50):
            coded["".join(random.choices(ascii_lowercase, k=LETTERS))] = None
        counts = (int(units * rank**-ALPHA / ZETA) for rank in range(1, len(coded) + 1))
        entries = [word for word, times in zip(coded, counts) for _ in range(times)]
        random.shuffle(entries)
        context = " ".join(entries)
        return Draft(fill(FREQUENT_TEMPLATE, context=context), FREQUENT_PREFILL, tuple(coded)[1:4])
