"""One PDF to the lines of its pages, with their places, as PDFium finds them.

    file --PDFium--> characters in the order of drawing, lines told apart --pages--> [Line] of every page

layout.py makes of them a text as a person reads it. Places are in points, from the lower left of the page as it is shown.
PDFium reads a character in 1.8 us on one core, a tenth of pypdf's time; some ten calls a line ask for places. It is C++ and
opens what anybody wrote, so apart.py runs it in a process of its own. Memory: one page, and the file where it came packed.
"""

from __future__ import annotations

import ctypes
import re
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .unreadable import Unreadable

HYPHENS = "\ufffe\2"  # PDFium's sign for a hyphen at the end of a line together with that end
LINE = re.compile(f"([^\r\n{HYPHENS}]*)(\r\n|[\r\n{HYPHENS}]|\\Z)")
MARK = re.compile(r"\A(\d{1,3}|[∗*†‡§¶]+)(?=[^\W\d])")  # a footnote's, raised before its first word
BEYOND = re.compile(r"[\U00010000-\U0010ffff]")
SPACE = re.compile(r" (?=\S)")
SAMPLE = 4  # wide lines of a page that are searched for a gap
GAP = 0.9  # between two columns, in sizes
SKEW = 0.2  # the sine from which on a line is not upright
ENCRYPTED = Unreadable("encrypted PDF (remove its password first)")
PASSWORD = 4  # FPDF_ERR_PASSWORD


class Line(NamedTuple):
    """What stands on one line, from x0 to x1 on the base line y, in letters of `size` points.

    hyphen: one stood at the end, which `text` lacks. upright: neither up nor down the page.
    """

    text: str
    x0: float
    x1: float
    y: float
    size: float
    hyphen: bool = False
    upright: bool = True


class Page(NamedTuple):
    """The lines of a page in the order in which they are drawn, and its width and height in points."""

    lines: list[Line]
    width: float
    height: float


def pages(source: Path | bytes) -> Iterator[Page | Unreadable]:
    """The pages of a PDF that can be read, or why there are none. An empty user password opens it.

    Raises ImportError without pypdfium2, and its PdfiumError for what is no PDF.
    """
    import pypdfium2
    import pypdfium2.raw as pdfium

    try:
        document = pypdfium2.PdfDocument(source)
    except pypdfium2.PdfiumError as error:
        if error.err_code != PASSWORD:
            raise
        yield ENCRYPTED
        return
    for number in range(len(document)):
        page = pdfium.FPDF_LoadPage(document, number)
        if not page:
            continue
        text = pdfium.FPDFText_LoadPage(page)
        if text:
            yield _page(pdfium, page, text)
            pdfium.FPDFText_ClosePage(text)
        pdfium.FPDF_ClosePage(page)
    document.close()


def _page(pdfium, page, text) -> Page:
    width, height = pdfium.FPDF_GetPageWidthF(page), pdfium.FPDF_GetPageHeightF(page)
    whole = characters(pdfium, text)
    place = Places(pdfium, text, whole, pdfium.FPDFPage_GetRotation(page), width, height)
    lines, spans = [], []
    for found in LINE.finditer(whole):
        if stripped := found[1].strip():
            first = found.start() + len(found[1]) - len(found[1].lstrip())
            spans.append((first, first + len(stripped) - 1))
            lines.append(place.line(stripped, *spans[-1], found[2] in HYPHENS and found[2] != ""))
    return Page(_parted(lines, spans, place, width), width, height)


