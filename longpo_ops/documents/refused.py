"""Files that are refused by name: what they hold would be read as control words, or needs another program first.

By suffix where it says enough, else by the first bytes: RTF, PostScript, roff and office files keep their names seldom.
Markdown, HTML and LaTeX that speak of roff are no roff; a suffix such as .1 may also be a log's, so there the text decides.
Tests: tests/documents/test_refused.py.
"""

from __future__ import annotations

import re

from .unreadable import Unreadable

ROFF = Unreadable("roff source: turn it into text first (man -Tutf8, groff -Tutf8)")
RTF = Unreadable("RTF: save it as DOCX, HTML or text first")
POSTSCRIPT = Unreadable("PostScript: turn it into PDF first (ps2pdf)")
OFFICE = Unreadable("office file of another format, or encrypted: save it as DOCX, PDF or text first")
PACKED = Unreadable("packed twice, or an archive: unpack it first")

SUFFIXES = (
    dict.fromkeys((".roff", ".groff", ".troff", ".nroff", ".man", ".mdoc", ".ms", ".mom"), ROFF)
    | {".rtf": RTF}
    | dict.fromkeys((".ps", ".eps", ".epsi"), POSTSCRIPT)
    | dict.fromkeys(
        (".doc", ".dot", ".odt", ".odp", ".ods", ".ppt", ".pptx", ".xls", ".xlsx", ".pages", ".wpd"), OFFICE
    )
    | dict.fromkeys((".zip", ".tar", ".tgz", ".tbz", ".txz", ".bz2", ".xz", ".7z", ".rar", ".gz", ".zst"), PACKED)
)
BEGINS = (
    (b"{\\rtf", RTF),
    (b"%!PS", POSTSCRIPT),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", OFFICE),
    (b"\x1f\x8b\x08", PACKED),
    (b"\x28\xb5\x2f\xfd", PACKED),
    (b"PK\x03\x04", PACKED),
)
OTHER_MARKUP = {".md", ".markdown", ".rst", ".html", ".htm", ".xhtml", ".tex", ".ltx", ".adoc", ".org"}
FIRST = re.compile(rb"\s*(?:'\\\"|[.']\\\"|\.TH\s|\.Dd\s|\.so\s+\S+\s*\Z)")
REQUEST = re.compile(
    rb"^[.'](?:TH|SH|SS|PP|LP|NH|TL|AU|AB|IP|TP|RS|RE|BR|BI|IR|RI|Dd|Dt|Os|Sh|Nm|Nd|Pp|Bl|It|El|br|sp|nf|fi|de|ds|nr|so|ft|ad|na|hy|ne|in|ti)\b",
    re.MULTILINE,
)
HEAD = 8192
REQUESTS = 4  # among the first HEAD bytes


def refused(suffix: str, head: bytes) -> Unreadable | None:
    """Why a file of this suffix (".rtf", "" for none) that begins with these bytes is not read; None where it is."""
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    for begin, reason in BEGINS:
        if head.startswith(begin):
            return reason
    if suffix not in OTHER_MARKUP and (FIRST.match(head) or len(REQUEST.findall(head[:HEAD])) >= REQUESTS):
        return ROFF
    return None
