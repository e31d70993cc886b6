"""Small PDFs, written by hand: pages of placed lines."""

from __future__ import annotations

from collections.abc import Sequence

SIZE = 10
Placed = tuple  # x, y, text, and the size of its letters where it is not SIZE


def pdf(*pages: str | Sequence[Placed], extra: bytes = b"", rotate: int = 0) -> bytes:
    """A PDF whose pages have the given lines, drawn in the given order, in Helvetica; a text is a page of one line."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages))).encode()
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[%s]/Count %d>>" % (kids, len(pages)),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>",
    ]
    for page in pages:
        lines = [(50, 700, page)] if isinstance(page, str) else page
        stream = b"".join(_drawn(*line) for line in lines)
        resources = b"<</Font<</F1 3 0 R>>>>"
        media = b"/MediaBox[0 0 612 792]/Rotate %d" % rotate
        objects.append(
            b"<</Type/Page/Parent 2 0 R%s/Contents %d 0 R/Resources%s>>" % (media, len(objects) + 2, resources)
        )
        objects.append(b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream))
    return assembled(objects, extra)


def _drawn(x: float, y: float, text: str, size: float = SIZE) -> bytes:
    escaped = text.encode("cp1252").replace(b"\\", b"\\\\").replace(b"(", b"\\(").replace(b")", b"\\)")
    return b"BT /F1 %.1f Tf %.1f %.1f Td (%s) Tj ET\n" % (size, x, y, escaped)


def assembled(objects: list[bytes], extra: bytes = b"") -> bytes:
    """The bytes of a PDF with these objects, the first of which is its catalogue. extra: further entries of its trailer."""
    out, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj%s endobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    trailer = b"trailer<</Size %d/Root 1 0 R%s>>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, extra, len(out))
    return out + b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + table + trailer


def column(x: float, y: float, *lines: str) -> list[Placed]:
    """Lines one below the other, 12 points apart."""
    return [(x, y - 12 * i, line) for i, line in enumerate(lines)]
