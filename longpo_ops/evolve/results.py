"""What the finished stages of an evolution have given: the table, what was retained, what it cost.

Scores of a stage --> a row; Scores of the base and of a round, a Bound --> whether the round is promoted

Tests: tests/evolve/test_run.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from ..evaluate import Scores
from ..evaluate.report import KINDS
from ..runs.journal import write_atomically
from .receipt import Cost
from .settings import BASE, HARNESS, LAST, Bound, Evolution, Round, bound_length
from .stages import EVALUATE, PAIRS, TRAIN, UNTRAINED, Stage

DASH = "–"


@dataclass(frozen=True)
class Result:
    """What there is so far.

    rows: the table, a dictionary per evaluated model: round (None for the base), row ("base", "untrained", "after"),
    label, theta, accuracy {"comparable" or "local": {length: number}}, perplexity {length: number}, tasks {task: {length:
    number}}, harness and published {name: number}, comparable {task: flag}, where a number is {"value", "interval" (95 %, or
    None), "samples" (or None)}; untrained is the model the round starts from. retention: per round and bound what was
    measured and whether it holds. stages: name, done, and cost (receipt.py). promoted: the model of the last round, as they
    are listed, whose bounds hold, whatever it started from; or the base. stopped: why the loop ended early, or None.
    recipes: of every round what its pairs and its training follow.
    """

    rows: list[dict]
    retention: list[dict]
    stages: list[dict]
    promoted: str
    stopped: str | None
    recipes: dict[str, str]

    def save(self, path: Path) -> None:
        """As JSON."""
        write_atomically(path, (json.dumps(asdict(self), indent=1, allow_nan=False) + "\n").encode())


def collect(evolution: Evolution, stages: Sequence[Stage], stopped: str | None = None) -> Result:
    """Of the stages that are done, and the costs of those that were begun."""
    rows, retention, costs, promoted = [], [], [], evolution.model
    for stage in stages:
        receipt = stage.receipt()
        if receipt.cost != Cost():
            costs.append({"stage": stage.name, "done": receipt.done} | asdict(receipt.cost))
        if receipt.done and stage.kind in (UNTRAINED, EVALUATE):
            rows.append(_row(stage))
        if receipt.done and stage.kind == EVALUATE and stage.round is not None:
            bounds = judge(evolution, stage)
            retention += bounds
            promoted = stage.model.path if all(bound["holds"] for bound in bounds) else promoted
    recipes = {each.name: recipe_of(each, stages) for each in evolution.rounds}
    return Result(rows, retention, costs, promoted, stopped, recipes)


def recipe_of(each: Round, stages: Sequence[Stage]) -> str:
    """What a round follows: "official", or what its pairs follow and what its training does where these differ."""
    titles = {stage.kind: stage.run.title for stage in stages if stage.round is each and stage.kind in (PAIRS, TRAIN)}
    if len(set(titles.values())) == 1:
        return titles[PAIRS]
    return f"pairs {titles[PAIRS]}, training {titles[TRAIN]}"


def judge(evolution: Evolution, stage: Stage) -> list[dict]:
    """The bounds of an evaluated round: measure, length, base, after, limit, holds; of accuracy one for the comparable tasks
    and one for the local ones, as there are. A number that is none never holds."""
    base, after = Scores.load(Path(evolution.out) / BASE / EVALUATE), Scores.load(stage.out)
    judged = []
    for bound in evolution.retention:
        length = None if bound.measure.startswith(HARNESS) else bound_length(bound, evolution.evaluation())
        for name, was, now in _measured(base, after, bound, length):
            lower = bound.measure != "perplexity"
            limit = was - bound.within if lower else was * (1 + bound.within)
            holds = now >= limit if lower else now <= limit
            where = "" if length is None else f" at {length}"
            judged.append(
                {"round": stage.round.name, "measure": f"{name}{where}", "base": was, "after": now}
                | {"limit": limit, "side": "at least" if lower else "at most", "holds": bool(holds)}
            )
    return judged


def why_stopped(judged: list[dict]) -> str | None:
    """One sentence for the bounds that do not hold, or None."""
    broken = [
        f"{each['measure']} is {four_digits(each['after'])}, the base has {four_digits(each['base'])} and {each['side']} "
        f"{four_digits(each['limit'])} was asked for"
        for each in judged
        if not each["holds"]
    ]
    return f"round {judged[0]['round']!r} is not promoted: {'; '.join(broken)}" if broken else None


def measures(rows: list[dict]) -> list[tuple[str, list[dict], Callable[[dict | None], str]]]:
    """What any row has by length: its title, every row's numbers, and how they are written. Comparable and local tasks have a
    mean each."""
    found = [
        (f"accuracy, {kind} tasks", [row["accuracy"].get(kind, {}) for row in rows], three_places) for kind in KINDS
    ]
    found.append(("perplexity", [row["perplexity"] for row in rows], four_digits))
    return [(title, numbers, partial(told, write=write)) for title, numbers, write in found if any(numbers)]


def by_length(
    rows: list[dict], numbers: list[dict], write: Callable[[dict | None], str]
) -> tuple[list[str], list[tuple]]:
    """The lengths at which any row has such a number, and a line per row."""
    found = sorted({length for each in numbers for length in each})
    lines = [(row["label"], *(write(each.get(n)) for n in found)) for row, each in zip(rows, numbers)]
    return [f"{n:,}" for n in found], lines


def told(number: dict | None, write: Callable[[float | None], str]) -> str:
    """A number with its interval and its samples, as far as they are known; a dash for none."""
    if number is None:
        return DASH
    interval, samples = number["interval"], number["samples"]
    bar = f" ({write(interval[0])} to {write(interval[1])})" if interval else ""
    return write(number["value"]) + bar + (f", n={samples:,}" if samples else "")


def three_places(value: float | None) -> str:
    """A share as people read it; a dash for none."""
    return DASH if value is None else f"{value:.3f}"


def four_digits(value: float | None) -> str:
    """Any other number."""
    return DASH if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def _measured(base: Scores, after: Scores, bound: Bound, length: int | None) -> list[tuple[str, float, float]]:
    """What a bound is about, by name, of both."""
    name = bound.measure.removeprefix(HARNESS)
    try:
        if bound.measure == "accuracy":
            kinds = [kind for kind in KINDS if kind in {*base.kinds(length), *after.kinds(length)}]
            numbers = [[scores.accuracy(length, kind) for scores in (base, after)] for kind in kinds]
            return [(f"accuracy, {kind} tasks", *pair) for kind, pair in zip(kinds, numbers)]
        pair = [scores.perplexity[length] if length else scores.harness[name] for scores in (base, after)]
        return [(name, *pair)]
    except KeyError:
        raise ValueError(
            f"retention: the evaluation has no {bound.measure}" + (f" at {length}" if length else "")
        ) from None


def _number(value: float, interval: Sequence[float] | None, samples: int | None) -> dict:
    return {"value": value, "interval": interval and list(interval), "samples": samples}


def _of_kind(scores: Scores, kind: str, values: dict) -> dict:
    """Numbers that are no cells, with their intervals and counts."""
    found = {}
    for name, value in values.items():
        counts = scores.counts.get(name if kind == "published" else f"{kind}/{name}", {})
        samples = next((counts[each] for each in ("windows", "questions", "samples") if counts.get(each)), None)
        found[name] = _number(value, scores.intervals.get(f"{kind}/{name}"), samples)
    return found


def _means(scores: Scores) -> dict[str, dict[int, dict]]:
    found: dict[str, dict[int, dict]] = {}
    for length in scores.lengths():
        for kind in scores.kinds(length):
            mean = scores.mean(length, kind)
            found.setdefault(kind, {})[length] = _number(mean.score, mean.interval, mean.samples)
    return found


def _row(stage: Stage) -> dict:
    scores = Scores.load(stage.out)
    name, theta = stage.round and stage.round.name, stage.theta
    if name is None:
        kind, label = "base", "base"
    elif stage.kind == UNTRAINED:
        start = [] if stage.round.start == LAST else [Path(stage.round.start).name]
        raised = [] if theta is None else [f"theta {theta:g}"]
        kind, label = "untrained", f"{name}: {', '.join([*start, *raised, 'untrained'])}"
    else:
        kind, label = "after", f"{name}: after"
    tasks = {
        task: {n: _number(cell.score, cell.interval, cell.samples) for n, cell in cells.items()}
        for task, cells in scores.tasks.items()
    }
    return {
        "round": name,
        "row": kind,
        "label": label,
        "theta": theta,
        "accuracy": _means(scores),
        "tasks": tasks,
        "comparable": {task: all(cell.comparable for cell in cells.values()) for task, cells in scores.tasks.items()},
        "perplexity": _of_kind(scores, "perplexity", scores.perplexity),
        "harness": _of_kind(scores, "harness", scores.harness),
        "published": _of_kind(scores, "published", scores.published),
    }
