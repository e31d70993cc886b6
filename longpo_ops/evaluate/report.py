"""What an evaluation leaves for programs: results.json, and what is read back from it. Tables and pictures: tables.py.

task, length  -> Cell        mean score of its samples; a sample whose request failed scores 0 and is counted
length, depth -> Cell        the same over all samples with a depth, in tenths of the context before the needle
length, kind  -> Mean        over the comparable tasks, and over the local ones: never over both

Every mean has its number of samples and a 95 % interval (intervals.py), or none where a single sample gave it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..runs.journal import write_atomically, write_text
from ..runs.locks import holder
from .intervals import Interval, of_scores, spread

RESULTS, TABLES, HEAT_MAP, LOCK = "results.json", "results.md", "heatmap.png", "work/lock"
TENTHS = 10
COMPARABLE, LOCAL = KINDS = "comparable", "local"  # with published scores; on local text or of the user's own making
RUNNING, STOPPED, FINISHED, UNKNOWN = STATES = "running", "stopped", "finished", ""  # unknown: of an earlier version
KILLED = "its process ended without a word, as one that is killed does"


@dataclass(frozen=True)
class Cell:
    """score: 0 to 1, the mean over `samples`, of which `failed` got no answer and `cut` were cut off inside the model's
    reasoning. comparable: with published scores. deviation: of the samples' scores from one another, by n - 1; None for one
    sample, and in results of earlier versions."""

    score: float
    samples: int
    failed: int = 0
    comparable: bool = True
    cut: int = 0
    deviation: float | None = None

    @classmethod
    def of(cls, scores: Iterable[float | None], comparable: bool = True, cut: int = 0) -> Cell:
        """The cell of some scores, None for a request that failed; the same in whatever order they come."""
        scores = list(scores)
        values, failed = [score or 0.0 for score in scores], sum(score is None for score in scores)
        return cls(math.fsum(values) / len(values), len(values), failed, comparable, cut, spread(values))

    @property
    def interval(self) -> Interval | None:
        """95 % of the score; None where the samples do not tell."""
        return of_scores([(self.score, self.samples, self.deviation)])


@dataclass(frozen=True)
class Mean:
    """Over so many tasks of one kind, with so many samples in all; interval: 95 %, or None."""

    score: float
    tasks: int
    samples: int
    interval: Interval | None


@dataclass(frozen=True)
class Scores:
    """What was measured.

    tasks: task -> length -> Cell. depths: length -> tenth of the depth (0 to 9) -> Cell. perplexity: by length.
    harness: task, with the shots and metric asked for (shots.py) -> its main number, which `details` has all of;
    harness_settings: {"shots", "metric"} of it. published: task -> 0 to 1. counts: samples, failed, truncated, unjudged and
    the like by what they are of. intervals: (low, high), 95 %, of the numbers that are no cells: perplexity/LENGTH,
    harness/TASK, published/TASK; none where the data give none. notes: what a reader must know. about: model and settings.
    seconds: of the process that finished it. complete: False where it was stopped, as only whole lengths are then here, or
    where requests failed without which a perplexity is another; the same run goes on and asks for what is missing.
    state: "running", "stopped", "finished", or "" for an unfinished one of an earlier version. why: who runs it, or what
    stopped it.
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
    intervals: dict[str, Interval] = field(default_factory=dict)
    state: str = FINISHED
    why: str = ""

    def kinds(self, length: int) -> list[str]:
        """Which kinds of tasks were measured at a length, "comparable" before "local"."""
        found = {cells[length].comparable for cells in self.tasks.values() if length in cells}
        return [kind for kind in KINDS if (kind == COMPARABLE) in found]

    def mean(self, length: int, kind: str) -> Mean:
        """Over the tasks of a kind at a length. Raises KeyError where none was measured."""
        found = [cells[length] for cells in self.tasks.values() if length in cells]
        cells = [cell for cell in found if cell.comparable == (kind == COMPARABLE)]
        if kind not in KINDS or not cells:
            raise KeyError(f"no {kind} task was measured at {length} tokens")
        interval = of_scores([(cell.score, cell.samples, cell.deviation) for cell in cells])
        score = math.fsum(cell.score for cell in cells) / len(cells)
        return Mean(score, len(cells), sum(cell.samples for cell in cells), interval)

    def accuracy(self, length: int, kind: str | None = None) -> float:
        """The mean over the tasks of a kind at a length; without a kind, of the only one there is. Raises KeyError for a length
        and a kind that were not measured, ValueError where both kinds were and none is named."""
        kinds = self.kinds(length)
        if not kinds:
            raise KeyError(f"no task was measured at {length} tokens")
        if kind is None and len(kinds) > 1:
            raise ValueError(
                f"accuracy at {length} tokens has two means, which are not averaged: name {' or '.join(kinds)}"
            )
        return self.mean(length, kind or kinds[0]).score

    def lengths(self) -> list[int]:
        """Where tasks were measured, in order."""
        return sorted({length for cells in self.tasks.values() for length in cells})

    @property
    def failed(self) -> int:
        """Requests that got no answer, of everything that was asked."""
        cells = sum(cell.failed for row in self.tasks.values() for cell in row.values())
        return cells + sum(counts.get("failed", 0) for counts in self.counts.values())

    def save(self, out: str | Path) -> None:
        """results.json, results.md and, where there are depths, heatmap.png in a folder, each whole or as it was."""
        from .tables import draw_heat_map, markdown

        out = Path(out)
        values = vars(self) | {name: _plain(getattr(self, name)) for name in ("tasks", "depths")}
        values["means"] = {
            kind: {n: asdict(self.mean(n, kind)) for n in self.lengths() if kind in self.kinds(n)} for kind in KINDS
        }
        write_text(out / RESULTS, json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        if self.depths:
            write_atomically(out / HEAT_MAP, draw_heat_map(self.depths))
        write_text(out / TABLES, markdown(self))

    @classmethod
    def load(cls, out: str | Path) -> Scores:
        """What `save` wrote; one that says it runs, and whose folder nobody holds, was stopped. Raises ValueError for a folder
        without it."""
        file = Path(out) / RESULTS
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            found.pop("means", None)  # made of the cells
            for name in ("tasks", "depths"):
                found[name] = {
                    key: {int(number): _cell(cell) for number, cell in cells.items()}
                    for key, cells in found[name].items()
                }
            found["depths"] = {int(length): cells for length, cells in found["depths"].items()}
            found["perplexity"] = {int(length): value for length, value in found["perplexity"].items()}
            found["intervals"] = {name: (low, high) for name, (low, high) in found.get("intervals", {}).items()}
            found.setdefault("state", FINISHED if found["complete"] else UNKNOWN)
            if found["state"] not in STATES:
                raise ValueError(f"its state is {found['state']!r}")
            scores = cls(**found | {"notes": tuple(found["notes"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file} is no finished evaluation ({error}); run `longpo evaluate --out {out}`"
            ) from error
        gone = scores.state == RUNNING and holder(Path(out) / LOCK) is None
        return replace(scores, state=STOPPED, why=KILLED) if gone else scores


def _plain(cells: dict) -> dict:
    return {key: {n: vars(cell) | {"interval": cell.interval} for n, cell in row.items()} for key, row in cells.items()}


def _cell(values: dict) -> Cell:
    return Cell(**{name: value for name, value in values.items() if name != "interval"})


def tenth(depth: float) -> int:
    """Which tenth a depth lies in."""
    return min(TENTHS - 1, int(depth * TENTHS))
