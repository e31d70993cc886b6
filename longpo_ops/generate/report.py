"""What a person looks at: a run's summary, pairs side by side in the terminal, and self-contained HTML pages.

Texts are data: escaped in HTML, never markup or control codes in a terminal. Pages load nothing and run nothing.
"""

from __future__ import annotations

import base64
import difflib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable
from html import escape
from itertools import islice
from pathlib import Path

from ..data import Pair
from .store import write_atomically

KINDS = ("document", "chunk", "chosen", "rejected")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
SHOWN = 600  # characters of a document or chunk
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; } td, th { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1em; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .6em; border-radius: .3em; }
.question { font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere; }
mark { background: #bfe8bf; } .rejected mark { background: #f6c4c0; } img { max-width: 100%; }
"""


def summarise(outcomes: Iterable[dict]) -> dict:
    """Documents, pairs, turns, counts by reason and lengths by kind, of the documents that are finished."""
    documents, pairs, counts, lengths = 0, 0, Counter(), {kind: [] for kind in KINDS}
    for outcome in outcomes:
        documents += 1
        pairs += outcome["pairs"]
        counts.update(outcome["counts"])
        for kind, values in outcome["lengths"].items():
            lengths[kind] += values
    left_out = dict(counts.most_common())
    return {
        "documents": documents,
        "pairs": pairs,
        "turns": len(lengths["chosen"]),
        "left_out": left_out,
        "lengths": lengths,
    }


def write_summary(result, pairs: Iterable[Pair], folder: Path) -> dict:
    """summary.json, lengths.png and summary.html, with three of the pairs; returns the summary."""
    summary = summarise(result.outcomes)
    figure = draw_lengths(summary["lengths"])
    counted = {name: value for name, value in summary.items() if name != "lengths"}
    counted["lengths"] = {kind: describe(values) for kind, values in summary["lengths"].items() if values}
    counted["listing"] = {"found": result.listing.found, "selected": result.listing.selected}
    counted["listing"]["left_out"] = dict(result.listing.skipped)
    write_atomically(folder / "summary.json", (json.dumps(counted, indent=1, ensure_ascii=False) + "\n").encode())
    write_atomically(folder / "lengths.png", figure)
    page = html_page(islice(pairs, 3), f"Pairs in {folder.resolve().name}", rows(result, summary), figure)
    write_atomically(folder / "summary.html", page.encode())
    return summary


def rows(result, summary: dict) -> list[tuple[str, str]]:
    """What a summary says, one line each: the listing, the pairs, what was left out, and this process's speed."""
    tally, seconds = result.tally, max(result.seconds, 1e-9)
    found = [("documents found", result.listing.found)]
    found += [(f"left out: {reason}", count) for reason, count in result.listing.skipped.most_common()]
    found += [("documents finished", summary["documents"]), ("pairs", summary["pairs"]), ("turns", summary["turns"])]
    found += [(f"turns left out: {reason}", count) for reason, count in summary["left_out"].items()]
    found += [("requests now", tally.requests), ("tokens read now", tally.prompt_tokens)]
    found += [("of them from the prefix cache", tally.cached_tokens), ("tokens written now", tally.tokens)]
    lines = [(name, f"{value:,}") for name, value in found]
    lines += [("tokens per second", f"{(tally.prompt_tokens + tally.tokens) / seconds:,.0f}")]
    return [*lines, ("seconds", f"{seconds:,.1f}")]


def describe(values: list[int]) -> dict[str, float]:
    """Number, least, median, mean and most."""
    ordered = sorted(values)
    middle = ordered[len(ordered) // 2]
    return {
        "number": len(ordered),
        "least": ordered[0],
        "median": middle,
        "mean": round(sum(ordered) / len(ordered), 1),
        "most": ordered[-1],
    }


def draw_lengths(lengths: dict[str, list[int]]) -> bytes:
    """Histograms of lengths in tokens, one panel per kind, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3), layout="constrained")
    for axis, (kind, values) in zip(figure.subplots(1, len(lengths)), lengths.items()):
        axis.hist(values, bins=min(30, max(1, len(set(values)))), color="#4878a8")
        axis.set_title(f"{kind}, n = {len(values)}", fontsize=10)
        axis.set_xlabel("tokens")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


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


# -- HTML --------------------------------------------------------------------------------------------------------------


def html_page(
    pairs: Iterable[Pair], title: str, table: Iterable[tuple[str, str]] = (), figure: bytes | None = None
) -> str:
    """A page of pairs, chosen beside rejected, differences marked; a table and a figure above them."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    parts = [
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{safe(title)}</title>',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{STYLE}</style>\n</head>\n<body>',
        f"<h1>{safe(title)}</h1>",
    ]
    cells = [f'<tr><td>{safe(name)}</td><td class="number">{safe(value)}</td></tr>' for name, value in table]
    parts += [f"<table>{''.join(cells)}</table>"] if cells else []
    if figure is not None:
        encoded = base64.b64encode(figure).decode()
        parts.append(f'<p><img alt="Histograms of lengths" src="data:image/png;base64,{encoded}"></p>')
    return "\n".join([*parts, *map(pair_html, pairs), "</body>\n</html>\n"])


def pair_html(pair: Pair) -> str:
    """A pair with its answers side by side, its texts folded."""
    source = pair.provenance.get("source", "")
    parts = [
        f"<h2>{safe(pair.id)}</h2>",
        f"<p>{safe(source)}</p>" if source else "",
        _folded("document", pair.document),
    ]
    for number, turn in enumerate(pair.turns, 1):
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


def safe(text: object) -> str:
    """As HTML shows it."""
    return escape(CONTROL.sub("\ufffd", str(text)))


# -- terminal ----------------------------------------------------------------------------------------------------------


def show_pair(pair: Pair, console) -> None:
    """A pair on a rich console: chosen and rejected side by side, what differs in colour."""
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.text import Text

    console.print(Text(f"{_plain(pair.id)}  {_plain(pair.provenance.get('source', ''))}", style="bold"))
    console.print(
        Panel(Text(_plain(shorten(pair.document))), title=Text(f"document, {len(pair.document):,} characters"))
    )
    for number, turn in enumerate(pair.turns, 1):
        console.print(Text(f"turn {number}: {_plain(turn.instruction)}", style="bold"))
        console.print(Panel(Text(_plain(shorten(turn.chunk))), title=Text(f"chunk, {len(turn.chunk):,} characters")))
        for rejected in turn.rejected:
            sides = {"chosen": Text(), "rejected": Text()}
            for same, first, second in differences(turn.chosen, rejected):
                sides["chosen"].append(_plain(first), style=None if same else "green")
                sides["rejected"].append(_plain(second), style=None if same else "red")
            width = max(20, console.width // 2 - 1)
            console.print(
                Columns([Panel(text, title=name, width=width) for name, text in sides.items()], padding=(0, 1))
            )


def show_rows(table: Iterable[tuple[str, str]], console) -> None:
    """Names and values as a table."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(show_header=False, box=None)
    grid.add_column()
    grid.add_column(justify="right")
    for name, value in table:
        grid.add_row(Text(_plain(name)), Text(_plain(value)))
    console.print(grid)


def _plain(text: object) -> str:
    return CONTROL.sub("\ufffd", str(text))
