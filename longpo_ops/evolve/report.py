"""The page of an evolution, as self-contained HTML and as Markdown: the table by length, what was retained, and for every
round what was generated and how it trained; what it cost.

    Result, stages' folders --blocks--> [Heading | Text | Table | Image | Pairs] --> report.html, report.md, accuracy.png

Both pages are written from the same blocks. Texts are data, escaped in both; the HTML page holds its images and loads nothing.

Tests: tests/evolve/test_run.py.
"""

from __future__ import annotations

import functools
import io
import json
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ..data import Pair, read_pairs
from ..documents.listing import reason_and_first
from ..runs.journal import write_atomically, write_text
from ..runs.page import html_page, image_html, pair_html, printable, safe, shorten, told
from .results import DASH, Result, by_length, four_digits, measures, three_places
from .results import told as told_number
from .settings import Evolution, Round
from .stages import PAIRS, TRAIN, Stage

SHOWN_PAIRS = 2
CURVES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "preference_loss", "nll_loss", "loss")
ADDED_STYLE = """
:root { color-scheme: light dark; }
table { font-variant-numeric: tabular-nums; margin: 1em 0; } th { font-weight: 600; } .wide { overflow-x: auto; }
caption { text-align: left; color: #666; padding-bottom: .3em; } td.number, th.number { text-align: right; }
img { border-radius: .3em; background: #fff; min-width: 38em; }
.status { padding: .6em .8em; border-left: .3em solid #4878a8; background: #f6f6f6; }
.status.stopped { border-color: #c0392b; } h2 { margin-top: 2em; border-bottom: 1px solid #ddd; } h3 { margin-top: 1.6em; }
section.pairs h2 { border: 0; font-size: 1.05em; } section.pairs h3 { font-size: 1em; }
@media (max-width: 45em) { .sides { grid-template-columns: 1fr; } }
@media (prefers-color-scheme: dark) {
  body { background: #16181b; color: #ddd; } td, th, h2 { border-color: #3a3f45; } caption { color: #9aa0a6; }
  .text, .status { background: #22262a; } mark { background: #24502c; color: inherit; } .rejected mark { background: #6b2a25; }
  a { color: #8ab4f8; }
}
"""


class Heading(NamedTuple):
    level: int
    text: str


class Text(NamedTuple):
    text: str
    kind: str = ""  # "", "status" or "status stopped"


class Table(NamedTuple):
    """The first column names its row; the others are numbers, or texts where they are none."""

    caption: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


class Image(NamedTuple):
    alt: str
    path: Path


class Pairs(NamedTuple):
    pairs: list[Pair]


Block = Heading | Text | Table | Image | Pairs


def write_report(evolution: Evolution, stages: list[Stage], result: Result) -> None:
    """results.json, accuracy.png, report.html and report.md in the evolution's folder."""
    out = Path(evolution.out)
    result.save(out / "results.json")
    if result.rows:
        write_atomically(out / "accuracy.png", draw_accuracy(pickle.dumps(result.rows)))
    found = list(blocks(evolution, stages, result))
    write_text(out / "report.html", html(found))
    write_text(out / "report.md", markdown(found, out))


# -- what is said ------------------------------------------------------------------------------------------------------


def blocks(evolution: Evolution, stages: list[Stage], result: Result) -> Iterator[Block]:
    """Everything there is to say about what is done so far."""
    out = Path(evolution.out)
    yield Heading(1, f"Self-evolution of {_called(evolution.model, out)}")
    yield _status(stages, result, out)
    if result.rows:
        yield Heading(2, "Accuracy by length")
        yield from _measured(evolution, result)
    if result.retention:
        yield Heading(2, "Short contexts")
        yield _retention(result)
    for each in evolution.rounds:
        mine = {stage.kind: stage for stage in stages if stage.round is each}
        if any(cost["stage"].startswith(f"{each.name}/") for cost in result.stages):
            yield Heading(2, f"Round {each.name}")
            yield Text(f"Recipe: {result.recipes[each.name]}.")
            yield _round(each, mine, out)
            yield from _generated(mine[PAIRS], out)
            yield from _trained(mine[TRAIN])
    if result.stages:
        yield Heading(2, "What it cost")
        yield from _cost(result)


