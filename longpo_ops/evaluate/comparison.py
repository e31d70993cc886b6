"""Two evaluations against each other, sample by sample: what the second has more than the first, and whether that shows.

    answers.jsonl, values.jsonl of both --ids, what was asked--> pairs --bootstrap (intervals.py)--> difference, 95 % interval

task, length      mean difference of the scores; wins, losses and ties of the second run
length, kind      the mean over the tasks of one kind that both have, a task's samples drawn from that task
perplexity        ratio second / first, of windows with the same token ids, paired in nats
harness           difference of a task's number over its questions; where single values were not kept, over standard errors

Samples with one id are pairs where their references are the same; their texts may differ around what is asked (another
tokenizer, other texts), which is told. A task of which the references differ is compared as two independent sets of samples,
which is told, too. What one run alone has is named and left out.

Not covered: more than two runs; of the many intervals one in twenty shows a difference where there is none.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..runs.journal import write_text
from .intervals import Interval, Side, Z, of_difference, paired, unpaired
from .kept import ANSWERS, VALUES, read_lines
from .mt_bench import NAME as MT_BENCH
from .report import COMPARABLE, KINDS, LOCAL, Scores

NONE = "no difference can be shown"
TASK, MEAN, PERPLEXITY, HARNESS, PUBLISHED = "task", "mean", "perplexity", "harness", "published"


@dataclass(frozen=True)
class Row:
    """A number of both runs. what: its name. kind: "task", "mean", "perplexity", "harness" or "published". samples: pairs, or
    those of both runs where they are no pairs. difference: second less first, of a perplexity their ratio; interval: 95 % of
    it, None where the samples do not tell. wins, losses, ties: pairs of which the second run's is better, worse, equal.
    more_is_better: of the number; None where that is not known, and then a win is more."""

    what: str
    kind: str
    length: int | None
    first: float
    second: float
    difference: float
    interval: Interval | None
    samples: int
    paired: bool
    wins: int = 0
    losses: int = 0
    ties: int = 0
    more_is_better: bool | None = True

    @property
    def verdict(self) -> str:
        """What can be said of the second run: "better", "worse", or that nothing can; "more" or "less" where that is all."""
        nothing = 1.0 if self.kind == PERPLEXITY else 0.0
        if self.interval is None or self.interval[0] <= nothing <= self.interval[1]:
            return NONE
        more = self.difference > nothing
        if self.more_is_better is None:
            return "more" if more else "less"
        return "better" if more == self.more_is_better else "worse"


@dataclass(frozen=True)
class Comparison:
    """first, second: the models and states of the runs. rows: what both have. left_out: what could not be compared, and why.
    notes: what a reader must know."""

    first: dict[str, Any]
    second: dict[str, Any]
    rows: tuple[Row, ...]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seed: int = 0

    def save(self, file: str | Path) -> None:
        """As JSON. Raises OSError for a file that cannot be written."""
        values = asdict(self) | {"rows": [asdict(row) | {"verdict": row.verdict} for row in self.rows]}
        write_text(Path(file), json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def compare(first: str | Path, second: str | Path, seed: int = 0) -> Comparison:
    """Two evaluations' folders. seed: of the bootstrap.

    Raises ValueError for a folder that is no evaluation or whose samples cannot be read, for one folder twice, and for two that
    have nothing in common.
    """
    if Path(first).resolve() == Path(second).resolve():
        raise ValueError(f"{first} and {second} are one folder; expected two evaluations")
    return _Work(_Run(first), _Run(second), seed).compare()


class _Run:
    """An evaluation's results and samples. samples: by task and length, id -> (score, references, asked). values: of
    values.jsonl, by `of`, id -> (value, asked)."""

    def __init__(self, folder: str | Path):
        self.folder, self.scores = Path(folder), Scores.load(folder)
        answers = read_lines(self.folder / ANSWERS, ("id", "task", "length", "answer", "score", "references"))
        kept = read_lines(self.folder / VALUES, ("of", "id", "asked", "value"))
        self.samples: dict[tuple[str, int], dict[str, tuple]] = defaultdict(dict)
        for each in answers:
            value = 0.0 if each["answer"] is None else each["score"]  # None: not rated
            told = (value, tuple(each["references"]), each.get("asked"))
            self.samples[each["task"], each["length"]][each["id"]] = told
        self.values: dict[str, dict[str, tuple]] = defaultdict(dict)
        for each in kept:
            self.values[each["of"]][str(each["id"])] = (each["value"], each["asked"])
        self._check()

    def _check(self) -> None:
        """The samples are those of the results."""
        for task, cells in self.scores.tasks.items():
            for length, cell in cells.items():
                found = [value for value, *_ in self.samples.get((task, length), {}).values()]
                if len(found) != cell.samples or not math.isclose(
                    math.fsum(found) / len(found), cell.score, abs_tol=1e-9
                ):
                    raise ValueError(
                        f"{self.folder / ANSWERS} has {len(found)} samples of {task} at {length} tokens, which are not the "
                        f"{cell.samples} of the results; run the evaluation again: what is answered is not asked again"
                    )

    @property
    def told(self) -> dict[str, Any]:
        about = self.scores.about
        return {"folder": str(self.folder), "model": about.get("model"), "state": self.scores.state or "unfinished"}


class _Work:
    """One comparison under way."""

    def __init__(self, first: _Run, second: _Run, seed: int):
        self.runs, self.seed = (first, second), seed
        self.left_out: list[str] = []
        self.notes: list[str] = []
        self.around: list[str] = []  # tasks with other texts around the same questions

    def compare(self) -> Comparison:
        first, second = self.runs
        rows = [*self._tasks(), *self._perplexities(), *self._harness(), *self._published()]
        if not rows:
            why = f": {'; '.join(self.left_out)}" if self.left_out else ""
            raise ValueError(f"{first.folder} and {second.folder} have nothing in common to compare{why}")
        for run in self.runs:
            if run.scores.state != "finished" or not run.scores.complete:
                self.notes.append(f"{run.folder} is not whole ({run.told['state']}): what it has so far is compared")
            if run.scores.failed:
                self.notes.append(f"{run.folder}: {run.scores.failed} requests failed, which count as 0")
        if self.around:
            self.notes.append(
                "the same questions with other texts or lengths of text around them, as with another tokenizer: "
                + ", ".join(dict.fromkeys(self.around))
            )
        return Comparison(first.told, second.told, tuple(rows), tuple(self.left_out), tuple(self.notes), self.seed)

    def _both(self, kind: str, first: Sequence, second: Sequence) -> list:
        """What both have, in the first's order; what one has alone is named."""
        for run, mine, others in zip(self.runs, (first, second), (second, first)):
            if alone := [str(each) for each in mine if each not in others]:
                self.left_out.append(f"{kind} {', '.join(alone)}: only in {run.folder}")
        return [each for each in first if each in second]

    # -- tasks ---------------------------------------------------------------------------------------------------------

    def _tasks(self) -> Iterator[Row]:
        first, second = (run.scores for run in self.runs)
        tasks = self._both("task", list(first.tasks), list(second.tasks))
        lengths = self._both("length", first.lengths(), second.lengths())
        for length in lengths:
            parts: dict[str, list] = {kind: [] for kind in KINDS}
            for task in tasks:
                cells = [scores.tasks[task].get(length) for scores in (first, second)]
                if None in cells:
                    self.left_out.append(f"{task} at {length}: not in both")
                elif cells[0].comparable != cells[1].comparable:
                    self.left_out.append(f"{task} at {length}: on local text in one of them, as published in the other")
                else:
                    row, sides = self._samples(task, length, TASK)
                    parts[COMPARABLE if cells[0].comparable else LOCAL].append((row, sides))
                    yield row
            yield from (self._mean(kind, length, found) for kind, found in parts.items() if len(found) > 1)

    def _samples(self, task: str, length: int, kind: str) -> tuple[Row, list[Side]]:
        """A task's row, and what its mean is a part of."""
        a, b = (_units(task, run.samples[task, length]) for run in self.runs)
        common = [each for each in a if each in b]
        where = f"{task} at {length}" if length else task
        if not common or any(a[each][1] != b[each][1] for each in common):
            self.notes.append(f"{where}: the samples have other references, and are compared as independent ones")
            sides = [[value for value, *_ in each.values()] for each in (a, b)]
            return self._row(task, kind, length, *sides, unpaired(*sides), False), unpaired(*sides)
        if any(a[each][2] != b[each][2] for each in common):
            self.around.append(task)
        if len(common) < max(len(a), len(b)):
            self.notes.append(f"{where}: {len(common)} samples are in both, of {len(a)} and {len(b)}")
        pairs = [[each[name][0] for name in common] for each in (a, b)]
        sides = paired([y - x for x, y in zip(*pairs)])
        return self._row(task, kind, length, *pairs, sides, True), sides

    def _row(self, what, kind, length, first, second, sides, pairs, more: bool | None = True) -> Row:
        difference, interval = of_difference([sides], self.seed)
        counts = _counts(*((second, first) if more is False else (first, second))) if pairs else {}
        samples = len(first) if pairs else len(first) + len(second)
        means = (math.fsum(each) / len(each) for each in (first, second))
        return Row(
            what, kind, length or None, *means, difference, interval, samples, pairs, **counts, more_is_better=more
        )

    def _mean(self, kind: str, length: int, found: list[tuple[Row, list[Side]]]) -> Row:
        rows = [row for row, _ in found]
        difference, interval = of_difference([sides for _, sides in found], self.seed)
        means = (math.fsum(getattr(row, name) for row in rows) / len(rows) for name in ("first", "second"))
        counts = {name: sum(getattr(row, name) for row in rows) for name in ("wins", "losses", "ties", "samples")}
        what, pairs = f"mean of {len(rows)} {kind} tasks", all(row.paired for row in rows)
        return Row(what, MEAN, length, *means, difference, interval, paired=pairs, **counts)

    # -- numbers -------------------------------------------------------------------------------------------------------

    def _perplexities(self) -> Iterator[Row]:
        first, second = (run.scores.perplexity for run in self.runs)
        for length in self._both("perplexity at", list(first), list(second)):
            a, b = (run.values.get(f"perplexity/{length}", {}) for run in self.runs)
            common = [each for each in a if each in b and a[each][1] == b[each][1]]
            if not common:
                self.left_out.append(
                    f"perplexity at {length}: no window with the same token ids in both (another tokenizer, other texts, or "
                    "results of an earlier version)"
                )
                continue
            if len(common) < max(len(a), len(b)):
                self.notes.append(
                    f"perplexity at {length}: {len(common)} windows are in both, of {len(a)} and {len(b)}"
                )
            nats = [[each[name][0] for name in common] for each in (a, b)]
            more, interval = of_difference([paired([y - x for x, y in zip(*nats)], bounded=False)], self.seed)
            wide = interval is not None and max(map(abs, interval)) < 700  # else exp is no float64
            means = (math.exp(math.fsum(each) / len(each)) for each in nats)
            counts = _counts(nats[1], nats[0])  # less is better
            ratio = tuple(math.exp(each) for each in interval) if wide else None
            yield Row(
                "perplexity",
                PERPLEXITY,
                length,
                *means,
                math.exp(more),
                ratio,
                len(common),
                True,
                **counts,
                more_is_better=False,
            )

    def _harness(self) -> Iterator[Row]:
        first, second = (run.scores for run in self.runs)
        for task in self._both("harness", list(first.harness), list(second.harness)):
            a, b = (run.values.get(f"harness/{task}", {}) for run in self.runs)
            settings = [scores.harness_settings.get(task, {}) for scores in (first, second)]
            more = settings[0].get("more_is_better")
            same = a.keys() == b.keys() and all(a[each][1] == b[each][1] for each in a)
            if a and same:
                pairs = [[each[name][0] for name in a] for each in (a, b)]
                bounded = all(0 <= value <= 1 for each in pairs for value in each)
                sides = paired([y - x for x, y in zip(*pairs)], bounded)
                yield self._row(task, HARNESS, 0, *pairs, sides, True, more)
                continue
            errors = [each.get("stderr") for each in settings]
            means, interval = (first.harness[task], second.harness[task]), None
            if None not in errors and math.hypot(*errors) > 0:
                half = Z * math.hypot(*errors)
                interval = (means[1] - means[0] - half, means[1] - means[0] + half)
            self.notes.append(
                f"harness {task}: no values of the same single questions in both, compared by standard errors"
            )
            samples = sum(each.get("questions", 0) for each in settings)
            difference = means[1] - means[0]
            yield Row(task, HARNESS, None, *means, difference, interval, samples, False, more_is_better=more)

    def _published(self) -> Iterator[Row]:
        first, second = ([name for name in run.scores.published if "/" not in name] for run in self.runs)
        for task in self._both("published", first, second):
            yield self._samples(task, 0, PUBLISHED)[0]


