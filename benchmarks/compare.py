"""What has become slower, larger or less exact from one result file to another, beyond the noise that both have measured?

    python -m benchmarks.compare OLD.json NEW.json             exit status 1 where something has, or NEW misses its own target
    python -m benchmarks.compare OLD.json NEW.json --across    of two different processors, which is refused else

Any JSON of benchmarks.losses.run, benchmarks.gpu.check or benchmarks/training is read in one way. A number is told by its name
(time: seconds, milliseconds; memory: bytes with peak or extra; error), by the names on the way to it and by those that its row
has of itself (case, candidate, N, ...). Its repeats are a list of numbers under its name or NAME_runs, or better the rounds
under `rounds`, SIDE_rounds or NAME_rounds, each a new process: runs of one are alike, so a round counts once, by their mean. A
median and a fastest run out of at least four count as three runs: the fastest, the median, and one as far above.

The rule. Of a number's n and m repeats, both at least two, as logarithms x:

    ratio = exp(mean x_new - mean x_old),    t = log ratio / sqrt(s^2 (1/n + 1/m)),    s^2 pooled, n + m - 2 degrees of freedom

is beyond noise where Student's t is as far from 0 by chance at most 0.05 / C times, C the numbers that are judged: one false
alarm in twenty comparisons of files, not in twenty numbers. It fits few repeats because t widens as they get few: two against
two must differ by 14 to 100 times what their means' noise is (C of 10 to 500). Resampling two or three numbers makes intervals
far too narrow, and ranges of two and two lie apart by chance once in three. Relative noise is about the same for long and
short times, hence logarithms; an outlier, which in timings is a slow run, hides a change rather than makes one.

A number that a file has once is not judged: no noise is known of it. The greatest changes among such are shown. Not covered:
noise that a file has not seen. Runs of one process do not know how processes differ (ask for --rounds), nor runs of one hour
how hours do. Rates, and ratios of numbers that are compared themselves, are left out.

Tests: tests/benchmarks/test_compare.py.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from longpo_ops.evaluate.intervals import chance

LEVEL = 0.05
KINDS = {  # of a number, by its name or that of what holds it
    "time": re.compile(r"(\w+_)?(milli)?seconds"),
    "memory": re.compile(r"\w*(peak|extra)\w*_bytes"),
    "error": re.compile(r"(\w+_)?errors?"),
}
NO_MEASUREMENT = re.compile(r"(predicted|planned|planner|plain|fastest|expected)_\w+|ratio|took")
ABOUT = (
    "hardware",
    "versions",
    "carried",
    "shape",
    "settings",
    "targets",
    "allowed",
    "load",
)  # groups without measurements
NAMES = (  # what a row is called by
    *("question", "what", "backend", "case", "candidate", "variant", "tokenizer", "task", "label", "seed", "stage"),
    *("dtype", "threads", "N", "H", "V", "rows", "length", "vocabulary"),
)
GOOD, BAD = ("measured", "passed"), ("wrong", "failed")  # how a status begins
AT_LEAST = ("faster", "share_of_one_copy")  # targets that are no upper limit
ONCE, OF_RUNS, OF_ROUNDS = range(3)  # what a value is one of; where a file has several, the last counts
SHOWN = 5  # of numbers that are not judged

Place = tuple[str, ...]


class Number(NamedTuple):
    """Of one file, at one place."""

    place: Place
    kind: str
    values: list[float]  # of each repeat; a single one: no repeats

    @property
    def middle(self) -> float:
        return statistics.median(self.values)


class Change(NamedTuple):
    """Of a number that both files have. chance: of so large a difference without any; None: not known."""

    old: Number
    new: Number
    ratio: float | None  # None: one of them is 0
    chance: float | None


# -- reading -----------------------------------------------------------------------------------------------------------


def numbers(report: dict) -> dict[Place, Number]:
    """The measurements of a report by their places, what they are of first: files have sides and kinds in either order."""
    found: dict[Place, dict[int, Number]] = {}
    for way, value, seen in _walk(report, ()):
        at, kind = _kind(way)
        if kind and math.isfinite(value):
            place = (*way[:at], *way[at + 1 :], way[at])
            found.setdefault(place, {}).setdefault(seen, Number(place, kind, [])).values.append(value)
    return {place: each[max(each)] for place, each in found.items()}


def _kind(way: Place) -> tuple[int, str | None]:
    """-> which name tells what is measured, and what."""
    if not any(NO_MEASUREMENT.fullmatch(name) for name in way):
        for at in reversed(range(len(way))):
            for kind, rule in KINDS.items():
                if rule.fullmatch(way[at]):
                    return at, kind
    return 0, None


def _walk(node, place: Place, seen: int = ONCE) -> Iterator[tuple[Place, float, int]]:
    """-> place, value, and what it is one of."""
    if isinstance(node, dict):
        if seen == ONCE:
            place = (*place, *(f"{node[name]}" for name in NAMES if _names(node.get(name))))
            place = (*place, *(f"{name}={value}" for name, value in node.get("shape", {}).items() if place))
        for key, value in node.items():
            if key not in ABOUT and not (key in NAMES and _names(value)) and (place or isinstance(value, dict | list)):
                way = (*place, *filter(None, [re.sub("(_runs|_?rounds)$", "", key)]))
                if key.endswith("_rounds"):
                    value = [statistics.fmean(each) if isinstance(each, list) else each for each in value]
                yield from _walk(value, way, OF_ROUNDS if key.endswith("rounds") else seen)
        yield from _few(node, place)
    elif isinstance(node, list):
        alike = seen or not any(isinstance(value, dict | list) for value in node)
        for index, value in enumerate(node):
            named = alike or any(name in value for name in NAMES)
            yield from _walk(value, place if named else (*place, f"{index}"), max(seen, OF_RUNS) if alike else ONCE)
    elif isinstance(node, int | float) and not isinstance(node, bool):
        yield place, float(node), seen


def _names(value) -> bool:
    return isinstance(value, str | int) and value != ""


def _few(node: dict, place: Place) -> Iterator[tuple[Place, float, int]]:
    """The three runs that a median and a fastest stand for."""
    if node.get("repeats", 0) >= 4 and "milliseconds_runs" not in node:
        middle, fastest = node["milliseconds"], node["fastest_milliseconds"]
        yield from (((*place, "milliseconds"), value, OF_RUNS) for value in (fastest, middle, middle**2 / fastest))


def statuses(report: dict) -> dict[str, str]:
    """Of each row that has one."""
    return {_called(row): row["status"] for row in report.get("rows", ()) if "status" in row}


def _called(row: dict) -> str:
    return " ".join(f"{row[name]}" for name in NAMES if _names(row.get(name)))


def differences(old: dict, new: dict) -> tuple[list[str], list[str]]:
    """What of the hosts, and of the versions, is not the same, in words."""

    def host(report: dict) -> dict:
        told = {name: report["hardware"].get(name) for name in ("machine", "processor", "features", "cores")}
        return told | {"gpu": (report["hardware"].get("gpu") or {}).get("name")}

    def differ(a: dict, b: dict) -> list[str]:
        return [f"{name} {a.get(name)} -> {b.get(name)}" for name in a | b if a.get(name) != b.get(name)]

    return differ(host(old), host(new)), differ(old["versions"], new["versions"])


# -- judging -----------------------------------------------------------------------------------------------------------


def compare(old: Number, new: Number) -> Change:
    """Two numbers of one place."""
    if min(*old.values, *new.values) <= 0:
        same = set(old.values) == set(new.values) and len(old.values) > 1 < len(new.values)
        return Change(old, new, None, 1.0 if same else None)
    logs = [[math.log(value) for value in each.values] for each in (old, new)]
    (n, m), (a, b) = map(len, logs), map(statistics.fmean, logs)
    freedom = n + m - 2
    if min(n, m) < 2:
        return Change(old, new, math.exp(b - a), None)
    squares = sum((x - mean) ** 2 for each, mean in zip(logs, (a, b), strict=True) for x in each)
    noise = math.sqrt(squares / freedom * (1 / n + 1 / m))
    found = chance((b - a) / noise, freedom) if noise else float(abs(b - a) <= 1e-12)
    return Change(old, new, math.exp(b - a), found)


def beyond(changes: list[Change]) -> list[Change]:
    """Those beyond noise, the worst first."""
    judged = [change for change in changes if change.chance is not None]
    found = [change for change in judged if change.chance <= LEVEL / len(judged) and change.ratio not in (None, 1.0)]
    return sorted(found, key=lambda change: -change.ratio)


def missed_targets(report: dict) -> list[str]:
    """What a report does not reach of its targets, in words: `targets` of all rows, `target` of one, or what it says itself."""
    status = report.get("status", "")
    missed = [*report.get("missed", ()), *([status] if status.startswith(BAD) else ())]
    for row in report.get("rows", ()):
        about = _called(row)
        if row.get("within_targets") is False:
            missed.append(f"{about}: not within {row['targets']}")
        own = {name: row["target"] for name in ("times_kept", "share_of_one_copy") if name in row and "target" in row}
        for name, limit in (report.get("targets", {}) | own).items():
            if isinstance(limit, dict):  # by measure, of one side beside TRL's
                of = row["sides"][name]["of_trl"]
                over = [(key, most) for key, most in limit.items() if of[key] > most]
                missed += [f"{about}: {name} {key} {of[key]:.3f} of TRL's, at most {most}" for key, most in over]
                continue
            told = row.get(name)
            told = told.get("ratio", told) if isinstance(told, dict) else told
            for value in told.values() if isinstance(told, dict) else [told]:
                if value is None or (value < limit if name in AT_LEAST else value > limit):
                    missed.append(f"{about}: {name} {value}, {'at least' if name in AT_LEAST else 'at most'} {limit}")
    return missed


# -- what is shown -----------------------------------------------------------------------------------------------------


def line(change: Change) -> str:
    ratio = "   -  " if change.ratio is None else f"{change.ratio:6.3f}"
    return f"  {ratio}  {_told(change.old)} -> {_told(change.new)}  {change.old.kind}: {_about(change.old)}"


def _about(number: Number) -> str:
    return " ".join(name for name in number.place[1:] if "=" not in name or name.startswith(("N=", "n=", "V=")))


def _told(number: Number) -> str:
    least, most = min(number.values), max(number.values)
    return f"{number.middle:.5g}" + (f" ({least:.5g} to {most:.5g})" if len(number.values) > 1 else "")


def report_of(old: dict, new: dict) -> tuple[list[str], bool]:
    """-> lines, and whether something got worse."""
    before, after = numbers(old), numbers(new)
    changes = [compare(before[key], after[key]) for key in before if key in after]
    found = beyond(changes)
    unknown = [change for change in changes if change.chance is None]
    judged = len(changes) - len(unknown)
    was, now = statuses(old), statuses(new)
    broken = [
        f"  {name}: {was[name]} -> {now[name]}"
        for name in was
        if was[name].startswith(GOOD) and now.get(name, "").startswith(BAD)
    ]
    missed = missed_targets(new)
    lines = [f"{judged} numbers compared by their repeats: {judged - len(found)} within noise, {len(found)} beyond it"]
    lines += [line(change) for change in found]
    lines.append(f"{len(unknown)} without repeats in one file or both, not judged")
    unknown = [change for change in unknown if change.ratio not in (None, 1.0)]
    lines += [line(change) for change in sorted(unknown, key=lambda change: -abs(math.log(change.ratio)))[:SHOWN]]
    for name, has, lacks in (("OLD", before, after), ("NEW", after, before)):
        alone = [has[key] for key in has if key not in lacks]
        lines.append(f"{len(alone)} in {name} alone" + "".join(f"\n  {_about(each)}" for each in alone[:SHOWN]))
    lines += [f"{len(broken)} measured or passed in OLD, wrong or failed in NEW", *broken] if broken else []
    lines += ["NEW misses its own target", *(f"  {each}" for each in missed)] if missed else []
    return lines, bool(broken or missed) or any(change.ratio > 1 for change in found)


def read(path: Path) -> dict:
    """A result file. Raises ValueError for what is none."""
    try:
        report = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}; expected a JSON file that a benchmark wrote") from None
    if not isinstance(report, dict) or not {"hardware", "versions"} <= set(report):
        raise ValueError(
            f"{path}: says no hardware and versions; expected a JSON file that a benchmark wrote (benchmarks/stamp.py)"
        )
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--across", action="store_true", help="of two different processors or GPUs, too")
    options = parser.parse_args(arguments)
    try:
        old, new = read(options.old), read(options.new)
    except ValueError as error:
        parser.error(f"{error}")
    hosts, versions = differences(old, new)
    if hosts and not options.across:
        parser.error(f"two different hosts ({'; '.join(hosts)}): expected files of one, or --across")
    for name, report, path in (("OLD", old, options.old), ("NEW", new, options.new)):
        print(f"{name} {path.name}: {report.get('date')}, commit {(report.get('commit') or 'unknown')[:12]}")
    for name, differ in (("hosts", hosts), ("versions", versions)):
        if differ:
            print(f"{name} differ: {'; '.join(differ)}")
    lines, worse = report_of(old, new)
    print("\n".join(lines))
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())