def _status(stages: list[Stage], result: Result, out: Path) -> Text:
    promoted = _called(result.promoted, out)
    if result.stopped:
        return Text(f"Stopped: {result.stopped}. The last promoted model is {promoted}.", "status stopped")
    done = {cost["stage"] for cost in result.stages if cost["done"]}
    left = [stage.name for stage in stages if stage.name not in done]
    if left:
        return Text(f"Not finished: {len(done)} of {len(stages)} stages are done, the next one is {left[0]}.", "status")
    return Text(f"Finished. The promoted model is {promoted}.", "status")


def _measured(evolution: Evolution, result: Result) -> Iterator[Block]:
    accuracies = [each for each in measures(result.rows) if each[0] != "perplexity"]
    for title, numbers, write in accuracies:
        kind = title.removeprefix("accuracy, ")
        caption = f"Mean over the {kind}, 0 to 1, with its 95 % interval and the number of samples."
        yield _by_length(caption, result.rows, numbers, write)
    yield Image("Accuracy by length of every model in the table", Path(evolution.out) / "accuracy.png")
    tasks = list(dict.fromkeys(task for row in result.rows for task in row["tasks"]))
    own = [task for task in tasks if not all(row["comparable"].get(task, True) for row in result.rows)]
    if own:
        yield Text(f"On local text or of your own making, so not comparable with published scores: {', '.join(own)}.")
    if len(tasks) > 1:
        yield _by_task(result.rows, tasks)
    for _, numbers, write in measures(result.rows)[len(accuracies) :]:
        yield _by_length("Perplexity of held-out text; n are windows.", result.rows, numbers, write)
    for kind, caption in (("harness", "lm-evaluation-harness."), ("published", "Published files.")):
        names = list(dict.fromkeys(name for row in result.rows for name in row[kind]))
        if names:
            lines = [
                (row["label"], *(told_number(row[kind].get(name), four_digits) for name in names))
                for row in result.rows
            ]
            yield Table(caption, ("", *names), lines)


def _by_length(caption: str, rows: list[dict], numbers: list[dict], write: Callable[[dict | None], str]) -> Table:
    lengths, lines = by_length(rows, numbers, write)
    return Table(caption, ("tokens", *lengths), lines)


def _by_task(rows: list[dict], tasks: list[str]) -> Table:
    """Of the longest inputs; the others are in the evaluations' own folders."""
    found = {length for row in rows for cells in row["tasks"].values() for length in cells}
    longest = max(found)
    read = [row for row in rows if any(longest in cells for cells in row["tasks"].values())]
    cells = {task: [row["tasks"].get(task, {}).get(longest) for row in read] for task in tasks}
    lines = [(task, *(told_number(cell, three_places) for cell in row)) for task, row in cells.items()]
    others = "" if len(found) == 1 else "; at shorter ones they are in the evaluations' own folders"
    return Table(f"Every task at {longest:,} tokens{others}.", ("", *(row["label"] for row in read)), lines)


def _retention(result: Result) -> Table:
    lines = [
        (
            f"{each['round']}: {each['measure']}",
            four_digits(each["base"]),
            four_digits(each["after"]),
            f"{each['side']} {four_digits(each['limit'])}",
            "yes" if each["holds"] else "no",
        )
        for each in result.retention
    ]
    return Table("A round is promoted if all of its bounds hold.", ("", "base", "after", "wanted", "holds"), lines)


def _round(each: Round, mine: dict[str, Stage], out: Path) -> Table:
    train, method = mine[TRAIN].run, mine[TRAIN].run.method
    reads = {None: "", "both": ", on short and long inputs"}.get(method.reference, f", on {method.reference} inputs")
    lines = [
        ("target length", f"{each.length:,} tokens"),
        ("starts from", _called(train.model, out)),
        ("RoPE theta", DASH if train.rope_theta is None else f"{train.rope_theta:g}"),
        ("pairs made by", _called(mine[PAIRS].run.model, out)),
        ("method", method.name),
        (f"reference{reads}", _called(train.reference_model or train.model, out) if reads else DASH),
    ]
    return Table("", ("", ""), lines)


