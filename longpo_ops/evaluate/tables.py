"""Results for people: tables in Markdown with every number's interval and count, and a heat map by length and depth.

Scores --markdown--> results.md, and what the terminal shows;   depths --draw_heat_map--> heatmap.png

Tests: tests/evaluate/test_report.py.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence

from ..runs.page import printable
from .intervals import Interval
from .report import COMPARABLE, FINISHED, HEAT_MAP, KINDS, LOCK, RUNNING, STOPPED, TENTHS, Cell, Scores

MARK = "\\*"
NOT_COMPARABLE = (
    f"{MARK} on local text or of the user's own making: not comparable with published scores of the same name."
)
GO_ON = "Here is what was measured; the same command goes on."


def markdown(scores: Scores, picture: bool = True) -> str:
    """The tables, and the heat map in its place unless there is to be no picture."""
    about = scores.about
    lines = [f"# Evaluation of {about.get('model', 'a model')}", ""]
    if state := state_of(scores):
        lines += [f"**{state}**", ""]
    lines += [f"{name}: {value}  " for name, value in about.items() if value not in (None, {}, ())]
    lines += [f"requests that failed: {scores.failed}  "] if scores.failed else []
    lines += [f"time: {scores.seconds:,.1f} s", ""]
    if scores.tasks:
        lines += _task_table(scores)
    if scores.depths and picture:
        lines += [f"![accuracy by length and depth]({HEAT_MAP})", ""]
    if scores.perplexity:
        rows = [
            (
                f"{n:,}",
                f"{value:.3f}",
                _three(scores.intervals.get(f"perplexity/{n}")),
                _counted(scores, f"perplexity/{n}"),
            )
            for n, value in scores.perplexity.items()
        ]
        lines += ["## Perplexity of held-out text", "", *table(("tokens", "perplexity", "95 %", ""), rows)]
    if scores.harness:
        lines += [
            "## lm-evaluation-harness",
            "",
            *table(("task", "shots", "metric", "main number", "95 %", ""), _harness(scores)),
        ]
    names = list(dict.fromkeys([*scores.published, *(n for n, c in scores.counts.items() if "truncated" in c)]))
    if names:
        intervals = [scores.intervals.get(f"published/{n}") for n in names]
        rows = [
            (n, _percent(scores.published.get(n)) + bar(each), _counted(scores, n)) for n, each in zip(names, intervals)
        ]
        lines += ["## Published benchmarks", "", *table(("task", "score (95 %)", ""), rows)]
    if scores.notes:
        lines += ["## Notes", "", *(f"* {note}" for note in scores.notes), ""]
    return printable("\n".join(lines).rstrip() + "\n")


def state_of(scores: Scores) -> str:
    """What a reader must know before the numbers; empty for an evaluation that is finished and whole."""
    if scores.state == RUNNING:
        return (f"Running when this was written, by {scores.why or 'a process'}, which is at work as long as it holds {LOCK}. "
                "Here is what was measured so far.")  # fmt: skip
    if scores.state == STOPPED:
        return f"Stopped: {scores.why or 'by hand'}. {GO_ON}"
    if scores.complete:
        return ""
    failed = "requests failed without which a number is another (see the notes)"
    if scores.state == FINISHED:
        return f"Finished, but {failed}: the same command asks for them again."
    return f"Unfinished: it was stopped, or {failed}. {GO_ON}"


def _task_table(scores: Scores) -> list[str]:
    lengths = scores.lengths()
    rows = []
    for task, cells in scores.tasks.items():
        mark = "" if all(cell.comparable for cell in cells.values()) else f" {MARK}"
        rows.append((task + mark, *(_cell(cells.get(length)) for length in lengths)))
    for kind in KINDS:
        means = [scores.mean(n, kind) if kind in scores.kinds(n) else None for n in lengths]
        if there := [mean for mean in means if mean]:
            tasks = "/".join(dict.fromkeys(f"{mean.tasks}" for mean in there))
            name = f"**mean of {tasks} {kind}**{'' if kind == COMPARABLE else f' {MARK}'}"
            rows.append(
                (name, *(f"**{_percent(m.score)}**{bar(m.interval)}, n={m.samples:,}" if m else "" for m in means))
            )
    lines = ["## Accuracy by length", "", "Per cent, the 95 % interval, and how many samples.", ""]
    lines += table(("task", *(f"{length:,}" for length in lengths)), rows)
    kinds = [all(cell.comparable for cell in cells.values()) for cells in scores.tasks.values()]
    return lines if all(kinds) else [*lines, NOT_COMPARABLE, ""]


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    counts = {"failed": cell.failed, "cut off in reasoning": cell.cut}
    told = "".join(f", {count} {what}" for what, count in counts.items() if count)
    return f"{_percent(cell.score)}{bar(cell.interval)}, n={cell.samples:,}{told}"


def _harness(scores: Scores) -> list[tuple[str, ...]]:
    rows = []
    for name, value in scores.harness.items():
        settings = scores.harness_settings.get(name, {})
        told = (str(settings.get(each, "")) for each in ("shots", "metric"))
        interval = scores.intervals.get(f"harness/{name}")
        shown = "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
        rows.append((name, *told, f"{value:.4f}", shown, _counted(scores, f"harness/{name}")))
    return rows


def _percent(value: float | None) -> str:
    return "unjudged" if value is None else f"{100 * value:.1f}"


def bar(interval: Interval | None) -> str:
    """An interval of shares, in per cent, behind its number; empty without one."""
    return "" if interval is None else f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def _three(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _counted(scores: Scores, name: str) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in scores.counts.get(name, {}).items() if count)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """In Markdown: names on the left, numbers on the right."""
    line = "|".join(["", *("---" if i == 0 else "---:" for i in range(len(head))), ""])
    return [f"| {' | '.join(head)} |", line, *(f"| {' | '.join(row)} |" for row in rows), ""]


def draw_heat_map(depths: dict[int, dict[int, Cell]]) -> bytes:
    """Accuracy in per cent and its number of samples, a column per length, a row per tenth of the depth, as a PNG; white where
    nothing was asked."""
    return _heat_map(tuple((length, tuple(depths[length].items())) for length in sorted(depths)))


@functools.lru_cache(maxsize=1)  # it is saved more often than it changes
def _heat_map(columns: tuple[tuple[int, tuple[tuple[int, Cell], ...]], ...]) -> bytes:
    import numpy as np
    from matplotlib.figure import Figure

    lengths, values = [length for length, _ in columns], np.full((TENTHS, len(columns)), np.nan)
    for column, (_, cells) in enumerate(columns):
        for row, cell in cells:
            values[row, column] = 100 * cell.score
    width = max(4.0, 1.5 + 0.9 * len(lengths))
    figure = Figure(figsize=(width, 4.6))
    axis = figure.subplots()
    figure.subplots_adjust(left=1.25 / width, right=1 - 0.95 / width, bottom=0.19, top=0.97)  # the same inches always
    image = axis.imshow(values, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    for row, column in zip(*np.nonzero(~np.isnan(values))):
        told = f"{values[row, column]:.0f}\nn={dict(columns[column][1])[row].samples}"
        axis.text(column, row, told, ha="center", va="center", fontsize=7)
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, ha="right")
    axis.set_yticks(range(TENTHS), [f"{10 * row} to {10 * row + 10} %" for row in range(TENTHS)])
    axis.set_xlabel("tokens")
    axis.set_ylabel("text before the needle")
    figure.colorbar(image, figure.add_axes((1 - 0.8 / width, 0.19, 0.15 / width, 0.78)), label="accuracy, %")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()
