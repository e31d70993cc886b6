"""Haystacks: a line of noise that repeats, or prose from local text; and how needles get into them.

    units  u_1 u_2 .. u_n    words or lines, each with the whitespace before it
    gaps   0 .. n            where a needle may lie: around lines, and in prose between sentences

Text shorter than a sample goes on from its beginning; a sample starts at a drawn sentence, so that short ones do not all
read the same. Memory: about 200 bytes per word of text.

Tests: tests/evaluate/test_needles.py.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from ..text import WIDE

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
WORD = re.compile(rf"\s*(?:[{WIDE}][\u3001\u3002\u300d\u300f\uff01\uff0c\uff1f]*|[^\s{WIDE}]+)")
END = re.compile(r"[.!?\u3002\uff01\uff1f][\"'\u2019\u201d)\]\u300d\u300f]*\Z")
GAP = re.compile(r"[^\S\n]*\n[^\S\n]*\n")  # an empty line
HOLE = re.compile(r"\{(\w+)\}")


def fill(template: str, **values: str) -> str:
    """The template with {name} replaced, in one pass: what is put in is never looked at. Other braces stay."""
    return HOLE.sub(lambda hole: values.get(hole[1], hole[0]), template)


def scatter(
    random: Random, units: Sequence[str], inserts: Sequence[str], gaps: Sequence[int] | None = None
) -> tuple[str, list[int]]:
    """-> units with inserts between them, in order, at gaps drawn at random; and the character where each begins.

    gaps: places 0 .. len(units) that may be drawn, all by default. A gap is drawn once, unless there are too few.
    """
    gaps = range(len(units) + 1) if gaps is None else gaps
    few = len(inserts) > len(gaps)
    places = sorted(random.choices(gaps, k=len(inserts)) if few else random.sample(gaps, len(inserts)))
    parts, starts, length, at = [], [], 0, 0
    for place, insert in zip(places, inserts):
        before = "".join(units[at:place])
        starts.append(length + len(before))
        parts += [before, insert]
        length, at = length + len(before) + len(insert), place
    text = "".join([*parts, *units[at:]])
    cut = len(text) - len(text.lstrip())  # whitespace of what came first
    return text[cut:], [max(0, start - cut) for start in starts]


@dataclass(frozen=True)
class Prose:
    """A text as words, each with the whitespace before it, and the words that begin a sentence, in order."""

    words: tuple[str, ...]
    sentences: tuple[int, ...]

    @classmethod
    def read(cls, text: str) -> Prose:
        """A sentence ends with its punctuation and at an empty line. In Chinese and Japanese a character is a word."""
        words, sentences, ended = WORD.findall(text), [], True
        for i, word in enumerate(words):
            if ended or GAP.match(word):
                sentences.append(i)
            ended = END.search(word) is not None
        return cls(tuple(words), tuple(sentences))

    def stretch(self, random: Random, count: int) -> tuple[list[str], list[int]]:
        """-> `count` words from a drawn sentence on, round and round; and the gaps (0 .. count) before sentences."""
        first, size = random.choice(self.sentences), len(self.words)
        words = [*self.words[first:], *self.words[:first]]
        gaps = [(place - first) % size for place in self.sentences]
        turn = bisect_left(self.sentences, first)
        gaps = gaps[turn:] + gaps[:turn]
        rounds = -(-count // size)
        words, gaps = words * rounds, [gap + size * i for i in range(rounds + 1) for gap in gaps]
        return words[:count], gaps[: bisect_right(gaps, count)]  # not behind a sentence cut short