def _units(task: str, samples: dict[str, tuple]) -> dict[str, tuple]:
    """The rated samples; of MT-Bench the questions, each with the mean of its two answers, which hang together."""
    rated = {name: sample for name, sample in samples.items() if sample[0] is not None}
    if task != MT_BENCH:
        return rated
    groups: dict[str, list[tuple]] = defaultdict(list)
    for name, sample in rated.items():
        groups[name.rpartition("/")[0]].append(sample)
    return {
        name: (
            math.fsum(value for value, *_ in group) / len(group),
            *(tuple(each[i] for each in group) for i in (1, 2)),
        )
        for name, group in groups.items()
    }


def _counts(first: Sequence[float], second: Sequence[float]) -> dict[str, int]:
    wins = sum(b > a for a, b in zip(first, second))
    losses = sum(b < a for a, b in zip(first, second))
    return {"wins": wins, "losses": losses, "ties": len(first) - wins - losses}


# -- for people --------------------------------------------------------------------------------------------------------

OTHERS = {
    PERPLEXITY: "Perplexity of held-out text, and its ratio",
    HARNESS: "lm-evaluation-harness",
    PUBLISHED: "Published benchmarks, in per cent",
}
FOOT = (
    "First: {first}. Second: {second}. The difference is second less first, with its 95 % interval; wins, losses and ties are "
    "the second's. Where the interval holds 0, of a ratio 1, no difference can be shown; of twenty intervals of equal models "
    "one shows a difference by chance."
)


