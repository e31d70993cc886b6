"""All cases, all candidates, one fresh process each: a Markdown table on the screen and in results/, and dated JSON.

    python -m benchmarks.losses.run                      the cases that finish in five minutes on two cores
    python -m benchmarks.losses.run --all                the long ones too
    python -m benchmarks.losses.run ce-2k kl --rounds 3  some cases; rounds alternate, on a noisy machine
    python -m benchmarks.losses.run --out FOLDER         where results go (benchmarks/results)
    python -m benchmarks.losses.run ce-2k --tokens       without the errors of summed log-probs (sums.py)
    python -m benchmarks.losses.run ce-8k --add          beside the other cases that today's file has

`results/README.md` shows the latest table of each class of host between markers. Of CPUs: `make gpu-check` measures
GPUs. Exit status 1 where our results are wrong, or the C++ back-end misses a target (`missed` in the JSON).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..stamp import RESULTS, host_class, stamp
from .cases import CASES, Case, make
from .measurement import MEASURED, Order, measure, sizes, timings
from .peers import OURS, SPARSE, UPCAST, candidates, ours
from .sums import LENGTHS
from .sums import measure as measure_sums
from .truth import ROUNDED, ROWS, truth

TIMES = {
    "float32": 1.0,
    "bfloat16": 3.0,
}  # faster than the best peer, at least; 1.0 where the processor multiplies bfloat16
SPARSE_TIMES = {False: 1.2, True: 1.4}  # on a real model's states, by whether the head is frozen
SCRATCH = 64 << 20  # bytes beyond inputs, delivered gradients and the float32 gradient of the head, at most
SLOW = 1.5  # times the best peer: from there on a candidate is visited once
LIMIT = {False: 6.0, True: 60.0}  # seconds of timed runs of one measurement, by whether long cases are run


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="case", help=", ".join(CASES))
    parser.add_argument("--all", action="store_true", help="the long cases too")
    parser.add_argument("--rounds", type=int, default=1, help="visits of each candidate that is not SLOW")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each visit")
    parser.add_argument("--threads", type=int, help="only this many threads")
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=LENGTHS, help="of sequences whose log-probs are summed"
    )
    parser.add_argument("--add", action="store_true", help="beside the cases that today's file of this host has")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}: expected some of {', '.join(CASES)}")
    names = options.cases or [
        name for name, case in CASES.items() if not name.startswith("tiny") and (options.all or not case.long)
    ]
    start, rows, sums = time.monotonic(), [], Sums(options.tokens)
    long = options.all or bool(options.cases)
    before = earlier(options.out) if options.add else None
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(folder, "inductor")))  # compile once, not per process
        for name in names:
            case = CASES[name]
            try:
                truths = write_truths(case, Path(folder))
            except ImportError as error:
                print(f"{name}: not measured: {error}", file=sys.stderr)
                continue
            for threads in [options.threads] if options.threads else case.threads if long else case.threads[-1:]:
                rows += sums.beside(case, measure_case(case, threads, options, LIMIT[long], truths))
                now = stamp(took_s=round(time.monotonic() - start), load=os.getloadavg(), rows=rows)
                report = added(before, now)
                report["missed"] = missed(report["rows"], report["hardware"]["features"])
                path = write(report, options.out)  # each time: what was measured outlives an interruption
    print(table(report["rows"]))
    print("\n".join(["", *report["missed"], f"{report['took_s']} s; {path.name}"]))
    wrong = any(ours(row["candidate"]) and row["status"].startswith("wrong") for row in rows)
    return int(wrong or bool(report["missed"]))


def write_truths(case: Case, folder: Path) -> dict[str, str]:
    """Files with the truth of every size the case may be measured at."""
    paths = {}
    for sized in sizes(case):
        paths[str(sized.rows)] = str(folder / f"{case.name}-{sized.rows}.pt")
        torch.save(tuple(truth(sized, make(sized))), paths[str(sized.rows)])
    return paths


def measure_case(case: Case, threads: int, options, limit: float, truths: dict[str, str]) -> list[dict]:
    """One row per candidate; the rounds' runs are put together."""
    rows, yardstick = {}, None
    for number in range(options.rounds):
        for name in candidates(case):
            if number and _is_slow(name, rows):
                continue
            order = Order(case.name, name, threads, options.repeats, limit, truths, yardstick)
            result = measure(order)
            yardstick = yardstick or result.get("errors")  # the first is plain PyTorch
            rows[name] = together(rows.get(name), result)
            told = f"{rows[name]['median_s']:.2f} s" if "median_s" in rows[name] else result["status"]
            print(f"{case.name}, {threads} threads, {name}: {told}", file=sys.stderr, flush=True)
    shape = {"case": case.name, "op": case.op, "N": case.rows, "H": case.width, "V": case.vocab, "dtype": case.dtype}
    return [shape | {"threads": threads, "candidate": name} | row for name, row in rows.items()]


