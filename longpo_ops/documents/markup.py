"""HTML to Markdown: headings, lists, tables and code keep their structure; scripts, styles and pictures go,
and spaces that keep words on one line are plain ones.

    page --html.parser--> tree --without GONE--> markdownify --> text

A page is some thousand small objects that point at each other. The collector of cycles would go through all of them, and
through what the program holds besides, again and again while the tree grows: it waits until the text is there, and the tree is
taken apart by hand. markdownify asks of every tag whether it lies in a `pre`; bs4's general search for that is a third of
the time, so a tag here goes up by itself. Together a page takes half to two thirds of the time.

Not covered: pages whose text is made by scripts. Tests: tests/documents/test_readers.py.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from bs4 import BeautifulSoup, Tag
from markdownify import MarkdownConverter

GONE = frozenset(("script", "style", "noscript", "template", "head", "nav", "svg"))
PARSER = {"features": "html.parser", "store_line_numbers": False, "multi_valued_attributes": None}
OPTIONS = {"heading_style": "ATX", "escape_asterisks": False, "escape_underscores": False, "escape_misc": False}


class Element(Tag):
    """A tag that finds a parent of a name quickly."""

    def find_parent(self, name=None, *rest, **more):
        """As bs4's."""
        if not isinstance(name, str) or rest or more:
            return super().find_parent(name, *rest, **more)
        parent = self.parent
        while parent is not None and parent.name != name:
            parent = parent.parent
        return parent


def as_markdown(page: bytes | str) -> str:
    """The text of a page. Raises what the parser raises, RecursionError for tags that are nested too deep among it."""
    with _collector_waits():
        soup = BeautifulSoup(page, element_classes={Tag: Element}, **PARSER)
        try:
            for tag in [tag for tag in soup.descendants if tag.name in GONE]:
                tag.decompose()
            text = MarkdownConverter(strip=["a", "img"], **OPTIONS).convert_soup(soup)
        finally:
            soup.decompose()
    return "\n".join(line.rstrip() for line in text.replace("\xa0", " ").splitlines()).strip()


@contextmanager
def _collector_waits() -> Iterator[None]:
    """No search for cycles meanwhile."""
    searches = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searches:
            gc.enable()