def markdown(found: Comparison) -> str:
    """Its tables, what is left out, and notes."""
    from .tables import table

    names = [f"{run['model'] or 'a model'} ({run['folder']})" for run in (found.first, found.second)]
    lines = ["# Comparison of two evaluations", "", FOOT.format(first=names[0], second=names[1]), ""]
    head = ("", "first", "second", "difference (95 %)", "wins, losses, ties", "n", "second is")
    tables = {}
    for row in found.rows:
        title = OTHERS.get(row.kind) or f"Accuracy at {row.length:,} tokens, in per cent"
        tables.setdefault(title, []).append(_line(row))
    for title, rows in tables.items():
        lines += [f"## {title}", "", *table(head, rows)]
    for title, told in (("Not compared", found.left_out), ("Notes", found.notes)):
        lines += [f"## {title}", "", *(f"* {each}" for each in told), ""] if told else []
    return "\n".join(lines).rstrip() + "\n"


def _line(row: Row) -> tuple[str, ...]:
    if row.kind == PERPLEXITY:
        numbers = (f"{row.first:.3f}", f"{row.second:.3f}")
        told = f"{row.difference:.4f}" + (f" ({row.interval[0]:.4f} to {row.interval[1]:.4f})" if row.interval else "")
    else:
        scale, places = (1, 4) if row.kind == HARNESS else (100, 1)
        numbers = tuple(f"{scale * each:.{places}f}" for each in (row.first, row.second))
        told = f"{scale * row.difference:+.{places}f}"
        low, high = row.interval or (0.0, 0.0)
        told += f" ({scale * low:+.{places}f} to {scale * high:+.{places}f})" if row.interval else ""
    counts = f"{row.wins}, {row.losses}, {row.ties}" if row.paired else "no pairs"
    name = f"{row.length:,} tokens" if row.kind == PERPLEXITY else row.what
    return (name, *numbers, told, counts, f"{row.samples:,}", row.verdict)