def _is_slow(name: str, rows: dict[str, dict]) -> bool:
    """Whether nothing is decided by another visit: no time was measured, or one far behind the best that is not ours."""
    times = {other: row["median_s"] for other, row in rows.items() if "median_s" in row}
    peers = [seconds for other, seconds in times.items() if not ours(other)]
    return name not in times or times[name] > SLOW * min(peers or times.values())


class Sums:
    """The errors of summed log-probs, measured once for each dtype and candidate."""

    def __init__(self, lengths: Sequence[int]):
        self.lengths, self.found = lengths, {}

    def beside(self, case: Case, rows: list[dict]) -> list[dict]:
        """The rows; those that were measured and deliver log-probs of a head's rows have sums: tokens -> nats."""
        asked = self.lengths and case.op != "kl"
        names = [row["candidate"] for row in rows if asked and row["status"] == MEASURED]
        missing = [name for name in names if (case.dtype, name) not in self.found]
        if missing:
            told = measure_sums(case.dtype, missing, self.lengths, rows[0]["threads"])
            self.found |= {(case.dtype, name): told.get(name, {}) for name in missing}
        return [
            row | {"sums": self.found[case.dtype, row["candidate"]]} if row["candidate"] in names else row
            for row in rows
        ]


def together(before: dict | None, now: dict) -> dict:
    if before is None or "seconds" not in before or "seconds" not in now:
        return now
    rounds = [*before.get("seconds_rounds", [before["seconds"]]), now["seconds"]]
    all_runs = timings(*(before[name] + now[name] for name in ("seconds", "extra_bytes_runs")))
    return now | all_runs | {"seconds_rounds": rounds}


def missed(rows: list[dict], features: list[str]) -> list[str]:
    """The targets that our C++ back-end, which a CPU gets, does not reach on a processor with these features, in words."""
    native, found = {"avx512_bf16", "amx_bf16"} & {*features}, []
    for row in rows:
        if (
            row["candidate"] not in (f"{OURS} (cpu)", SPARSE)
            or row["status"] != MEASURED
            or row["case"].startswith("tiny")
        ):
            continue
        about = f"{row['case']}, {row['threads']} threads"
        peers = [each["median_s"] for each in rows if _rivals(each, row)]
        times, least = min(peers) / row["median_s"] if peers else None, _least(row, bool(native))
        if times is not None and times < least:
            found.append(f"{about}: {times:.2f} times as fast as the best peer, at least {least} required")
        summed = 4 * row["V"] * row["H"] if row["dtype"] == "bfloat16" else 0
        if row["extra_bytes"] - summed > SCRATCH:
            found.append(
                f"{about}: {(row['extra_bytes'] - summed) >> 20} MiB of scratch, at most {SCRATCH >> 20} required"
            )
    return found


def _least(row: dict, native: bool) -> float:
    """How many times faster than the best peer a row has to be."""
    case = CASES[row["case"]]
    if row["candidate"] == SPARSE and case.states != "flat":
        return SPARSE_TIMES[case.frozen]
    return 1.0 if native else TIMES[row["dtype"]]


# -- what is shown ---------------------------------------------------------------------------------------------------


COLUMNS = (
    "case",
    "N, H, V, dtype",
    "threads",
    "candidate",
    "seconds",
    "best peer / this",
    "extra MiB",
    "errors",
    "sums off by",
)


