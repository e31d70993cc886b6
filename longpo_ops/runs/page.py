"""What the pages that people look at are made of: a page's frame and style, two answers side by side, texts made harmless.

    texts, pairs --safe, pair_html--> parts --html_page--> one file that loads nothing and runs nothing

Texts are data: escaped in HTML, never markup, printable (text.py), each in a block that turns no other. What a page
says is its run's own: the pairs' summary in generate/report.py, the evolution in evolve/report.py.

Tests: tests/generate/test_report.py.
"""

from __future__ import annotations

import base64
import difflib
import re
from collections.abc import Iterable
from html import escape

from ..data import Pair
from ..text import printable

SHOWN = 600  # characters of a document or chunk
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; } td, th { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: left; }
h1, h2, p, td, th, caption, .text { unicode-bidi: plaintext; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1em; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .6em; border-radius: .3em; }
.question { font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere; }
mark { background: #bfe8bf; } .rejected mark { background: #f6c4c0; } img { max-width: 100%; }
"""


def safe(text: object) -> str:
    """As HTML shows it."""
    return escape(printable(text))


def told(shown: int, there: int, what: str, advice: str) -> str:
    """How many of something are shown, and where they are fewer than there are, what shows the others."""
    return f"{shown:,} of {there:,} {what}" + (f"; {advice}" if shown < there else "")


def html_page(title: str, parts: Iterable[str], added_style: str = "") -> str:
    """A page of such parts of HTML."""
    head = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{safe(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<style>{STYLE}{added_style}</style>\n</head>\n<body>",
    )
    return "\n".join([*head, *parts, "</body>\n</html>\n"])


def image_html(alt: str, png: bytes) -> str:
    """A picture, held by the page itself."""
    return f'<img alt="{safe(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def pair_html(pair: Pair) -> str:
    """A pair with its answers side by side, its texts folded."""
    source = pair.provenance.get("source", "")
    parts = [
        f"<h2>{safe(pair.id)}</h2>",
        f"<p>{safe(source)}</p>" if source else "",
        _folded("document", pair.document),
    ]
    for number, turn in enumerate(pair.turns, 1):
        if turn.instruction:  # a context has neither question nor chunk
            parts += [
                f"<h3>Turn {number}</h3>",
                f'<p class="question">{safe(turn.instruction)}</p>',
                _folded("chunk", turn.chunk),
            ]
        for rejected in turn.rejected:
            stretches = differences(turn.chosen, rejected)
            sides = [
                "".join(
                    safe(parts[side]) if parts[0] else f"<mark>{safe(parts[side])}</mark>"
                    for parts in stretches
                    if parts[side]
                )
                for side in (1, 2)
            ]
            parts.append(
                f'<div class="sides"><div><h4>chosen</h4><div class="text chosen">{sides[0]}</div></div>'
                f'<div><h4>rejected</h4><div class="text rejected">{sides[1]}</div></div></div>'
            )
    return "\n".join(part for part in parts if part)


def _folded(name: str, text: str) -> str:
    size = f"{len(text):,} characters"
    return f'<details><summary>{name}, {size}</summary><div class="text">{safe(shorten(text))}</div></details>'


def differences(first: str, second: str) -> list[tuple[bool, str, str]]:
    """Two texts as stretches (same?, part of the first, part of the second), word by word."""
    words = [re.findall(r"\s+|\w+|[^\w\s]", text) for text in (first, second)]
    matcher = difflib.SequenceMatcher(None, *words, autojunk=False)
    return [
        (tag == "equal", "".join(words[0][a:b]), "".join(words[1][c:d])) for tag, a, b, c, d in matcher.get_opcodes()
    ]


def shorten(text: str, limit: int = SHOWN) -> str:
    """The beginning and the end of a text."""
    return (
        text
        if len(text) <= limit
        else f"{text[: limit // 2]}\n[... {len(text) - limit:,} characters ...]\n{text[-limit // 2 :]}"
    )
