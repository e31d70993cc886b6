"""One measurement of a loss in a process of its own: correctness first, then time and memory of forward and backward.

    python -m benchmarks.losses.measurement '{"case": ..., "candidate": ..., ...}'    prints one line of JSON

1. In 16 bits, a probe at N/16: a CPU without 16-bit products would need minutes, so what is projected to exceed the
   limit is measured at that size and says so.
2. One full run, which warms up and compiles; its loss and gradients are compared with the float64 truth on a sample. An
   error beyond the budget makes the candidate wrong: nothing is timed.
3. Up to `repeats` runs. Seconds are their median; memory is the peak resident size of a run beyond what was resident
   before it (the inputs among it) and beyond the gradients it delivers. The float32 gradient of a 16-bit head is extra.

Of CPUs only: a GPU's losses are timed by gpu/speed.py. Tests: tests/benchmarks/losses/test_run.py.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from ..measure import Peak, fresh
from .cases import CASES, Case, Inputs, make
from .peers import SPARSE, Candidate, candidates
from .truth import ROUNDED, ROWS, Truth

PROBE = 16
MEASURED = "measured"
SANITY = 2.0**-4  # what plain PyTorch itself, the yardstick of all others, may be off by
SLACK = 8  # how many times plain PyTorch's error, plus a rounding, a candidate may be off by


@dataclass(frozen=True)
class Order:
    """What to measure."""

    case: str
    candidate: str
    threads: int
    repeats: int
    limit: float  # seconds all timed runs may take together
    truths: dict[str, str]  # rows -> file with the truth at that size
    yardstick: dict[str, float] | None  # plain PyTorch's errors


def measure(order: Order) -> dict:
    """The measurement of an order, made in a fresh process. Never raises for what happens in there."""
    patience = 4 * order.limit + 120  # compiling, the probe and the first run are not timed
    try:
        return fresh("benchmarks.losses.measurement", json.dumps(asdict(order)), seconds=patience)
    except subprocess.TimeoutExpired:
        return {"status": f"no result within {patience:.0f} s"}
    except RuntimeError as error:
        return {"status": f"failed: {error}"}


def perform(order: Order, registry: Callable[[Case], dict[str, Candidate]] = candidates) -> dict:
    """The measurement, in this process."""
    torch.set_num_threads(order.threads)
    case = CASES[order.case]
    call = registry(case)[order.candidate]
    try:
        if _needs_probe(case) and _probe(case.shrunk(PROBE), call) * PROBE > order.limit:
            case = case.shrunk(PROBE)
        inputs = make(case)
        _, loss = run(case, inputs, call)
    except ImportError as error:
        return {"status": f"not installed: {error}"}
    errors = load(order.truths[str(case.rows)]).errors(loss, inputs.gradients())
    result = {"rows": case.rows, "errors": errors}
    result["status"] = verdict(errors, order.yardstick, case, order.candidate == SPARSE)
    if result["status"] != MEASURED:
        return result
    seconds, extra = [], []
    while len(seconds) < order.repeats and sum(seconds) + max(seconds, default=0.0) <= order.limit:
        inputs.clear()
        with Peak() as peak:
            seconds.append(run(case, inputs, call)[0])
        extra.append(max(0, peak.bytes - inputs.gradient_bytes()))
    return result | timings(seconds, extra)


def timings(seconds: list[float], extra: list[int]) -> dict:
    """Of all runs, and what a table shows of them."""
    shown = {"median_s": statistics.median(seconds), "extra_bytes": max(extra)}
    return {"seconds": seconds, "extra_bytes_runs": extra} | shown


def sizes(case: Case) -> list[Case]:
    """The sizes a case may be measured at, each of which needs a truth."""
    return [case, case.shrunk(PROBE)] if _needs_probe(case) else [case]


def _needs_probe(case: Case) -> bool:
    return case.torch_dtype.itemsize == 2


def _probe(case: Case, call: Candidate) -> float:
    inputs = make(case)
    run(case, inputs, call)
    return run(case, inputs, call)[0]


def run(case: Case, inputs: Inputs, call: Candidate) -> tuple[float, float]:
    """Forward and backward -> seconds and the loss; the gradients are left in the leaves."""
    inputs.clear()
    start = time.perf_counter()
    loss = call(case, inputs)
    loss.backward()
    return time.perf_counter() - start, float(loss.detach())


def verdict(errors: dict[str, float], yardstick: dict[str, float] | None, case: Case, sparse: bool = False) -> str:
    """MEASURED, or "wrong: ..." where an error is beyond SLACK times plain PyTorch's plus one rounding. Of a sparse hidden
    gradient each row's is asked instead: at the 99th percentile it is at most that of rounding dz to bfloat16."""
    eps = torch.finfo(case.torch_dtype).eps
    if sparse and not errors[ROWS] <= errors[ROUNDED]:
        return f"wrong: rows of hidden are off by {errors[ROWS]:.1e}, allowed {errors[ROUNDED]:.1e}"
    for name in errors.keys() - {ROWS, ROUNDED, *(["hidden"] if sparse else [])}:
        error = errors[name]
        allowed = SANITY if yardstick is None else SLACK * (yardstick[name] + eps)
        if not error <= allowed:  # so that NaN is wrong
            return f"wrong: {name} is off by {error:.1e} of its largest value, allowed {allowed:.1e}"
    return MEASURED


def load(path: str) -> Truth:
    return Truth(*torch.load(path))


if __name__ == "__main__":
    print(json.dumps(perform(Order(**json.loads(sys.argv[1])))))