def table(rows: list[dict]) -> str:
    """Markdown: per measurement its time, that of the best peer over it, its memory and its errors."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        shape = f"{row['N']}, {row['H']}, {row['V']}, {row['dtype']}"
        lead = f"| {row['case']} | {shape} | {row['threads']} | {row['candidate']} |"
        if row["status"] != MEASURED:
            lines.append(f"{lead} {row['status'].replace('|', '/')} | | | | |")
            continue
        peers = [r["median_s"] for r in rows if _rivals(r, row)]
        ratio = f"{min(peers) / row['median_s']:.2f}" if peers else ""
        smaller = f" at N={row['rows']}" if row["rows"] != row["N"] else ""
        gradients = max(error for name, error in row["errors"].items() if name not in ("loss", ROWS, ROUNDED))
        lines.append(
            f"{lead} {row['median_s']:.3g}{smaller} | {ratio} | {row['extra_bytes'] / 2**20:.0f} "
            f"| {row['errors']['loss']:.0e}, {gradients:.0e}{_by_rows(row['errors'])} | {_nats(row.get('sums', {}))} |"
        )
    return "\n".join(lines)


def _by_rows(errors: dict[str, float]) -> str:
    return f"; rows {errors[ROWS]:.1e} ({errors[ROUNDED]:.1e})" if ROWS in errors else ""


def _nats(sums: dict[str, float]) -> str:
    return ", ".join(f"{nats:.2g} of {int(tokens):,}" for tokens, nats in sums.items())


def _rivals(other: dict, row: dict) -> bool:
    """Whether `other` is a peer that was measured at the same size."""
    same = all(other.get(key) == row.get(key) for key in ("case", "threads", "rows"))
    return same and other["status"] == MEASURED and other["candidate"] != UPCAST and not ours(other["candidate"])


def earlier(folder: Path) -> dict | None:
    """Today's report of this host, if there is one. Raises ValueError where its hardware or versions are not those of now."""
    now = stamp()
    path = folder / file_of(now)
    if not path.exists():
        return None
    before = json.loads(path.read_text())
    for name in ("hardware", "versions"):
        if before[name] != now[name]:
            raise ValueError(f"{path.name} has other {name} than now: {before[name]}, {now[name]}; leave --add out")
    return before


def added(before: dict | None, now: dict) -> dict:
    """One report: the rows of now, those of before whose case and threads are not among them, and under `earlier` how the
    latter came to be."""
    if before is None:
        return now
    told = [*before.get("earlier", []), {name: before[name] for name in ("date", "command", "commit", "changed_files")}]
    new = {(row["case"], row["threads"]) for row in now["rows"]}
    kept = [row for row in before["rows"] if (row["case"], row["threads"]) not in new]
    return now | {"rows": [*kept, *now["rows"]], "earlier": told, "took_s": before["took_s"] + now["took_s"]}


def file_of(report: dict) -> str:
    return f"{report['date'][:10]}-cpu-{host_class()}.json"


def write(report: dict, folder: Path) -> Path:
    """The JSON, and the table in the folder's README.md."""
    folder.mkdir(parents=True, exist_ok=True)
    name = host_class()
    path = folder / file_of(report)
    path.write_text(json.dumps(report, indent=1) + "\n")
    readme = folder / "README.md"
    text = readme.read_text() if readme.exists() else INTRODUCTION
    readme.write_text(with_section(text, name, section(report, path)))
    return path


INTRODUCTION = """# Results

Written by `make bench` (`python -m benchmarks.losses.run`): the latest table of each class of host, beside the dated JSON it
comes from.

* seconds: forward and backward, median of the runs of a fresh process; nothing is timed before its results are checked.
* best peer / this: how many times faster than the best that is not ours.
* extra MiB: peak memory beyond inputs and delivered gradients. The float32 gradient of a 16-bit head, 4 V H bytes, is
  part of it.
* errors: of the loss, and the largest of the gradients, against float64, over the truth's largest value; gradients on a
  sample of rows. Of a real model's states also the 99th percentile over rows of hidden, and in brackets what it would be if dz
  were rounded to bfloat16: what a sparse hidden gradient is judged by.
* "naive, inputs upcast" is what can be done by hand, at a float32 model's memory, and no peer.
* sums off by: nats by which the log-probs of 512 and of 8,192 tokens, summed, differ from float64 on average (sums.py): inputs
  of the row's dtype, logits with a standard deviation of 3, likely labels.

`python -m benchmarks.compare OLD.json NEW.json` says what got slower, larger or less exact from one file of a host to the
next, beyond the noise of the repeats in both, and which targets the new one misses.
"""


def section(report: dict, path: Path) -> str:
    machine, versions = report["hardware"], report["versions"]
    features = ", ".join(machine["features"])
    commands = " and ".join(
        f"`{each['command']}` (commit {(each['commit'] or 'unknown')[:12]}{' with changes' * bool(each['changed_files'])})"
        for each in (*report.get("earlier", []), report)
    )
    return (
        f"## {machine['processor']}, {machine['cores']} cores ({features})\n\n"
        f"[{path.name}]({path.name}): {commands}, torch {versions['torch']}, "
        f"{report['took_s']} s.\n\n{table(report['rows'])}"
    )


def with_section(text: str, name: str, body: str) -> str:
    """`text` with `body` between the markers of `name`, which are added at the end where they are missing."""
    first, last = f"<!-- {name} -->", f"<!-- end {name} -->"
    block = f"{first}\n{body}\n{last}"
    if first in text:
        return re.sub(f"{re.escape(first)}.*?{re.escape(last)}", lambda _: block, text, flags=re.DOTALL)
    return f"{text.rstrip()}\n\n{block}\n"


if __name__ == "__main__":
    sys.exit(main())
