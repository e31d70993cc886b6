"""gpu_check.json as what a person reads: docs/measured.md, the README's GPU table, and the table that a check prints last.

    python -m benchmarks.gpu.report [gpu_check.json ...] [--docs FOLDER]
    python -m benchmarks.gpu.report --costs

It writes between the markers <!-- NAME --> and <!-- end NAME --> of README.md and docs/measured.md, and a picture per card into
docs/pictures/. The pages show all of benchmarks/results/*gpu-check*.json, where a file that is given is filed first, as
DATE-TIME-gpu-check-CARD.json; where there are none they say that nothing was measured. Reports of one card are merged in
the order of their dates: the check, `--only failed`, `--piece long`. A report that was cut off is read as far as it goes.

--docs FOLDER   writes the files that are given into FOLDER/README.md and FOLDER/docs/, copies of the pages where it has none:
                for rehearsals, which the project's own pages refuse
--costs         the table of questions and what they cost, in docs/measured.md, from questions.py

Tests: tests/benchmarks/gpu/test_report.py.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from ..stamp import RESULTS, ROOT
from . import tables
from .picture import draw
from .questions import LONG, QUESTIONS
from .tables import Table, label, reason, state, up

README, MEASURED = "README.md", "docs/measured.md"
BLOCK, COSTS = "gpu", "costs"  # names of the markers
UNMEASURED = {
    README: "GPU: not measured yet. `make gpu-check` measures everything in eight minutes on a machine that has one: "
    "[docs/measured.md](docs/measured.md).",
    MEASURED: "Not measured yet: no line of this project's GPU code has run on a GPU.",
}


class Run(NamedTuple):
    """One report, and the file it is in."""

    path: Path
    content: dict

    @property
    def card(self) -> str:
        """The GPU's name; a report that was cut off before its worker spoke has none."""
        gpu = (self.content.get("hardware") or {}).get("gpu") or {}
        return gpu.get("name") or self.content.get("card") or "unknown card"

    @property
    def date(self) -> str:
        return str(self.content.get("date") or "")


# ---- what a check prints last ----------------------------------------------------------------------------------------


def summary(content: dict, path: Path | None = None) -> str:
    """At most 40 lines: failures with their reasons, counts, the headline numbers, what was skipped, what it took."""
    rows = tables.merged([content])
    if not rows:
        return "\n".join(["no rows", *_ending(content, rows, path)])
    rest = [
        *_capped(tables.questions(rows).aligned(), 10),
        *_capped(_shown(tables.loss_headline(rows)), 11),
        *_capped(_shown(tables.step_table(rows), "TFLOP/s", "planned, s", "host, GiB", "also"), 9),
        *_skipped_lines(rows),
        *_ending(content, rows, path),
    ]
    return "\n".join([*_capped(_failed_lines(rows), max(5, 40 - len(rest))), *rest])


def _capped(lines: list[str], most: int) -> list[str]:
    return lines if len(lines) <= most else [*lines[: most - 1], f"… {len(lines) - most + 1} more lines in the report"]


def _failed_lines(rows: list[dict]) -> list[str]:
    bad = [row for row in rows if state(row) == "failed"]
    lines = [f"FAILED: {len(bad)} of {len(rows)} rows" if bad else f"no row failed, of {len(rows)}"]
    lines += [f"{label(row, *tables.NAMES)}: {reason(row)}"[:160] for row in bad]
    if again := tables.second_tries(rows):
        lines.insert(1, f'{len(again.lines)} more failed first and not when asked again: their "first" says why')
    return lines


def _shown(table: Table | None, *left_out: str) -> list[str]:
    return table.without(*left_out).aligned() if table else []


def _skipped_lines(rows: list[dict]) -> list[str]:
    """For want of time, of memory, of something else: how many rows of which question."""
    found: dict[str, dict[str, int]] = {"no time": {}, "memory": {}, "other reasons": {}}
    for row in (row for row in rows if state(row) == "skipped"):
        why = reason(row).partition(":")[0]
        counts = found[why if why in found else "other reasons"]
        counts[row["question"]] = counts.get(row["question"], 0) + 1
    return [
        f"skipped, {why}: " + ", ".join(f"{n} of {question}" for question, n in counts.items())
        for why, counts in found.items()
        if counts
    ]


