"""Text on its way in and out: which encoding bytes say they have, and what a person may be shown of what is not his own.

    first bytes --marked_encoding--> the encoding that a byte-order mark names
    bytes       --decoded--> lines, of UTF-8 or what the mark says
    a file      --read_text--> the whole of it, likewise: settings, prompts, questions, whatever a user hands over
    a text      --printable--> the same for a page or a terminal, on which it cannot move, hide or re-order anything
    a name      --one_line---> the same for a line of its own, and for files in UTF-8

Control codes become U+FFFD, bidirectional controls and what is no character a mark such as [U+202E], which is read where it
stands and does nothing. A right-to-left letter needs no mark: it turns its own line alone.
"""

from __future__ import annotations

import codecs
import io
import os
import re

MARKS = (  # UTF-32's first: UTF-16's is the beginning of one of them
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
WIDE = r"\u2e80-\u9fff\uf900-\ufaff\uff00-\uff65"  # Chinese and Japanese, which have no spaces between words: a class's inside
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
TURNING = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks, embeddings, overrides and isolates of direction
NO_CHARACTER = "\ud800-\udfff"  # halves of surrogate pairs, and bytes of names that are no UTF-8
MARKED = re.compile(f"[{TURNING}{NO_CHARACTER}]")
OFF_LINE = re.compile(f"[\\x00-\\x1f\\x7f-\\x9f\u2028\u2029{TURNING}{NO_CHARACTER}]")


def marked_encoding(head: bytes) -> str | None:
    """The encoding that the byte-order mark at the beginning of some bytes names, whose decoder takes the mark away; None
    where there is none."""
    return next((encoding for mark, encoding in MARKS if head.startswith(mark)), None)


def decoded(stream, newline: str | None = None, errors: str = "backslashreplace") -> io.TextIOWrapper:
    """A stream of bytes that has `peek`, as text: UTF-8, or what its byte-order mark says. Bytes that are none become \\xff
    escapes, which JSON does not know: one bad record, not a bad file."""
    encoding = marked_encoding(stream.peek(4)[:4]) or "utf-8"
    return io.TextIOWrapper(stream, encoding, errors=errors, newline=newline)


def read_text(file: str | os.PathLike) -> str:
    """Raises OSError for a file that cannot be read, UnicodeDecodeError for bytes that are no such text."""
    with decoded(open(file, "rb"), errors="strict") as text:
        return text.read()


def printable(text: object) -> str:
    """Text as a page or a terminal may show it, line breaks and tabs as they are."""
    return MARKED.sub(lambda found: f"[U+{ord(found[0]):04X}]", CONTROL.sub("\ufffd", str(text)))


def one_line(name: object) -> str:
    """A name that UTF-8 can hold, on one line: what else it has becomes an escape, such as \\n, \\u202e and, of a byte that
    is no UTF-8, \\xff."""

    def escaped(found: re.Match) -> str:
        code = ord(found[0])
        if 0xDC80 <= code <= 0xDCFF:  # where Python keeps such a byte
            return f"\\x{code - 0xDC00:02x}"
        return found[0].encode("unicode_escape").decode()

    return OFF_LINE.sub(escaped, str(name))
