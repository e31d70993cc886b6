"""Pages of lines to a text as a person reads it.

    pages --margins--> without heads, feet, numbers --columns--> in reading order --notes set aside--> --joined--> text

Lines are one paragraph where the first of two is full: the next one's first word had no room on it. A line that begins
further right than the one before it begins a paragraph, unless the next one does so too (a hanging list); so does a larger
step down, or another size of letters. What has wide gaps (a row of a table, an entry of a list of contents) or leaves room at
its end (code, verse, an address) keeps its line. A paragraph goes on over the end of a column or a page, unless its last line
ends a sentence; notes at the foot of a column follow the paragraph that they interrupt.

A hyphen at the end of a line goes, unless it belongs to the word: the document has the word with it elsewhere and never
without, or a part has a hyphen, a digit or a capital letter at the place.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from statistics import median

from ..text import WIDE as UNSPACED
from .columns import glued, in_order
from .margins import without_heads, without_numbers
from .pdf import Line, Page, pages
from .unreadable import NO_LIMIT, TOO_LONG, Unreadable

LIGATURES = str.maketrans({0xFB00 + i: form for i, form in enumerate(("ff", "fi", "fl", "ffi", "ffl", "st", "st"))})
UNSEEN = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u2060\ud800-\udfff\ue000-\uf8ff\ufeff\ufff0-\uffff]")
SPACES = re.compile(r"[ \t\xa0\u2000-\u200a\u202f]+")
WIDE = re.compile(f"[{UNSPACED}]")
WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")
SENTENCE = re.compile(r"[.!?:;。！？：；][\"'”’»)\]]*$")
BULLET = re.compile(r"[•◦▪▸►‣∙·*]\s")
ITEM = re.compile(r"[•◦▪▸►‣∙·*–-]\s|\[\d+\]\s|\(?\d{1,3}[.)]\s|\(?[a-z][.)]\s")
CODE = re.compile(r"[{}%\\]$")  # what a line of prose does not end with
CAPTION = re.compile(r"(?:fig(?:ure|\.)?|table|tab\.|abb(?:ildung|\.)|algorithm|listing|图|表|圖)\s*\d", re.I)
LEADERS = re.compile(r"(?:\. ?){4,}|…{2,}|(?:· ?){4,}")
NO_TEXT = Unreadable("PDF without text (scanned pages are pictures: run OCR on them first, as with ocrmypdf)")
NOTE = 0.92  # of the text's size of letters: what is smaller at the foot of a column is a note
SPARSE = 1.35  # times the usual width of a character: there are gaps in the line


def read_pdf(source: Path | bytes, limit: int = NO_LIMIT) -> str:
    """The text of a PDF as a person reads it, or why there is none. limit: bytes of the longest text that is wanted; reading
    ends where the pages hold twice as much. Raises what pdf.pages raises."""
    read, length = [], 0
    for page in pages(source):
        if isinstance(page, Unreadable):
            return page
        read.append(page)
        length += sum(len(line.text) for line in page.lines)
        if length > 2 * limit:
            return TOO_LONG
    return as_read(read) or NO_TEXT


def as_read(pages: Iterable[Page]) -> str:
    """The text of pages: paragraphs in one line each, a blank line between them, "" where there is none."""
    pages = without_numbers([cleaned(page) for page in pages])
    pages = without_heads([page._replace(lines=glued(page.lines)) for page in pages])
    columns = [column for page in pages for column in in_order(page)]
    return Prose(columns).text()


def cleaned(page: Page) -> Page:
    """A page whose characters all say something."""
    lines = []
    for line in page.lines:
        text = SPACES.sub(" ", UNSEEN.sub("", line.text.translate(LIGATURES))).strip()
        if text:
            hyphen = line.hyphen or line.text.endswith("\xad")
            if len(text) > 2 and text[-1] in "-\u2010" and text[-2].isalpha():
                text, hyphen = text[:-1], True
            lines.append(line._replace(text=text, hyphen=hyphen))
    return page._replace(lines=lines)


def width(text: str) -> int:
    """In letters: Chinese characters are as wide as two."""
    return len(text) + len(WIDE.findall(text))


class Prose:
    """The columns of a document, joined. What is usual in it (sizes, steps, words) is counted first."""

    def __init__(self, columns: list[list[Line]]):
        self.columns = columns
        lines = [line for column in columns for line in column]
        ends = Counter(round(line.x1 / 2) for line in lines)
        self.ends = sorted(2.0 * end for end, count in ends.items() if 30 * count > len(lines))
        sizes = Counter()
        for line in lines:
            sizes[round(line.size, 1)] += len(line.text)
        self.size = sizes.most_common(1)[0][0] if sizes else 1.0
        steps = [
            (before.y - after.y) / self.size
            for column in columns
            for before, after in pairwise(column)
            if 0.8 * self.size < before.y - after.y < 2.5 * self.size and abs(before.size - self.size) < 0.5
        ]
        self.step = median(steps) if steps else 1.2  # from line to line, in sizes
        shares = [self._share(line) for line in lines if abs(line.size - self.size) < 0.5 and len(line.text) > 20]
        self.share = median(shares or [0.5])
        self.words = Counter()
        for line in lines:
            self.words.update(word.casefold() for word in WORD.findall(line.text)[1:-1])

    @staticmethod
    def _share(line: Line) -> float:
        """The width of one of its characters, in sizes."""
        return (line.x1 - line.x0) / (width(line.text) * (line.size or 1))

    def text(self) -> str:
        """All of it."""
        out = Paragraphs(self.words)
        before = edges_before = None
        notes: list[list[Line]] = []
        for column in self.columns:
            body, note = self._notes(column)
            edges = Edges(body, self.ends)
            between = self._over_the_seam(before, edges_before, body[0], edges) if before else ""
            if between is not None:
                notes = self._write_notes(out, notes)
            self._write(out, body, edges, between)
            before, edges_before = body[-1], edges
            notes += [note] if note else []
        self._write_notes(out, notes)
        return out.text()

    def _write_notes(self, out: Paragraphs, notes: list[list[Line]]) -> list:
        for note in notes:
            self._write(out, note, Edges(note, self.ends), "\n\n")
        return []

    def _write(self, out: Paragraphs, lines: list[Line], edges: Edges, between: str | None) -> None:
        """Lines of one column, the first of them after `between`."""
        out.add(lines[0], between)
        for i, line in enumerate(lines[1:], 1):
            after = lines[i + 1] if i + 1 < len(lines) else None
            goes_on = between is None
            between = self._between(lines[i - 1], goes_on, line, after, edges)
            out.add(line, between)

    def _notes(self, column: list[Line]) -> tuple[list[Line], list[Line]]:
        """The text of a column, and the notes below it."""
        end = len(column)
        while end and column[end - 1].size < NOTE * self.size:
            end -= 1
        return (column[:end], column[end:]) if end else (column, [])

    def _between(self, before: Line, goes_on: bool, line: Line, after: Line | None, edges: Edges) -> str | None:
        """What stands between two lines of a column: None where they are one paragraph's. goes_on: the first one is not the
        first of its paragraph."""
        size, down, indent = max(before.size, line.size), before.y - line.y, line.x0 - before.x0
        if not (before.upright and line.upright):
            return "\n" if before.upright == line.upright else "\n\n"
        if down < 0.4 * size:  # beside it, or the pieces of a formula
            return "\n"
        if abs(before.size - line.size) > 0.12 * size or down > 1.3 * self.step * size:
            return "\n\n"
        full = edges.full(before, line)
        if self._apart(before) or self._apart(line) or BULLET.match(line.text) or CODE.search(before.text):
            return "\n"
        if ITEM.match(line.text) and (not full or abs(indent) > 0.3 * size or SENTENCE.search(before.text)):
            return "\n"
        if indent > 0.6 * size and not ITEM.match(before.text):
            hangs = (
                after is not None and abs(after.x0 - line.x0) < 1.5 and 0 < line.y - after.y < 1.3 * self.step * size
            )
            if not hangs or not full or goes_on:
                return "\n\n"
        elif indent < -0.6 * size and goes_on and not before.hyphen:
            return "\n"  # a hanging list goes on
        return None if full else "\n"

    def _over_the_seam(self, before: Line, left: Edges, line: Line, right: Edges) -> str | None:
        """What stands between the last line of a column and the first one of the next."""
        size = max(before.size, line.size)
        same = before.upright and line.upright and abs(before.size - line.size) <= 0.12 * size
        if not same or self._apart(before) or self._apart(line) or ITEM.match(line.text) or CAPTION.match(line.text):
            return "\n\n"
        goes_on = line.text[0].islower() or not SENTENCE.search(before.text)
        return None if before.hyphen or (goes_on and left.full(before, line) and right.begins(line)) else "\n\n"

    def _apart(self, line: Line) -> bool:
        """Whether a line has gaps or leaders in it."""
        return bool(LEADERS.search(line.text)) or (len(line.text) > 3 and self._share(line) > SPARSE * self.share)


class Paragraphs:
    """A text that grows line by line. words: how often the document has each word."""

    def __init__(self, words: Counter[str]):
        self.words, self.parts, self.before = words, [], None

    def text(self) -> str:
        """All that was added."""
        return "".join(self.parts + (["-"] if self.before and self.before.hyphen else [])).strip()

    def add(self, line: Line, between: str | None) -> None:
        """A line after what stands between it and the one before; None: in the same paragraph."""
        before, self.before = self.before, line
        if before and before.hyphen and (between is not None or self._belongs(before.text, line.text)):
            self.parts.append("-")
        if between is None and not before.hyphen:
            wide = WIDE.match(before.text[-1]) and WIDE.match(line.text[0])
            between = "" if wide or before.text[-1] in "—/" else " "
        self.parts.append((between or "") + line.text)

    def _belongs(self, before: str, after: str) -> bool:
        """Whether the hyphen between two parts of a word is the word's own."""
        left, right = before.rsplit(" ", 1)[-1], after.split(" ", 1)[0]
        if not right[0].islower() or not left[-1:].islower() or "-" in left or "/" in left:
            return True
        first, second = (WORD.findall(part) for part in (left, right))
        if not first or not second:
            return True
        first, second = first[-1].casefold(), second[0].casefold()
        whole, parted = self.words[first + second], self.words[f"{first}-{second}"]
        if whole or parted:
            return parted > whole
        return min(len(first), len(second)) > 3 and min(self.words[first], self.words[second]) > 1


class Edges:
    """Where the lines of a column begin and end. known: where many lines of the document end."""

    def __init__(self, lines: list[Line], known: list[float]):
        begins = Counter(round(line.x0 / 2) for line in lines)
        ends = Counter(round(line.x1 / 2) for line in lines)
        self.left = 2.0 * min((x for x, count in begins.items() if count > 2), default=min(begins))
        widest = 2.0 * max(ends)
        own = [2.0 * x for x, count in ends.items() if count > 2]
        self.right = max(own) if own else next((x for x in known if x > widest - 2), widest)
        self.even = {id(line) for pair in pairwise(lines) if abs(pair[0].x1 - pair[1].x1) < 1.5 for line in pair}

    def full(self, line: Line, after: Line) -> bool:
        """Whether the first word of the next line had no room on this one."""
        if line.hyphen or (len(line.text) > 40 and id(line) in self.even):
            return True
        word = after.text.split(" ", 1)[0]
        room = (width(word[:1] if WIDE.match(word) else word) + 1) * (after.x1 - after.x0) / max(1, width(after.text))
        return self.right - line.x1 < room

    def begins(self, line: Line) -> bool:
        """Whether a line begins at the column's left edge."""
        return line.x0 - self.left < 0.6 * line.size
