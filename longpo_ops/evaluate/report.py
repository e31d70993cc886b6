"""What an evaluation leaves: results.json, results.md for people, and a heat map of accuracy by length and depth.

task, length  -> Cell        mean score of its samples; a sample whose request failed scores 0 and is counted
length, depth -> Cell        the same over all samples with a depth, in tenths of the context before the needle
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runs.journal import write_atomically, write_text
from ..runs.page import printable

TENTHS = 10
RESULTS, TABLES, HEAT_MAP = "results.json", "results.md", "heatmap.png"


@dataclass(frozen=True)
class Cell:
    """score: 0 to 1, the mean over `samples`, of which `failed` got no answer and `cut` were cut off inside the model's
    reasoning. comparable: with published scores."""

    score: float
    samples: int
    failed: int = 0
    comparable: bool = True
    cut: int = 0

    @classmethod
    def of(cls, scores: Iterable[float | None], comparable: bool = True, cut: int = 0) -> Cell:
        """The cell of some scores, None for a request that failed; the same in whatever order they come."""
        scores = list(scores)
        total = math.fsum(score for score in scores if score is not None)
        return cls(total / len(scores), len(scores), sum(score is None for score in scores), comparable, cut)


@dataclass(frozen=True)
class Scores:
    """What was measured.

    tasks: task -> length -> Cell. depths: length -> tenth of the depth (0 to 9) -> Cell. perplexity: by length.
    harness: task, with the shots and metric asked for (shots.py) -> its main number, which `details` has all of;
    harness_settings: {"shots", "metric"} of it. published: task -> 0 to 1. counts: samples, failed, truncated, unjudged and
    the like by what they are of. notes: what a reader must know. about: model and settings. seconds: of the process that
    finished it. complete: False where it was stopped, as only whole lengths are then here, or where requests failed without
    which a perplexity is another; the same run goes on and asks for what is missing.
    """

    tasks: dict[str, dict[int, Cell]] = field(default_factory=dict)
    depths: dict[int, dict[int, Cell]] = field(default_factory=dict)
    perplexity: dict[int, float] = field(default_factory=dict)
    harness: dict[str, float] = field(default_factory=dict)
    published: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    details: dict[str, dict[str, float | None]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)
    complete: bool = True
    harness_settings: dict[str, dict[str, Any]] = field(default_factory=dict)

    def accuracy(self, length: int) -> float:
        """The mean over the tasks at a length. Raises KeyError for a length that was not measured."""
        found = [cells[length].score for cells in self.tasks.values() if length in cells]
        if not found:
            raise KeyError(f"no task was measured at {length} tokens")
        return math.fsum(found) / len(found)

    def lengths(self) -> list[int]:
        """Where tasks were measured, in order."""
        return sorted({length for cells in self.tasks.values() for length in cells})

    def save(self, out: str | Path) -> None:
        """results.json, results.md and, where there are depths, heatmap.png in a folder, each whole or as it was."""
        out = Path(out)
        values = vars(self) | {name: _plain(getattr(self, name)) for name in ("tasks", "depths")}
        write_text(out / RESULTS, json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        if self.depths:
            write_atomically(out / HEAT_MAP, draw_heat_map(self.depths))
        write_text(out / TABLES, markdown(self))

    @classmethod
    def load(cls, out: str | Path) -> Scores:
        """What `save` wrote. Raises ValueError for a folder without it."""
        file = Path(out) / RESULTS
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            for name in ("tasks", "depths"):
                found[name] = {
                    key: {int(number): Cell(**cell) for number, cell in cells.items()}
                    for key, cells in found[name].items()
                }
            found["depths"] = {int(length): cells for length, cells in found["depths"].items()}
            found["perplexity"] = {int(length): value for length, value in found["perplexity"].items()}
            return cls(**found | {"notes": tuple(found["notes"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file} is no finished evaluation ({error}); run `longpo evaluate --out {out}`"
            ) from error


def _plain(cells: dict) -> dict:
    return {key: {number: vars(cell) for number, cell in row.items()} for key, row in cells.items()}


def tenth(depth: float) -> int:
    """Which tenth a depth lies in."""
    return min(TENTHS - 1, int(depth * TENTHS))


# -- for people --------------------------------------------------------------------------------------------------------

MARK = "\\*"
NOT_COMPARABLE = (
    f"{MARK} on local text or of the user's own making: not comparable with published scores of the same name."
)


def markdown(scores: Scores, picture: bool = True) -> str:
    """The tables, and the heat map in its place unless there is to be no picture."""
    about = scores.about
    lines = [f"# Evaluation of {about.get('model', 'a model')}", ""]
    if not scores.complete:
        lines += ["**Unfinished: it was stopped, or requests failed without which a number is another (see the notes). Here is "
                  "what was measured; the same command goes on.**", ""]  # fmt: skip
    lines += [f"{name}: {value}  " for name, value in about.items() if value not in (None, {}, ())]
    lines += [f"time: {scores.seconds:,.1f} s", ""]
    if scores.tasks:
        lines += _task_table(scores)
    if scores.depths and picture:
        lines += [f"![accuracy by length and depth]({HEAT_MAP})", ""]
    if scores.perplexity:
        rows = [
            (f"{n:,}", f"{value:.3f}", _counted(scores, f"perplexity/{n}")) for n, value in scores.perplexity.items()
        ]
        lines += ["## Perplexity of held-out text", "", *_table(("tokens", "perplexity", ""), rows)]
    if scores.harness:
        settings = scores.harness_settings
        rows = [
            (name, *(str(settings.get(name, {}).get(each, "")) for each in ("shots", "metric")), f"{value:.4f}")
            for name, value in scores.harness.items()
        ]
        lines += ["## lm-evaluation-harness", "", *_table(("task", "shots", "metric", "main number"), rows)]
    names = list(dict.fromkeys([*scores.published, *(n for n, c in scores.counts.items() if "truncated" in c)]))
    if names:
        rows = [(n, _percent(scores.published.get(n)), _counted(scores, n)) for n in names]
        lines += ["## Published benchmarks", "", *_table(("task", "score", ""), rows)]
    if scores.notes:
        lines += ["## Notes", "", *(f"* {note}" for note in scores.notes), ""]
    return printable("\n".join(lines).rstrip() + "\n")


def _task_table(scores: Scores) -> list[str]:
    lengths = scores.lengths()
    rows = []
    for task, cells in scores.tasks.items():
        mark = "" if all(cell.comparable for cell in cells.values()) else f" {MARK}"
        rows.append((task + mark, *(_cell(cells.get(length)) for length in lengths)))
    rows.append(("**mean**", *(f"**{_percent(scores.accuracy(length))}**" for length in lengths)))
    lines = ["## Accuracy by length", "", *_table(("task", *(f"{length:,}" for length in lengths)), rows)]
    kinds = [all(cell.comparable for cell in cells.values()) for cells in scores.tasks.values()]
    return lines if all(kinds) else [*lines, NOT_COMPARABLE, ""]


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    counts = {"failed": cell.failed, "cut off in reasoning": cell.cut}
    told = [f"{count} of {cell.samples} {what}" for what, count in counts.items() if count]
    return _percent(cell.score) + (f" ({', '.join(told)})" if told else "")


def _percent(value: float | None) -> str:
    return "unjudged" if value is None else f"{100 * value:.1f}"


def _counted(scores: Scores, name: str) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in scores.counts.get(name, {}).items() if count)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    line = "|".join(["", *("---" if i == 0 else "---:" for i in range(len(head))), ""])
    return [f"| {' | '.join(head)} |", line, *(f"| {' | '.join(row)} |" for row in rows), ""]


def draw_heat_map(depths: dict[int, dict[int, Cell]]) -> bytes:
    """Accuracy in per cent, a column per length, a row per tenth of the depth, as a PNG; white where nothing was asked."""
    import numpy as np
    from matplotlib.figure import Figure

    lengths = sorted(depths)
    values = np.full((TENTHS, len(lengths)), np.nan)
    for column, length in enumerate(lengths):
        for row, cell in depths[length].items():
            values[row, column] = 100 * cell.score
    figure = Figure(figsize=(max(4.0, 1.5 + 0.9 * len(lengths)), 4.6), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(values, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    for row, column in zip(*np.nonzero(~np.isnan(values))):
        axis.text(column, row, f"{values[row, column]:.0f}", ha="center", va="center", fontsize=8)
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, ha="right")
    axis.set_yticks(range(TENTHS), [f"{10 * row} to {10 * row + 10} %" for row in range(TENTHS)])
    axis.set_xlabel("tokens")
    axis.set_ylabel("text before the needle")
    figure.colorbar(image, label="accuracy, %")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()
