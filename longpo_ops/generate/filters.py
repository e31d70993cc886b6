"""Which answers carry no preference worth learning. Each check gives a reason that is counted, or None.

|                                          | Filters (ours)                   | PublishedFilters                        |
|------------------------------------------|----------------------------------|-----------------------------------------|
| words                                    | runs of letters and digits       | what stands between spaces, less signs  |
| words that count for near-empty          | all                              | those of three characters at least      |
| repeated share of the words w_1 .. w_n   | 1 - |{4-grams}| / (n - 3)        | |{i: w_i = w_j for a j != i}| / n       |
| a cut-off answer                         | kept where rejected and run on   | kept                                    |

overlap of two texts:   2 |A & B| / (|A| + |B|), A and B their bags of word pairs

A rejected answer that runs on to the limit of tokens is what a long context does wrong, and the preference is to unlearn
it; a chosen one would teach it. Text without spaces is one word in the published filters, so they drop Chinese.
Whether an answer is true or well said is not looked at.

Tests: tests/generate/test_prompts.py.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

WORD = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff]|\w+")  # Chinese and Japanese have no spaces: a character is a word
SIGNS = re.compile(r"[^\w\s]")
SAME_LETTERS = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
GRAM = 4


@dataclass(frozen=True)
class Filters:
    """min_words: fewer is near-empty. max_repeated, of the chosen answer, max_repeated_rejected: more is repetitive.
    max_overlap: as much is nearly equal; None: not looked at. All but the first are shares from 0 to 1, see above.
    refusals: phrases.
    """

    refusals: tuple[str, ...] = ()
    min_words: int = 3
    max_repeated: float = 0.4
    max_repeated_rejected: float = 0.4
    max_overlap: float | None = 0.9

    def reject(self, chosen, rejected) -> str | None:
        """Why two completions make no turn, or None. What is wrong with either spoils it."""
        for name, answer in (("chosen", chosen), ("rejected", rejected)):
            reason = self.answer(answer.text, answer.finish, name == "rejected")
            if reason is not None:
                return f"{name}: {reason}"
        if self.max_overlap is not None and overlap(chosen.text, rejected.text) >= self.max_overlap:
            return "chosen equal or nearly equal to rejected"
        return None

    def answer(self, text: str, finish: str = "stop", rejected: bool = False) -> str | None:
        """What is wrong with an answer, or None. finish: "stop" where the model ended it itself, "length" where it ran on
        to the limit.
        """
        words = self.words(text)
        if not words:
            return "empty"
        if not self.ended(finish, rejected):
            return "cut off"
        if sum(map(self.counts, words)) < self.min_words:
            return "near-empty"
        plain = text.translate(SAME_LETTERS).lower()
        if any(phrase.translate(SAME_LETTERS).lower() in plain for phrase in self.refusals):
            return "refusal"
        most = self.max_repeated_rejected if rejected else self.max_repeated
        return "repetitive" if self.repeated(words) > most else None

    def ended(self, finish: str, rejected: bool) -> bool:
        """Whether an answer that ended so is kept."""
        return finish == "stop" or (rejected and finish == "length")

    def words(self, text: str) -> list[str]:
        return split_words(text)

    def counts(self, word: str) -> bool:
        """Whether a word is one of those without which an answer is near-empty."""
        return True

    def repeated(self, words: list[str]) -> float:
        return repeated_share(words)


@dataclass(frozen=True)
class PublishedFilters(Filters):
    """Those of the published recipe; its numbers are the defaults."""

    min_words: int = 2
    max_repeated: float = 0.9
    max_repeated_rejected: float = 0.95
    max_overlap: float | None = None

    def ended(self, finish: str, rejected: bool) -> bool:
        return True

    def words(self, text: str) -> list[str]:
        return SIGNS.sub("", text.lower()).split()

    def counts(self, word: str) -> bool:
        return len(word) >= 3

    def repeated(self, words: list[str]) -> float:
        return sum(count for count in Counter(words).values() if count > 1) / len(words)


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