def _generated(stage: Stage, out: Path) -> Iterator[Block]:
    file = stage.out / "summary.json"
    if not file.exists():
        return
    summary = json.loads(file.read_text(encoding="utf-8"))
    listing = summary["listing"]
    counts = [("documents found", listing["found"]), ("documents selected", listing["selected"])]
    first = listing.get("first_left_out", {})
    counts += [
        (f"documents left out: {reason_and_first(reason, first)}", n) for reason, n in listing["left_out"].items()
    ]
    counts += [("pairs", summary["pairs"]), ("turns", summary["turns"])]
    counts += [(f"turns left out: {reason}", n) for reason, n in summary["left_out"].items()]
    yield Heading(3, "What was generated")
    yield Table("", ("", "number"), [(name, f"{n:,}") for name, n in counts])
    described = [(kind, values) for kind, values in summary["lengths"].items() if values]
    if described:
        names = tuple(name for name in described[0][1] if name != "number")
        lines = [(kind, *(f"{values[name]:,.6g}" for name in names)) for kind, values in described]
        yield Table("Lengths in tokens.", ("", *names), lines)
    if summary["pairs"]:
        pairs, there = list(islice(read_pairs(stage.out, allow_equal=True), SHOWN_PAIRS)), summary["pairs"]
        others = f"longpo pairs show {_called(str(stage.out), out)} --number {there} shows all"
        yield Text(told(len(pairs), there, "pairs", others))
        yield Pairs(pairs)


def _trained(stage: Stage) -> Iterator[Block]:
    file, figure = stage.out / "trainer_state.json", stage.out / "training.png"
    if not stage.receipt().done or not file.exists():
        return
    history = json.loads(file.read_text(encoding="utf-8"))["log_history"]
    logs = [row for row in history if "loss" in row]
    yield Heading(3, "Training")
    if logs:
        names = [name for name in CURVES if name in logs[-1]]
        lines = [(name, *(four_digits(row.get(name)) for row in (logs[0], logs[-1]))) for name in names]
        yield Table("", ("", f"step {logs[0]['step']:,}", f"step {logs[-1]['step']:,}"), lines)
    if figure.exists():
        yield Image("Rewards, margins, accuracies and losses against steps", figure)


def _cost(result: Result) -> Iterator[Block]:
    exact = all(cost["exact"] for cost in result.stages)
    lines = [
        (
            cost["stage"] + ("" if cost["done"] else " (not finished)"),
            f"{cost['seconds']:,.1f}",
            f"{cost['host_bytes'] / 2**20:,.0f}",
            f"{cost['device_bytes'] / 2**20:,.0f}" if cost["device_bytes"] else DASH,
        )
        for cost in result.stages
    ]
    lines.append(("together", f"{sum(cost['seconds'] for cost in result.stages):,.1f}", "", ""))
    header = ("stage", "seconds", "peak memory, MiB", "peak on the device, MiB")
    yield Table("Of all attempts; memory of this process alone.", header, lines)
    if not exact:
        yield Text("Where the system cannot reset it, a stage's peak is that of the process until then.")


def _called(model: str, out: Path) -> str:
    """A model's name: that of its folder, below `out` with the round's."""
    path = Path(model)
    return path.relative_to(out).as_posix() if path.is_relative_to(out) else path.name if path.exists() else model


# -- how it is written -------------------------------------------------------------------------------------------------


def html(found: Iterable[Block]) -> str:
    """A page that loads nothing and runs nothing."""
    found = list(found)
    return html_page(found[0].text, map(_html, found), ADDED_STYLE)


def _html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{safe(text)}</h{level}>"
        case Text(text, kind):
            return f'<p class="{kind}">{safe(text)}</p>'
        case Image(alt, path):
            return f'<div class="wide">{image_html(alt, path.read_bytes())}</div>'
        case Pairs(pairs):
            return f'<section class="pairs">{"".join(map(pair_html, pairs))}</section>'
        case Table(caption, header, rows):
            told = f"<caption>{safe(caption)}</caption>" if caption else ""
            head = f"<thead>{_html_row(header, 'th')}</thead>" if any(header) else ""
            body = "".join(_html_row(row, "td") for row in rows)
            return f'<div class="wide"><table>{told}{head}<tbody>{body}</tbody></table></div>'


