"""Which answers carry no preference worth learning. Each check gives a reason that is counted, or None.

repeated share of a text with words w_1 .. w_n:   1 - |{4-grams}| / (n - 3)
overlap of two texts:                             2 |A & B| / (|A| + |B|), A and B their bags of word pairs

Whether an answer is true or well said is not looked at.

Tests: tests/generate/test_prompts.py.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

WORD = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff]|\w+")  # Chinese and Japanese have no spaces: a character is a word
SAME_LETTERS = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
GRAM = 4


@dataclass(frozen=True)
class Filters:
    """min_words: fewer is near-empty. max_repeated, max_overlap: shares from 0 to 1, see above. refusals: phrases."""

    refusals: tuple[str, ...] = ()
    min_words: int = 3
    max_repeated: float = 0.4
    max_overlap: float = 0.9

    def reject(self, chosen, rejected) -> str | None:
        """Why two completions make no turn, or None. Both are judged alike: what is wrong with either spoils it."""
        for name, answer in (("chosen", chosen), ("rejected", rejected)):
            reason = self.answer(answer.text, answer.finish)
            if reason is not None:
                return f"{name}: {reason}"
        if overlap(chosen.text, rejected.text) >= self.max_overlap:
            return "chosen equal or nearly equal to rejected"
        return None

    def answer(self, text: str, finish: str = "stop") -> str | None:
        """What is wrong with an answer, or None. finish: "stop" where the model ended it itself."""
        words = split_words(text)
        if not words:
            return "empty"
        if finish != "stop":
            return "cut off"
        if len(words) < self.min_words:
            return "near-empty"
        plain = text.translate(SAME_LETTERS).lower()
        if any(phrase.translate(SAME_LETTERS).lower() in plain for phrase in self.refusals):
            return "refusal"
        return "repetitive" if repeated_share(words) > self.max_repeated else None


def split_words(text: str) -> list[str]:
    """The words of a text in lower case; Chinese and Japanese characters count as one each."""
    return WORD.findall(text.lower())


def repeated_share(words: list[str]) -> float:
    """How many of a text's 4-grams have occurred in it before, 0 to 1; 0 for fewer than 8 words."""
    count = len(words) - GRAM + 1
    if len(words) < 2 * GRAM:
        return 0.0
    return 1 - len({tuple(words[i : i + GRAM]) for i in range(count)}) / count


def overlap(first: str, second: str) -> float:
    """How much two texts have in common, 0 to 1; 1 for the same words in the same order."""
    bags = []
    for text in (first, second):
        words = ["", *split_words(text), ""]
        bags.append(Counter(pairwise(words)))
    return 2 * sum((bags[0] & bags[1]).values()) / (bags[0].total() + bags[1].total())
