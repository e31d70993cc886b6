"""Haystacks: a line of noise that repeats, or prose from local text; and how needles get into them.

    units  u_1 u_2 .. u_n    words or lines, each with the whitespace before it
    gaps   0 .. n            where a needle may lie: around lines, and in prose between sentences

RULER's prose is a set of essays that it downloads. Here it is Python's own documentation (`pydoc_data.topics`, 110
thousand tokens or so), or the files a user names. Text shorter than a sample goes on from its beginning; a sample
starts at a drawn sentence, so that short ones do not all read the same. Memory: about 200 bytes per word of text.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

from ..generate.documents import WIDE, Listing, find_files, read_documents

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
LARGEST = 16_000_000  # characters read of the user's files: more than the longest context holds
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


@dataclass(frozen=True)
class Texts:
    """Where prose and questions come from.

    sources: files, folders or globs of texts in any format that documents come in; none: Python's documentation.
    questions: a JSON file in SQuAD's or HotpotQA's published format, or a folder of such files; None: cloze questions
    about the texts. Read when first needed; raises ValueError for what cannot be read.
    """

    sources: tuple[str, ...] = ()
    questions: str | None = None

    @cached_property
    def documents(self) -> tuple[str, ...]:
        """The texts, as they are."""
        if not self.sources:
            from pydoc_data.topics import topics

            return tuple(topics[name] for name in sorted(topics))
        listing, texts, size = Listing(), [], 0
        for document in read_documents(find_files(self.sources), listing):
            if document.text.strip():
                texts.append(document.text)
                size += len(document.text)
            if size > LARGEST:
                break
        if not texts:
            reasons = ", ".join(listing.skipped) or "empty"
            raise ValueError(f"no text in {', '.join(self.sources)} ({reasons}); expected files with readable text")
        return tuple(texts)

    @cached_property
    def prose(self) -> Prose:
        """The texts one after another, with their line breaks."""
        return Prose.read("".join(f"\n\n{text.strip()}" for text in self.documents))

    @cached_property
    def essay(self) -> Prose:
        """The same with a single space wherever there is whitespace, as RULER has its essays."""
        words = (" " + word.lstrip() if word[0].isspace() else word for word in self.prose.words)
        return Prose(tuple(words), self.prose.sentences)

    @cached_property
    def published(self) -> dict:
        """The pools of the user's questions, by format: "squad", "hotpotqa"."""
        from .questions import read_pools  # which needs this module

        return {} if self.questions is None else read_pools(self.questions)

    @cached_property
    def local(self):
        """The pool of questions made from the texts."""
        from .questions import local_pool

        return local_pool(self.documents)