def _ending(content: dict, rows: list[dict], path: Path | None) -> list[str]:
    compiled = sum(tables.number(row, "compiled") or 0 for row in rows)
    told = f"{_state(content)}; kernels compiled on this machine: {compiled}"
    return [told, *([f"report: {path}"] if path else [])]


def _state(content: dict) -> str:
    """finished, interrupted or cut off, where, and after how many seconds."""
    running, deadline = content.get("running"), content.get("deadline")
    told = str(content.get("state"))
    if told == "running":
        told = "cut off" + (f" at {', '.join(filter(None, map(str, running)))}" if running else " between rows")
    seconds = tables.number(content, "seconds")
    if seconds is None:
        return f"{told}; its rows took {up(_taken(content))} s"
    return f"{told} after {up(seconds)} s" + (f" of {deadline:g}" if tables.number(content, "deadline") else "")


def _taken(content: dict) -> float:
    return sum(tables.number(row, "took") or 0 for row in content["rows"])


# ---- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> Run:
    """Raises ValueError for what is no report of the check."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no report of `make gpu-check` can be read from it: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise ValueError(f'{path}: no report of `make gpu-check`: expected an object with a list "rows"')
    return Run(path, content)


def refuse_for_docs(run: Run) -> None:
    """Raises ValueError for what says nothing of a card."""
    why = None
    if run.content.get("rehearsal"):
        why = "is a rehearsal on a CPU"
    elif not (run.content.get("hardware") or {}).get("gpu"):
        why = "names no GPU: it was cut off before its first row, or is of a CPU"
    if why:
        raise ValueError(f"{run.path.name} {why}; the project's pages do not show it: --docs FOLDER writes elsewhere")


def filed(run: Run) -> Path:
    """Its file in benchmarks/results. Names sort by time, and a run that was filed before it ended is replaced by its end."""
    path = run.path.resolve()
    if path in reports():
        return path
    moment = f"{run.date[:10]}-{re.sub(':', '', run.date[11:19])}"
    target = RESULTS / f"{moment}-gpu-check-{short(run.card)}.json"
    shutil.copyfile(path, target)
    return target


def reports() -> list[Path]:
    return sorted(RESULTS.glob("*gpu-check*.json"))


def short(card: str) -> str:
    """A card's name as part of a file's: H100-80GB-HBM3."""
    return re.sub(r"\W+", "-", card.removeprefix("NVIDIA "))


def by_card(runs: list[Run]) -> dict[str, list[Run]]:
    """card -> its runs, the oldest first."""
    cards: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.date):
        cards.setdefault(run.card, []).append(run)
    return cards


# ---- pages -----------------------------------------------------------------------------------------------------------


def _failed_of(rows: list[dict]) -> str:
    bad = sum(state(row) == "failed" for row in rows)
    return f"**{bad} of {len(rows)} rows failed**" if bad else f"No row failed, of {len(rows)} that were finished"


def _paragraphs(*parts: str | tuple[str, Table | None]) -> str:
    """Text as it is, tables under their headings; a heading without a table is left out."""
    texts = [part if isinstance(part, str) else part[1] and f"{part[0]}\n\n{part[1].markdown()}" for part in parts]
    return "\n\n".join(filter(None, texts))


def _runs(runs: list[Run]) -> Table:
    lines = []
    for number, (path, content) in enumerate(runs, 1):
        versions = content.get("versions") or {}
        told = ", ".join(
            f"{name} {versions[name]}" for name in ("torch", "triton", "transformers", "python") if versions.get(name)
        )
        commit = str(content.get("commit") or "unknown")[:12] + (
            " with changes" if content.get("changed_files") else ""
        )
        link = f"[{path.name}](../benchmarks/results/{path.name})" if path.resolve().parent == RESULTS else path.name
        command = f"`{content.get('command')}`"
        lines.append((str(number), str(content.get("date"))[:10], link, command, commit, told, _state(content)))
    return Table(("run", "date", "report", "command", "commit", "versions", "state"), lines)


def measured_block(cards: dict[str, list[Run]], root: Path) -> str:
    """A section per card: failures first, then the loss, steps, other speeds, accuracy, and what was skipped."""
    blocks = []
    for card, runs in cards.items():
        rows = tables.merged([run.content for run in runs])
        picture = f"pictures/gpu-{short(card)}.png"
        shown = f"![the loss and whole steps]({picture})" if (root / "docs" / picture).exists() else ""
        blocks.append(
            _paragraphs(
                (f"### {card}", _runs(runs)),
                f"{_failed_of(rows)}.",
                ("Failures:", tables.failures(rows)),
                ("Failed first, and not when asked again:", tables.second_tries(rows)),
                ("Questions:", tables.questions(rows)),
                ("The loss:", tables.loss_table(rows)),
                ("Whole steps, planned and measured:", tables.step_table(rows)),
                shown,
                ("Other speeds:", tables.speed_table(rows)),
                ("The worst row of each function, against its error budget:", tables.accuracy_table(rows)),
                ("Skipped:", tables.skipped(rows)),
            )
        )
    return "\n\n".join(blocks)


def readme_block(cards: dict[str, list[Run]]) -> str:
    blocks = []
    for card, runs in cards.items():
        rows = tables.merged([run.content for run in runs])
        dates = " and ".join(dict.fromkeys(run.date[:10] for run in runs))
        commits = " and ".join(dict.fromkeys(str(run.content.get("commit") or "unknown")[:12] for run in runs))
        told = f"{card}, {dates}, commit {commits}: {_failed_of(rows)} ([all numbers](docs/measured.md))."
        found = tables.loss_headline(rows), tables.step_table(rows)
        blocks.append(_paragraphs(told, *(table.without("also").markdown() for table in found if table)))
    return "\n\n".join(blocks)


def costs() -> str:
    """The questions in order of worth: seconds on each card, alone and with those before."""
    from .setting import CARDS  # brings torch, which the process that prints `summary` does without

    cards = [column for card in CARDS for column in (f"{card}, s", "until")]
    lines, until = [], dict.fromkeys(CARDS, 0.0)
    for question in QUESTIONS:
        cells = []
        for card, setting in CARDS.items():
            until[card] += (seconds := question.seconds(setting))
            cells += [f"{seconds:.0f}", f"{until[card]:.0f}"]
        lines.append((f"`{question.name}`", question.asks, *cells))
    for question in LONG:
        cells = [cell for setting in CARDS.values() for cell in (f"{question.seconds(setting):.0f}", "")]
        lines.append((f"`{question.name}`, asked for by name", question.asks, *cells))
    return Table(("question", "asks", *cards), lines).markdown()


def between(text: str, name: str, body: str, file: str) -> str:
    """`text` with `body` between the markers of `name`. Raises ValueError where `file` lacks them."""
    first, last = f"<!-- {name} -->", f"<!-- end {name} -->"
    before, found, rest = text.partition(first)
    _, ended, after = rest.partition(last)
    if not (found and ended):
        raise ValueError(f"{file}: the lines {first} and {last} are missing, between which this writes: put them back")
    return f"{before}{first}\n{body}\n{last}{after}"


def pages(root: Path) -> dict[str, str]:
    """The pages this writes into; a folder that has none gets copies."""
    for name in (README, MEASURED):
        if not (root / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, root / name)
    return {name: (root / name).read_text() for name in (README, MEASURED)}


def write(runs: list[Run], root: Path) -> None:
    """Both pages and the pictures under `root`. Everything is checked before anything is written."""
    cards = by_card(runs)
    old = pages(root)
    for name, text in old.items():
        between(text, BLOCK, "", name)
    for card, own in cards.items():
        draw(card, tables.merged([run.content for run in own]), root / f"docs/pictures/gpu-{short(card)}.png")
    blocks = {README: readme_block(cards), MEASURED: measured_block(cards, root)} if cards else UNMEASURED
    for name, text in old.items():
        (root / name).write_text(between(text, BLOCK, blocks[name], name))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="gpu_check.json")
    parser.add_argument("--docs", type=Path, default=ROOT, metavar="FOLDER", help="write there, not into this checkout")
    parser.add_argument("--costs", action="store_true", help="only the table of what the questions cost")
    options = parser.parse_args(arguments)
    try:
        if options.costs:
            text = pages(options.docs)[MEASURED]
            (options.docs / MEASURED).write_text(between(text, COSTS, costs(), MEASURED))
            return 0
        runs = list(map(read, options.files or reports()))
        if options.docs.resolve() == ROOT:
            for run in runs:
                refuse_for_docs(run)
            for run in runs:
                print(f"{run.path.name}: {filed(run).name}")
            runs = list(map(read, reports()))
        write(runs, options.docs)
    except ValueError as error:
        print(error)
        return 1
    print(
        f"{len(runs)} reports of {', '.join(by_card(runs)) or 'no card: not measured yet'}: README.md, docs/measured.md"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
