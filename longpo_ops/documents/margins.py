"""What stands around a document's text on its pages: running heads and feet, page numbers, line numbers.

    pages of lines --without_numbers--> --without_heads--> the same pages, text alone

A head is the highest line of a page, in its upper sixth and with more room below it than between lines, that stands at the
same height on another page with the same words and numbers, where one number may have grown as the pages did. Where a third
of the pages have such heads, a line that stands apart at their height is one too, whatever it says: chapters change their
names. Feet likewise. A number alone, or the word for a page with one, goes where it stands apart from the text. Line numbers
are whole numbers beside the text that rise by the same step, one below the other, on a third of the pages.
Tests: tests/documents/test_layout.py.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from itertools import pairwise

from .pdf import Line, Page

ROUNDS = 2  # lines of a head, or a foot
ZONE = 1 / 6  # of the page's height
NUMBER = re.compile(r"\d+")
ALONE = re.compile(
    r"[^\w]*(?:page|seite|p\.|第)?\s*(?:\d{1,4}|[ivxlc]{1,8})(?:\s*(?:of|von|/|页|頁)\s*\d*)?[^\w]*", re.I
)
LEADING, ONLY = re.compile(r"(\d{1,5})\s+(?=\S)"), re.compile(r"(\d{1,5})")
RUN = 5  # line numbers of a page that show what they are


def without_heads(pages: list[Page]) -> list[Page]:
    """The pages without running heads, feet and page numbers."""
    for sign in (1, -1):
        for _ in range(ROUNDS):
            edges = [_edge(page, sign) for page in pages]
            gone = _repeated(edges) | {
                i for i, edge in enumerate(edges) if edge and edge.apart and ALONE.fullmatch(edge.text)
            }
            gone |= _at_their_height(edges, gone)
            if not gone:
                break
            pages = [
                page._replace(lines=[line for line in page.lines if line not in edges[i].lines]) if i in gone else page
                for i, page in enumerate(pages)
            ]
    return pages


class Edge:
    """The outermost line of a page, in all its pieces. apart: with more room beside it than lines have between them."""

    def __init__(self, lines: list[Line], rest: list[Line], sign: int):
        self.lines = frozenset(lines)
        self.text = " ".join(line.text for line in sorted(lines, key=lambda line: line.x0)).casefold()
        self.y = lines[0].y
        size = max(line.size for line in lines)
        self.apart = not rest or sign * (self.y - max(sign * line.y for line in rest) * sign) > 1.5 * size


def _edge(page: Page, sign: int) -> Edge | None:
    """The highest line of a page (sign 1) or the lowest (-1), where it stands in the zone of heads or feet."""
    upright = [line for line in page.lines if line.upright]
    if not upright:
        return None
    outer = max(upright, key=lambda line: sign * line.y)
    if (page.height - outer.y if sign > 0 else outer.y) > ZONE * page.height:
        return None
    beside = [line for line in upright if abs(line.y - outer.y) < 0.5 * outer.size]
    return Edge(beside, [line for line in upright if abs(line.y - outer.y) >= 0.5 * outer.size], sign)


def _repeated(edges: list[Edge | None]) -> set[int]:
    """The pages whose edge says what another one's says, at the same height."""
    seen: dict[tuple, list[int]] = defaultdict(list)
    for i, edge in enumerate(edges):
        for form in _forms(edge.text, i) if edge and edge.apart else ():
            seen[form].append(i)
    return {
        i
        for places in seen.values()
        for i, before in zip(places[1:] + places[:-1], places[:-1] + places[1:])
        if abs(edges[i].y - edges[before].y) < 3
    }


def _forms(text: str, page: int) -> set[tuple]:
    """A text with its numbers as they are, and with one of them less the number of the page."""
    numbers = tuple(int(number[:9]) for number in NUMBER.findall(text)[:16])
    frame = NUMBER.sub("#", text)
    grown = {(frame, i, *numbers[:i], numbers[i] - page, *numbers[i + 1 :]) for i in range(len(numbers))}
    return {(frame, *numbers), *grown}


def _at_their_height(edges: list[Edge | None], gone: set[int]) -> set[int]:
    """The pages whose edge stands apart at a height where a third of all pages have a head that repeats."""
    heights = Counter(round(edges[i].y / 3) for i in gone)
    common = {h + step for h, count in heights.items() for step in (-1, 0, 1) if count >= 2 and 3 * count >= len(edges)}
    return {i for i, edge in enumerate(edges) if edge and edge.apart and round(edge.y / 3) in common}


def without_numbers(pages: list[Page]) -> list[Page]:
    """The pages without line numbers, if they have some."""
    found = [_numbers(page.lines, RUN) for page in pages]
    full = sum(len(page.lines) >= 4 * RUN for page in pages)
    if not any(found) or 3 * sum(map(bool, found)) < full:
        return pages
    found = [some or _numbers(page.lines, 2) for page, some in zip(pages, found)]
    return [page._replace(lines=_unnumbered(page.lines, places)) for page, places in zip(pages, found)]


def _numbers(lines: list[Line], enough: int) -> set[int]:
    """Which lines of a page are, or begin with, a line number: `enough` of them."""
    sides: tuple[list, list] = [], []
    middle = (min(line.x0 for line in lines) + max(line.x1 for line in lines)) / 2 if lines else 0
    for place, line in enumerate(lines):
        number = line.upright and (ONLY.fullmatch(line.text) or LEADING.match(line.text))
        if number:
            sides[line.x0 > middle].append((-line.y, int(number[1]), place))
    found: set[int] = set()
    for numbers in sides:
        numbers.sort()
        steps = Counter(after[1] - before[1] for before, after in pairwise(numbers))
        step, count = max(steps.items(), key=lambda item: item[1], default=(0, 0))
        if step > 0 and count + 1 >= enough and 4 * count >= 3 * (len(numbers) - 1):
            found |= {place for _, _, place in numbers}
    return found


def _unnumbered(lines: list[Line], places: set[int]) -> list[Line]:
    left = Counter(round(line.x0) for line in lines).most_common(1)[0][0] if lines else 0
    kept = []
    for place, line in enumerate(lines):
        if place not in places:
            kept.append(line)
        elif number := LEADING.match(line.text):
            share = number.end() / len(line.text)
            x0 = max(line.x0 + share * (line.x1 - line.x0), left)
            kept.append(line._replace(text=line.text[number.end() :], x0=min(x0, line.x1)))
    return kept
