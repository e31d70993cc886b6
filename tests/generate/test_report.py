"""What is shown of pairs: pages and terminals. Texts are data in both (runs/page.py)."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html.parser import HTMLParser

from rich.console import Console

from longpo_ops.data import Turn
from longpo_ops.generate import report
from longpo_ops.runs.page import differences

EVIL = '<script>alert("x")</script> & [bold red]b[/] \x1b[31mred\x07 <img src=x onerror=y>'


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_a_page_escapes_everything_and_loads_nothing(pair):
    turn = Turn(EVIL, EVIL, EVIL + " same", (EVIL + " other",))
    evil = replace(pair, id=EVIL, document=EVIL, turns=(turn,), provenance={"source": EVIL})
    page = Page(report.pairs_page([evil], EVIL, EVIL, [(EVIL, EVIL)], b"png"))
    assert "script" not in page.tags and page.tags.count("img") == 1
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert [value for name, value in page.attributes if name in ("src", "href")] == ["data:image/png;base64,cG5n"]
    assert page.text.count('<script>alert("x")</script>') == 12 and "\x1b" not in page.text


def turned(pair):
    """A pair whose every text would turn what stands behind it."""
    turn = Turn(*(f"{name} \u202e\u2067\u200f over" for name in ("ask", "chunk", "chosen")), ("rejected \u202d",))
    return replace(
        pair, id="\u202eid", document="\u2066doc\u061c", turns=(turn,), provenance={"source": "\u202b\udcff"}
    )


def test_no_text_turns_a_page_or_a_terminal_and_what_would_is_seen(pair):
    out, page = io.StringIO(), report.pairs_page([turned(pair)], "\u202etitle", "", [("\u202bname", "\u2068value")])
    report.show_pair(turned(pair), Console(file=out, width=200))
    for shown in (page, out.getvalue()):
        assert not re.search("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]", shown) and shown.encode()
        assert "chunk [U+202E][U+2067][U+200F] over" in shown and "[U+2066]doc[U+061C]" in shown
    assert "[U+202E]title" in page and "[U+202B]name" in page and "[U+2068]value" in page


def test_differences_are_marked(pair):
    page = report.pairs_page([pair], "t", "1 of 1 pairs")
    assert "<mark>noon</mark>" in page and "<mark>dusk, they say</mark>" in page
    assert differences("a b c", "a x c") == [(True, "a ", "a "), (False, "b", "x"), (True, " c", " c")]


def test_a_terminal_gets_no_control_codes_and_no_markup(pair):
    out = io.StringIO()
    turn = Turn(EVIL, EVIL, EVIL, (EVIL + " more",))
    report.show_pair(replace(pair, turns=(turn,), provenance={"source": EVIL}), Console(file=out, width=200))
    assert "\x1b" not in out.getvalue() and "\x07" not in out.getvalue()
    assert "[bold red]b[/]" in out.getvalue() and "chosen" in out.getvalue() and "rejected" in out.getvalue()
