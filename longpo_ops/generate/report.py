"""What a person looks at of a run of the generator: its summary, and pairs side by side on a page and in the terminal.

The frame of a page, and how texts are made harmless, are runs/page.py's.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from ..data import Pair
from ..runs.journal import write_atomically, write_text
from ..runs.page import differences, html_page, image_html, pair_html, printable, safe, shorten, told
from .advice import advice
from .steps import AGAIN

SHOWN_PAIRS = 3  # of a summary
UNSCORED = "no reference log-probs"
KINDS = ("document", "chunk", "chosen", "rejected")


def summarise(outcomes: Iterable[dict]) -> dict:
    """Documents, pairs, turns, counts by reason and lengths by kind, of the documents that are finished."""
    documents, pairs, counts, lengths = 0, 0, Counter(), {kind: [] for kind in KINDS}
    for outcome in outcomes:
        documents += 1
        pairs += outcome["pairs"]
        counts.update(outcome["counts"])
        for kind, values in outcome["lengths"].items():
            lengths[kind] += values
    again = counts.pop(AGAIN, 0)
    left_out = dict(counts.most_common())
    return {
        "documents": documents,
        "pairs": pairs,
        "turns": len(lengths["chosen"]),
        "asked_again": again,
        "left_out": left_out,
        "lengths": lengths,
    }


def write_summary(result, pairs: Iterable[Pair], run) -> dict:
    """summary.json, lengths.png and summary.html in the folder of a GenerateRun, with three of the pairs; returns the
    summary."""
    folder, summary = Path(run.out), {"recipe": run.title} | summarise(result.outcomes)
    turns = {reason: count for reason, count in summary["left_out"].items() if reason != UNSCORED}
    summary["advice"] = [
        *advice("documents", result.listing.selected, result.listing.skipped, run.now()),
        *advice("turns", summary["turns"], turns, run.now()),
    ]
    figure = draw_lengths(summary["lengths"])
    counted = {name: value for name, value in summary.items() if name != "lengths"}
    counted["lengths"] = {kind: describe(values) for kind, values in summary["lengths"].items() if values}
    counted["listing"] = {"found": result.listing.found, "selected": result.listing.selected}
    counted["listing"] |= {"left_out": dict(result.listing.skipped), "first_left_out": result.listing.first}
    sizes = ("cut", "parts", "joined", "joins", "size", "lost")
    counted["listing"] |= {name: getattr(result.listing, name) for name in sizes}
    write_text(folder / "summary.json", json.dumps(counted, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_atomically(folder / "lengths.png", figure)
    first = list(islice(pairs, SHOWN_PAIRS))
    there = max(len(first), summary["pairs"])  # some may be of documents that never finished
    name = folder.resolve().name
    how_many = told(len(first), there, "pairs", f"longpo pairs show {name} --number {there} shows all")
    page = pairs_page(first, f"Pairs in {name}", how_many, values_of(result, summary), figure)
    write_text(folder / "summary.html", page)
    return summary


def values_of(result, summary: dict) -> list[tuple[str, str]]:
    """What a summary says, one line each: the listing, the pairs, what was left out, and this process's speed."""
    tally, seconds = result.tally, max(result.seconds, 1e-9)
    found = [("documents found", result.listing.found)]
    found += [(f"left out: {reason}", count) for reason, count in result.listing.left_out()]
    found += [("documents finished", summary["documents"]), ("pairs", summary["pairs"]), ("turns", summary["turns"])]
    found += [(AGAIN, summary["asked_again"])] if summary["asked_again"] else []
    names = {UNSCORED: f"pairs with {UNSCORED}"}
    found += [(names.get(reason, f"turns left out: {reason}"), count) for reason, count in summary["left_out"].items()]
    found += [("requests now", tally.requests), ("tokens read now", tally.prompt_tokens)]
    found += [("of them from the prefix cache", tally.cached_tokens), ("tokens written now", tally.tokens)]
    lines = [("recipe", summary["recipe"]), *result.listing.made(), *((name, f"{value:,}") for name, value in found)]
    lines += [("much is lost", line) for line in summary.get("advice", ())]
    lines += [("tokens per second", f"{(tally.prompt_tokens + tally.tokens) / seconds:,.0f}")]
    lines += (
        [("last failed request", printable(tally.last_failure))] if tally.last_failure else []
    )  # it may quote a server
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

    figure = Figure(figsize=(12, 3))
    # margins that matplotlib is to find cost as much as all the rest
    figure.subplots_adjust(left=0.04, right=0.985, bottom=0.17, top=0.9, wspace=0.22)
    for axis, (kind, values) in zip(figure.subplots(1, len(lengths)), lengths.items()):
        axis.hist(values, bins=min(30, max(1, len(set(values)))), color="#4878a8")
        axis.set_title(f"{kind}, n = {len(values)}", fontsize=10, y=1.0)
        axis.set_xlabel("tokens")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def pairs_page(
    pairs: Iterable[Pair],
    title: str,
    how_many: str,
    table: Iterable[tuple[str, str]] = (),
    figure: bytes | None = None,
) -> str:
    """A page of pairs, chosen beside rejected, differences marked; a table, a figure and how many of all pairs these are
    above them."""
    cells = [f'<tr><td>{safe(name)}</td><td class="number">{safe(value)}</td></tr>' for name, value in table]
    parts = [f"<h1>{safe(title)}</h1>"]
    parts += [f"<table>{''.join(cells)}</table>"] if cells else []
    parts += [f"<p>{image_html('Histograms of lengths', figure)}</p>"] if figure is not None else []
    return html_page(title, [*parts, f"<p>{safe(how_many)}</p>", *map(pair_html, pairs)])


def show_pair(pair: Pair, console) -> None:
    """A pair on a rich console: chosen and rejected side by side, what differs in colour."""
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.text import Text

    console.print(Text(f"{printable(pair.id)}  {printable(pair.provenance.get('source', ''))}", style="bold"))
    console.print(
        Panel(Text(printable(shorten(pair.document))), title=Text(f"document, {len(pair.document):,} characters"))
    )
    for number, turn in enumerate(pair.turns, 1):
        if turn.instruction:  # a context has neither question nor chunk
            console.print(Text(f"turn {number}: {printable(turn.instruction)}", style="bold"))
            chunk = Text(printable(shorten(turn.chunk)))
            console.print(Panel(chunk, title=Text(f"chunk, {len(turn.chunk):,} characters")))
        for rejected in turn.rejected:
            sides = {"chosen": Text(), "rejected": Text()}
            for same, first, second in differences(turn.chosen, rejected):
                sides["chosen"].append(printable(first), style=None if same else "green")
                sides["rejected"].append(printable(second), style=None if same else "red")
            width = max(20, console.width // 2 - 1)
            console.print(
                Columns([Panel(text, title=name, width=width) for name, text in sides.items()], padding=(0, 1))
            )
