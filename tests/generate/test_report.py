"""What is shown of pairs: pages and terminals. Texts are data in both (runs/page.py)."""

from __future__ import annotations

import io
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
    page = Page(report.pairs_page([evil], EVIL, [(EVIL, EVIL)], b"png"))
    assert "script" not in page.tags and page.tags.count("img") == 1
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert [value for name, value in page.attributes if name in ("src", "href")] == ["data:image/png;base64,cG5n"]
    assert page.text.count('<script>alert("x")</script>') == 11 and "\x1b" not in page.text


def test_differences_are_marked(pair):
    page = report.pairs_page([pair], "t")
    assert "<mark>noon</mark>" in page and "<mark>dusk, they say</mark>" in page
    assert differences("a b c", "a x c") == [(True, "a ", "a "), (False, "b", "x"), (True, " c", " c")]


def test_a_terminal_gets_no_control_codes_and_no_markup(pair):
    out = io.StringIO()
    turn = Turn(EVIL, EVIL, EVIL, (EVIL + " more",))
    report.show_pair(replace(pair, turns=(turn,), provenance={"source": EVIL}), Console(file=out, width=200))
    assert "\x1b" not in out.getvalue() and "\x07" not in out.getvalue()
    assert "[bold red]b[/]" in out.getvalue() and "chosen" in out.getvalue() and "rejected" in out.getvalue()
