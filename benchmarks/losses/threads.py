"""What more threads are worth to our losses, beside what they are worth to a plain product, in one run.

    python -m benchmarks.losses.threads [case ...] [--threads 2] [--repeats 9]       ce-2k and prose-2k unless cases are named

    gain  = seconds with one thread / seconds with --threads             medians of repetitions of all lines that alternate
    share = gain of the loss / gain of the plain product                 at least LEAST, or exit status 1

The plain product is that of the case's logits, h (N, H) W^T (H, V), whole and by torch: a third of what a loss multiplies.
Times are of forward and backward in one process, with the C++ back-end; the sparse hidden gradient is a line of cases that
have a real model's states. Results go to results/threads-DATE-HOST.json. Not covered: GPUs, peers (run.py).

Tests: tests/benchmarks/losses/test_threads.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..stamp import RESULTS, host_class, stamp
from .cases import CASES, Case, Inputs, make
from .measurement import run
from .peers import OURS, SPARSE, candidates

PRODUCT = "plain product"
LEAST = 0.95


def lines(case: Case, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """By name, one call."""
    hidden, weight = (inputs[name].detach().flatten(0, -2) for name in (inputs.leaves[0], "weight"))
    out = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype)
    ours = {name: call for name, call in candidates(case).items() if name in (f"{OURS} (cpu)", SPARSE)}
    losses = {name: lambda call=call: run(case, inputs, call) for name, call in ours.items()}
    return {PRODUCT: lambda: torch.mm(hidden, weight.t(), out=out)} | losses


def measure(case: Case, threads: int, repeats: int) -> list[dict]:
    """A row for each line: seconds with one thread and with `threads`, gain and share."""
    called, before = lines(case, make(case)), torch.get_num_threads()
    seconds = {name: {1: [], threads: []} for name in called}
    try:
        for repeat in range(repeats + 1):
            for name, call in called.items():
                for count in (1, threads):
                    torch.set_num_threads(count)
                    start = time.perf_counter()
                    call()
                    if repeat:  # the first one warms up
                        seconds[name][count].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    gains = {name: statistics.median(of[1]) / statistics.median(of[threads]) for name, of in seconds.items()}
    return [
        {"case": case.name, "candidate": name, "threads": threads, "one_thread_seconds_runs": of[1]}
        | {"seconds_runs": of[threads], "gain": gains[name], "share": gains[name] / gains[PRODUCT]}
        for name, of in seconds.items()
    ]


def missed(rows: list[dict]) -> list[str]:
    return [
        f"{row['case']}, {row['candidate']}: {row['share']:.2f} of a plain product's gain, at least {LEAST} required"
        for row in rows
        if row["share"] < LEAST
    ]


def table(rows: list[dict]) -> str:
    shown = ["| case | line | one thread | threads | gain | of the product's |", "|---|---|---|---|---|---|"]
    for row in rows:
        one, more = (statistics.median(row[name]) for name in ("one_thread_seconds_runs", "seconds_runs"))
        shown.append(
            f"| {row['case']} | {row['candidate']} | {one:.3g} s | {row['threads']}: {more:.3g} s | {row['gain']:.2f} "
            f"| {row['share']:.2f} |"
        )
    return "\n".join(shown)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="case", default=["ce-2k", "prose-2k"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    unknown = [name for name in options.cases if name not in CASES]
    if unknown or options.threads < 2:
        parser.error(f"expected two threads or more, and some of {', '.join(CASES)}")
    rows = [row for name in options.cases for row in measure(CASES[name], options.threads, options.repeats)]
    report = stamp(rows=rows, missed=missed(rows))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"threads-{report['date'][:10]}-{host_class()}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join([table(rows), "", *report["missed"], path.name]))
    return int(bool(report["missed"]))


if __name__ == "__main__":
    sys.exit(main())
