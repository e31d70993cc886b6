"""The lines of a page in the order in which a person reads them, parted where a column ends.

    lines of a page --glued--> raised and lowered pieces at their words --in_order--> columns of lines, top to bottom

Writers draw nearly every page in its reading order, columns and floats included, so that order stands unless the places deny
it: where two full columns are drawn row by row, or the right one first, each goes top to bottom between the lines that cross
both; where lines of one column leap up and down, they are sorted.
Tests: tests/documents/test_layout.py.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from .pdf import Line, Page

LEAP = 3.0  # upwards, in font sizes: a new column begins
COLUMN = 5  # lines that a column has at least


def glued(lines: list[Line]) -> list[Line]:
    """Raised and lowered pieces, which PDFium gives as lines of their own, joined to what they stand beside."""
    found: list[Line] = []
    x0 = x1 = 0.0  # of the piece that came last
    for line in lines:
        last = found[-1] if found else None
        if last and last.upright and line.upright and not last.hyphen and _beside(last, x0, x1, line):
            size = max(last.size, line.size)
            space = " " if line.x0 - x1 > 0.15 * size else ""
            higher = last if last.size >= line.size else line
            found[-1] = Line(
                last.text + space + line.text, last.x0, max(last.x1, line.x1), higher.y, size, line.hyphen, True
            )
        else:
            found.append(line)
        x0, x1 = line.x0, line.x1
    return found


def _beside(last: Line, x0: float, x1: float, line: Line) -> bool:
    size = max(last.size, line.size)
    if abs(line.y - last.y) >= 0.7 * size or line.x0 - x1 > 1.5 * size:
        return False
    small = min(last.size, line.size) < 0.9 * size or x1 - x0 < size
    return line.x0 >= x1 - 0.3 * size or (small and line.x0 >= x0 - 1 and line.x1 >= last.x1 - size)


def in_order(page: Page) -> list[list[Line]]:
    """The columns of a page, one after the other; a page of one column is one."""
    lines = page.lines
    gutter = _gutter(page)
    if gutter is not None:
        if not _told_apart(lines, gutter):
            lines = _by_columns(lines, gutter)
    elif sum(b.y > a.y + LEAP * b.size for a, b in pairwise(lines)) > 0.2 * len(lines) + 1:
        lines = sorted(lines, key=lambda line: (-line.y, line.x0))
    columns: list[list[Line]] = []
    side = None
    for line in lines:
        crosses = gutter is not None and line.x0 < gutter < line.x1
        if not columns or crosses != side or (line.upright and line.y > columns[-1][-1].y + LEAP * line.size):
            columns.append([])
        columns[-1].append(line)
        side = crosses
    return columns


def _gutter(page: Page) -> float | None:
    """Where the right one of two full columns begins, if the page has two."""
    starts = Counter(round(line.x0 / 2) for line in page.lines if line.upright and line.x0 > 0.35 * page.width)
    if not starts:
        return None
    gutter = 2.0 * starts.most_common(1)[0][0] - 2
    left = [line for line in page.lines if line.x1 <= gutter]
    right = [line for line in page.lines if line.x0 >= gutter]
    if min(len(left), len(right)) < COLUMN or 2 * (len(left) + len(right)) < len(page.lines):
        return None
    if not all(_full(column, page.width) for column in (left, right)):
        return None
    low, high = (pick(pick(line.y for line in side) for side in (left, right)) for pick in (min, max))
    overlap = min(max(line.y for line in side) for side in (left, right)) - max(
        min(line.y for line in side) for side in (left, right)
    )
    return gutter if overlap > 0.3 * (high - low) else None


def _full(column: list[Line], width: float) -> bool:
    """Whether lines fill a column that is wide enough for prose."""
    x0, x1 = min(line.x0 for line in column), max(line.x1 for line in column)
    wide = sum(line.x1 - line.x0 > 0.7 * (x1 - x0) for line in column)
    return x1 - x0 > 0.25 * width and 2 * wide > len(column)


def _told_apart(lines: list[Line], gutter: float) -> bool:
    """Whether lines come column by column: never from the right column up to the left one, seldom down to it."""
    sides = [(line.x0 >= gutter, line.y) for line in lines if line.upright and (line.x1 <= gutter or line.x0 >= gutter)]
    back = [(before, after) for (right, before), (to, after) in pairwise(sides) if right and not to]
    return not any(after > before for before, after in back) and len(back) <= max(3, len(sides) // 12)


def _by_columns(lines: list[Line], gutter: float) -> list[Line]:
    """Between the lines that cross the gutter, the left column and then the right one, each top to bottom."""
    band: tuple[list[Line], list[Line]] = ([], [])
    ordered: list[Line] = []

    def close() -> None:
        for side in band:
            ordered.extend(side)
            side.clear()

    for line in sorted(lines, key=lambda line: (-line.y, line.x0)):
        if line.x1 > gutter > line.x0:
            close()
            ordered.append(line)
        else:
            band[line.x0 >= gutter].append(line)
    close()
    return ordered
