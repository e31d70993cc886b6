"""HTML to Markdown: headings, lists, tables and code keep their structure; scripts, styles, menus and pictures go, and
spaces that keep words on one line are plain ones.

    bytes --decode_page--> page --html-to-markdown--> text

A page whose bytes are UTF-8 is UTF-8, whatever it declares; another is what it declares, with the meaning that browsers give
the name. Bytes of ASCII alone may be letters of another alphabet in escapes, so there its declaration comes first.
Not covered: pages whose text is made by scripts; encodings that are guessed. Tests: tests/documents/test_markup.py.
"""

from __future__ import annotations

import re

from html_to_markdown import ConversionOptions, PreprocessingOptions, convert

from ..text import marked_encoding
from .unreadable import BINARY, Unreadable

DEEP = Unreadable("HTML nested too deep: save it as text first")
UNKNOWN = Unreadable("HTML in an unknown encoding: save it as UTF-8 first")
HEAD = 1024  # bytes in which a page declares its encoding
DECLARED = re.compile(rb"""(?:<\?xml[^>]{1,80}encoding|<meta[^>]{1,200}charset)\s*=\s*["']?\s*([\w.:-]{2,40})""", re.I)
BROWSERS = (  # what a browser takes for what is declared: the larger encoding that holds it
    dict.fromkeys(("iso-8859-1", "latin1", "latin-1", "us-ascii", "ascii"), "cp1252")
    | dict.fromkeys(("gb2312", "gbk", "x-gbk"), "gb18030")
    | {"shift_jis": "cp932", "x-sjis": "cp932", "euc-kr": "cp949", "ks_c_5601-1987": "cp949", "big5": "big5hkscs"}
    | {"iso-8859-9": "cp1254", "iso-8859-11": "cp874", "tis-620": "cp874", "utf-16": "utf-8", "utf-32": "utf-8"}
)
XML = re.compile(r"\s*(?:<\?xml|<!DOCTYPE[^>]*XHTML)", re.I)
CLOSED = re.compile(  # <title/> ends itself in XHTML, in HTML it does not
    r"<(?!(?:area|base|br|col|embed|hr|img|input|link|meta|param|source|track|wbr)\b)([A-Za-z][\w:.-]*)([^<>]*)/>"
)
OPTIONS = ConversionOptions(
    bullets="*+-",
    skip_images=True,
    strip_tags=["a"],  # their text stays
    exclude_selectors=["nav", "noscript", "template", "svg"],
    hidden_content="reachable",
    compact_tables=True,
    autolinks=False,
    expand_abbreviations=False,
    include_blockquote_citations=False,
    extract_metadata=False,
    tier_strategy="tier2",  # the thorough way
    preprocessing=PreprocessingOptions(enabled=False),  # which guesses what is no content
)


def decode_page(data: bytes) -> str:
    """The characters of a page: by its byte-order mark, as UTF-8, or by what it declares. An Unreadable where they are none."""
    marked = marked_encoding(data)
    if marked is None and b"\0" in data[:8192]:
        return BINARY
    declared = DECLARED.search(data[:HEAD])
    name = declared[1].decode().lower() if declared else "utf-8"
    likely = ("utf-8", BROWSERS.get(name, name))
    for encoding in (marked,) if marked else reversed(likely) if data.isascii() else likely:
        try:
            return data.decode(encoding)
        except (LookupError, UnicodeDecodeError):
            continue
    return UNKNOWN


def as_markdown(page: str) -> str:
    """The text of a page; an Unreadable where its tags are nested too deep to be read whole."""
    if XML.match(page):
        page = CLOSED.sub(r"<\1\2></\1>", page)
    found = convert(page, OPTIONS)
    if any(str(warning.kind) == "depth_limit_exceeded" for warning in found.warnings):
        return DEEP
    return "\n".join(line.rstrip() for line in found.content.replace("\xa0", " ").splitlines()).strip()