def _parted(lines: list[Line], spans: list[tuple[int, int]], place: Places, width: float) -> list[Line]:
    """Lines that hold the lines of two columns, drawn row by row, parted where all have a gap; others as they are.

    Few lines are looked at before all are. Both parts must be prose: most of them as wide as their column.
    """
    wide = [i for i, line in enumerate(lines) if line.upright and line.x1 - line.x0 > 0.55 * width]
    if len(wide) < 2 * SAMPLE:
        return lines
    gaps = [place.gap(lines[i], spans[i][0], width / 2) for i in wide[:: len(wide) // SAMPLE]]
    if sum(gap is not None for gap in gaps) < SAMPLE - 1:
        return lines
    parts = {i: (lines[i], place.gap(lines[i], spans[i][0], width / 2)) for i in wide}
    halves = {i: _halves(line, spans[i], gap, place) for i, (line, gap) in parts.items() if gap}
    for side in (0, 1):
        widths = sorted(half[side].x1 - half[side].x0 for half in halves.values())
        if 3 * len(halves) < 2 * len(wide) or widths[len(widths) // 2] < max(0.8 * widths[-1], 0.25 * width):
            return lines
    return [part for i, line in enumerate(lines) for part in halves.get(i, (line,))]


def _halves(line: Line, span: tuple[int, int], gap: int, place: Places) -> tuple[Line, Line]:
    return (
        place.line(line.text[:gap], span[0], span[0] + gap - 1, False),
        place.line(line.text[gap + 1 :], span[0] + gap + 1, span[1], line.hyphen),
    )


def characters(pdfium, text) -> str:
    """All characters of a page, PDFium's spaces and line ends among them."""
    count = pdfium.FPDFText_CountChars(text)
    if count <= 0:
        return ""
    buffer = ctypes.create_string_buffer(4 * count + 4)
    written = pdfium.FPDFText_GetText(text, 0, count, ctypes.cast(buffer, ctypes.POINTER(ctypes.c_ushort)))
    return buffer.raw[: 2 * max(0, written - 1)].decode("utf-16-le", "replace")


class Places:
    """Asks PDFium where characters stand."""

    def __init__(self, pdfium, text, whole: str, rotation: int, width: float, height: float):
        self.pdfium, self.text = pdfium, text
        self.pairs = [found.start() for found in BEYOND.finditer(whole)]  # characters that are two of PDFium's
        self.turn = {  # from the page as it is written to the page as it is shown
            1: lambda x, y: (y, height - x),
            2: lambda x, y: (width - x, height - y),
            3: lambda x, y: (width - y, x),
        }.get(rotation)
        self.quarter = rotation % 2 == 1
        self.numbers = [ctypes.c_double() for _ in range(4)]
        self.matrix = pdfium.FS_MATRIX()

    def index(self, place: int) -> int:
        """PDFium's number of the character at a place of the text."""
        return max(0, self.pdfium.FPDFText_GetCharIndexFromTextIndex(self.text, place + bisect_left(self.pairs, place)))

    def line(self, words: str, first: int, last: int, hyphen: bool) -> Line:
        """The line between two places of the text, both inclusive. Its size and height are the larger end's: the other one
        may be a raised mark."""
        begin, end = self.index(first), self.index(last)
        x, y, size, upright = self._origin(begin)
        _, y_end, size_end, _ = self._origin(end)
        x1 = self._span(end)[1]
        if upright and size_end > size:
            if size < 0.85 * size_end:
                words = MARK.sub(r"\1 ", words)
            y, size = y_end, size_end
        return Line(words, x, max(x, x1), y, size, hyphen, upright)

    def gap(self, line: Line, first: int, middle: float) -> int | None:
        """Which character of a line is the space in a gap wider than GAP that has the middle of the page within 3 sizes."""
        extent = line.x1 - line.x0
        for found in SPACE.finditer(line.text):
            if abs(line.x0 + extent * found.start() / len(line.text) - middle) > 0.15 * extent:
                continue
            at = first + found.start()
            (_, before), (after, _) = self._span(self.index(at - 1)), self._span(self.index(at + 1))
            if after - before > GAP * line.size and before - 3 * line.size < middle < after + 3 * line.size:
                return found.start()
        return None

    def _span(self, index: int) -> tuple[float, float]:
        """Where a character begins and ends."""
        self.pdfium.FPDFText_GetCharBox(self.text, index, *self.numbers)
        left, right, low, high = (number.value for number in self.numbers)
        ends = self._turned(left, low)[0], self._turned(right, high)[0]
        return min(ends), max(ends)

    def _origin(self, index: int) -> tuple[float, float, float, bool]:
        """Where a character stands, its size, and whether it is upright."""
        x, y = self.numbers[:2]
        self.pdfium.FPDFText_GetCharOrigin(self.text, index, x, y)
        self.pdfium.FPDFText_GetMatrix(self.text, index, self.matrix)
        across, up = self.matrix.a, self.matrix.b
        if self.quarter:
            across, up = up, across
        length = (across * across + up * up) ** 0.5
        size = self.pdfium.FPDFText_GetFontSize(self.text, index) * (length or 1.0)
        return *self._turned(x.value, y.value), size, abs(up) <= SKEW * length

    def _turned(self, x: float, y: float) -> tuple[float, float]:
        return self.turn(x, y) if self.turn else (x, y)
