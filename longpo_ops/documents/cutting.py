"""A text that is too long to a few of nearly the same length, parted at its own structure.

    T tokens, parts of more than `first` and at most `last` --> n = ceil(T / last) parts, each near T / n

Each part ends at the break of the highest rank (structure.py) that lies within a fifth of the length that would make what
is left even, and among equals at the nearest. A break is passed over where what is left could not be parted any more, so
nothing is lost where n parts of more than `first` tokens are possible: always, if last >= 2 * first. Else as many parts of
nearly `last` tokens as there can be are taken, and the rest is told. Where no break is in reach (a picture in base64) a
part ends between two letters.

    short texts of one folder --a blank line between--> one text --the same, seams first--> joined documents

Memory: the text, 16 bytes per character while its breaks are looked for, and 8 bytes per token.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..text import one_line
from .structure import HEADING, SEAM, find_breaks, heading_at
from .tokens import fast_backend, tokens_alone

SEPARATOR = "\n\n"  # between texts that are joined
MARGIN = 8  # tokens a part may have more or fewer alone than in its text, kept free at both bounds
FULL = 0.97  # parts are planned no longer than this share of the most, so that a break is in reach
EVEN = 0.2  # how far from the even length a better break is looked for
FULLEST = 0.95  # where a rest is lost: the shortest part, as a share of the most


@dataclass(frozen=True)
class Part:
    """A stretch [begin, end) of a text, without outer whitespace where it is one of several. tokens: as a text of its own.
    heading: that it begins with or lies under. starts, breaks: of its tokens and structure, counted from `begin`.
    """

    begin: int
    end: int
    tokens: int
    heading: str | None
    starts: np.ndarray
    breaks: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Rest:
    """A stretch [begin, end) of a text that is in no part, as it is too short."""

    begin: int
    end: int


class Cutter:
    """Cuts texts into parts of more than `first` and at most `last` tokens, with a fast transformers tokenizer. Raises
    ValueError for bounds that make no sense and for a tokenizer that is not fast.
    """

    def __init__(self, tokenizer, first: int, last: int):
        if not 0 <= first < last:
            raise ValueError(f"documents of {first} to {last} tokens; expected 0 <= first < last")
        self.backend, self.first, self.last = fast_backend(tokenizer), first, last
        margin = MARGIN if last - first > 8 * MARGIN else 0
        self.least, self.most = first + 1 + margin, last - margin

    def cut(self, text: str, starts: np.ndarray, seams: Sequence[int] = ()) -> Iterator[Part | Rest]:
        """The parts of a text, and what is in none, in order; together they are the text but for whitespace at their ends.

        starts: where its tokens start. seams: places that are better than any other. A text in bounds is one part.
        """
        breaks = _Breaks(text, starts, seams)
        if len(starts) <= self.first:
            yield Rest(0, len(text))
            return
        if len(starts) <= self.last:
            yield breaks.part(0, len(text), len(starts))
            return
        begin = 0
        for end in [*self._ends(breaks), len(text)]:
            first, last = breaks.stripped(begin, end)
            tokens = tokens_alone(self.backend, text, first, last, starts)
            if self.first < tokens <= self.last:
                yield breaks.part(first, last, tokens)
            elif first < last:
                yield Rest(first, last)
            begin = end

    def _ends(self, breaks: _Breaks) -> Iterator[int]:
        """The characters at which one part ends and the next begins, and, where a rest is lost, the last one ends."""
        total, done = len(breaks.starts), 0
        number, whole = self._number(total)
        for left in range(number, 1 if whole else 0, -1):
            rest = total - done
            even, low, high = self.most, max(self.least, int(FULLEST * self.most)), self.most
            if whole:
                even = rest // left
                low = max(self.least, rest - (left - 1) * self.most)
                high = min(self.most, rest - (left - 1) * self.least)
            easy = rest - (left - 1) * int(FULL * self.most) if whole else low  # what follows has a break in reach, too
            end = breaks.best(done, max(low, easy, int((1 - EVEN) * even)), min(high, int((1 + EVEN) * even)), even)
            if end is None:
                end = breaks.best(done, low, high, even)
            if end is None:
                end = _between_letters(breaks.text, int(breaks.starts[done + even]))
            done = int(np.searchsorted(breaks.starts, end))
            yield end

    def _number(self, total: int) -> tuple[int, bool]:
        """How many parts there are, and whether they can hold the whole."""
        for most in (FULL * self.most, self.most):
            number = math.ceil(total / most)
            if number * self.least <= total:
                return number, True
        return total // self.most, False


class _Breaks:
    """The breaks of a text: places, ranks, and the tokens before each."""

    def __init__(self, text: str, starts: np.ndarray, seams: Sequence[int]):
        self.text, self.starts = text, starts
        places, ranks = find_breaks(text)
        if len(seams):
            other = ~np.isin(places, seams)
            places, ranks = np.append(places[other], seams), np.append(ranks[other], np.full(len(seams), SEAM, np.int8))
            order = np.argsort(places)
            places, ranks = places[order], ranks[order]
        self.places, self.ranks, self.tokens = places, ranks, np.searchsorted(starts, places)
        self.headings = places[(ranks >= HEADING) & (ranks < SEAM)]

    def best(self, done: int, low: int, high: int, even: int) -> int | None:
        """The place of the highest rank from `low` to `high` tokens behind `done`, of several the one nearest `even`."""
        first = int(np.searchsorted(self.tokens, done + low))
        last = int(np.searchsorted(self.tokens, done + high, side="right"))
        if first >= last:
            return None
        equals = first + np.flatnonzero(self.ranks[first:last] == self.ranks[first:last].max())
        return int(self.places[equals[np.argmin(np.abs(self.tokens[equals] - done - even))]])

    def stripped(self, begin: int, end: int) -> tuple[int, int]:
        """The stretch without outer whitespace."""
        stretch = self.text[begin:end]
        first = begin + len(stretch) - len(stretch.lstrip())
        return first, max(first, begin + len(stretch.rstrip()))

    def part(self, begin: int, end: int, tokens: int) -> Part:
        above = int(np.searchsorted(self.headings, begin, side="right"))
        heading = one_line(heading_at(self.text, int(self.headings[above - 1]))) if above else ""
        inside = slice(np.searchsorted(self.places, begin, side="right"), np.searchsorted(self.places, end))
        breaks = np.append(self.places[inside] - begin, end - begin), np.append(self.ranks[inside], self.ranks[-1])
        there = slice(*np.searchsorted(self.starts, [begin, end]))
        return Part(begin, end, tokens, heading or None, self.starts[there] - begin, breaks)


@dataclass(frozen=True)
class Piece:
    """A text that is joined with others: where it is from, and where it begins in that source's text."""

    text: str
    source: str
    begin: int = 0


def joined(pieces: Sequence[Piece]) -> tuple[str, list[int]]:
    """One text of several, and where each begins in it."""
    places, at = [], 0
    for piece in pieces:
        places.append(at)
        at += len(piece.text) + len(SEPARATOR)
    return SEPARATOR.join(piece.text for piece in pieces), places


def pieces_of(part: Part | Rest, pieces: Sequence[Piece], places: Sequence[int]) -> list[tuple[int, int, int]]:
    """Which pieces a stretch of their joined text has something of, and which characters of each: (number, begin, end)."""
    spans = (
        (number, max(part.begin, place) - place, min(part.end, place + len(piece.text)) - place)
        for number, (piece, place) in enumerate(zip(pieces, places))
    )
    return [span for span in spans if span[1] < span[2]]


def _between_letters(text: str, place: int) -> int:
    """The nearest place from here on backwards, 64 characters at most, that takes no sign from its letter."""
    for at in range(place, max(0, place - 64), -1):
        sign = unicodedata.category(text[at]).startswith("M") or text[at] in "\u200c\u200d"
        if not sign and text[at - 1] not in "\u200d\u17d2\u1039":
            return at
    return place