def _html_row(cells: tuple[str, ...], tag: str) -> str:
    kinds = ["", *[' class="number"'] * (len(cells) - 1)]
    return f"<tr>{''.join(f'<{tag}{kind}>{safe(cell)}</{tag}>' for kind, cell in zip(kinds, cells))}</tr>"


def markdown(found: Iterable[Block], out: Path) -> str:
    """The same, with its images beside it."""
    return "\n\n".join(_markdown(block, out) for block in found) + "\n"


def _markdown(block: Block, out: Path) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_plain(text)}"
        case Text(text, kind):
            return f"**{_plain(text)}**" if kind else _plain(text)
        case Image(alt, path):
            return f"![{_plain(alt)}]({path.relative_to(out).as_posix()})"
        case Pairs(pairs):
            return "\n\n".join(_markdown_pair(pair) for pair in pairs)
        case Table(caption, header, rows):
            line = f"|---|{'---:|' * (len(header) - 1)}"
            lines = [_markdown_row(header), line, *map(_markdown_row, rows)]
            return (f"{_plain(caption)}\n\n" if caption else "") + "\n".join(lines)


def _markdown_pair(pair: Pair) -> str:
    parts = [f"**{_plain(pair.id)}** {_plain(pair.provenance.get('source', ''))}"]
    for turn in pair.turns:
        lines = ["| chosen | rejected |", "|---|---|"]
        lines += [_markdown_row((shorten(turn.chosen), shorten(rejected))) for rejected in turn.rejected]
        parts.append(f"{_plain(turn.instruction)}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _markdown_row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(map(_plain, cells))} |"


def _plain(text: str) -> str:
    """Text on one line, in which nothing is markup."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(printable(text).split()))


@functools.lru_cache(maxsize=1)  # a report is written more often than a model is measured
def draw_accuracy(pickled: bytes) -> bytes:
    """Accuracy of pickled rows against length, of comparable and of local tasks, and perplexity where it was measured, with
    their intervals, as a PNG: a colour per round, untrained ones dashed."""
    from matplotlib.figure import Figure

    rows = pickle.loads(pickled)
    panels = measures(rows)
    width = 5.5 * max(1, len(panels))
    figure = Figure(figsize=(width, 3.8))
    figure.subplots_adjust(left=0.5 / width, right=1 - 0.1 / width, bottom=0.13, top=0.92, wspace=0.12)
    rounds = list(dict.fromkeys(row["round"] for row in rows))
    for axis, (title, numbers, _) in zip(figure.subplots(1, max(1, len(panels)), squeeze=False).flat, panels):
        found = sorted({length for each in numbers for length in each})
        for row, each in zip(rows, numbers):
            style = {"base": "o-", "untrained": "s--", "after": "o-"}[row["row"]]
            colour = "0.45" if row["row"] == "base" else f"C{rounds.index(row['round']) - 1}"
            values, bars = _points(each)
            axis.errorbar(
                [found.index(n) for n in sorted(each)],
                values,
                yerr=bars,
                fmt=style,
                color=colour,
                label=row["label"],
                capsize=2,
                elinewidth=0.8,
            )
        axis.set_xticks(range(len(found)), [_short(length) for length in found])
        axis.set_xlabel("tokens")
        axis.set_title(title, fontsize=10, y=1.0)
        axis.grid(alpha=0.3)
        if title != "perplexity":
            axis.set_ylim(-0.03, 1.03)
    if panels:
        figure.axes[0].legend(fontsize=8)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    return data.getvalue()


def _points(numbers: dict[int, dict]) -> tuple[list[float], list[list[float]]]:
    """Values from the shortest on, and how far their intervals reach below and above; nowhere without one."""
    found = [numbers[length] for length in sorted(numbers)]
    intervals = [each["interval"] or (each["value"], each["value"]) for each in found]
    below = [max(0.0, each["value"] - low) for each, (low, _) in zip(found, intervals)]
    above = [max(0.0, high - each["value"]) for each, (_, high) in zip(found, intervals)]
    return [each["value"] for each in found], [below, above]


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)
