"""A worker whose questions make trouble, for test_check.py: rows that kill it, hang, fail once, or do not fit."""

import os
import signal
import time

from benchmarks.gpu import questions, worker
from benchmarks.gpu.questions import Question
from benchmarks.gpu.rows import Row


def passes(seed: int) -> dict:
    return {"status": "passed", "seed": seed}


def fails(seed: int) -> dict:
    return {"status": "failed: error 2, allowed 1"}


def fails_once(seed: int) -> dict:
    return passes(seed) if seed else fails(seed)


def dies(seed: int) -> dict:
    os.kill(os.getpid(), signal.SIGSEGV)


def raises(seed: int) -> dict:
    raise ValueError("a shape does not fit")


def hangs(seed: int) -> dict:
    time.sleep(600)


def rows(*computes):
    return lambda setting: [Row("row", compute.__name__, compute) for compute in computes]


crash = rows(passes, dies, fails_once, raises)
stuck = rows(passes, hangs, passes)
seeds = rows(fails, fails_once, passes)


def costs(setting):
    return [
        Row("row", "large", passes, device_bytes=1 << 63),
        Row("row", "host", passes, host_bytes=1 << 63),
        Row("row", "slow", passes, seconds=1e6),
        Row("row", "quick", passes),
    ]


MODULE = "tests.benchmarks.gpu.trouble"
QUESTIONS = {
    name: Question(name, f"What does {name} do?", f"{MODULE}:{name}", own_process=name == "crash")
    for name in ("crash", "stuck", "seeds", "costs")
}

if __name__ == "__main__":
    questions.BY_NAME |= QUESTIONS
    worker.main()
