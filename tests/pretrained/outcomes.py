"""How a forked child takes a model folder, on the way that the commands take before work begins.

    outcome()  of one folder and one probe: "taken:", "refused: ...", "unnamed: ..." (a refusal that does not name the folder),
               "foreign: ..." (a traceback), "hangs: ..." or "dies: ..."

As a script it takes all broken folders, or some of them, through all probes, and prints counts:

    python -m tests.pretrained.outcomes [--sample 40] [--seed 0] [--only PATTERN] [--probe plan,train,engine] [--log FILE]

Not covered: files without permission (a test may run as root), names of a hub.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from longpo_ops.engines import Request, Sampling
from longpo_ops.engines.settings import EngineSettings
from longpo_ops.memory import plan, search
from longpo_ops.memory.trace import read_config
from longpo_ops.train.run import TrainRun, prepare

from .broken import cases, make

SECONDS, CLOCK, BYTES = 10, 120, 6 << 30  # of a processor, of the clock, of memory: what a child may take
WORST = ("taken", "refused", "unnamed", "foreign", "dies", "hangs")
PAIR = {
    "id": "1",
    "document": "Ann rows.",
    "turns": [{"instruction": "Who?", "chunk": "Ann rows.", "chosen": "Ann", "rejected": "Bob"}],
}


def outcome(folder: Path, probe: Callable[[str], None]) -> str:
    """What becomes of probe(folder) in a forked child. A refusal that does not name the folder is "unnamed: ..."."""
    with tempfile.TemporaryFile("w+") as told:
        child = os.fork()
        if child == 0:
            _answer(folder, probe, told)
        _, status = os.waitpid(child, 0)
        told.seek(0)
        if os.WIFSIGNALED(status):
            ended = signal.Signals(os.WTERMSIG(status))
            return f"{'hangs' if ended in (signal.SIGXCPU, signal.SIGALRM) else 'dies'}: {ended.name}"
        return told.read()


def _answer(folder: Path, probe: Callable[[str], None], told) -> None:
    """In the child, which ends here."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, size + BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    signal.alarm(CLOCK)
    torch.set_num_threads(1)
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            probe(str(folder))
        said = "taken:"
    except (ValueError, OSError, ImportError) as error:  # which the commands tell in a line
        message = " ".join(str(error).split())
        said = f"{'refused' if str(folder) in message else 'unnamed'}: {type(error).__name__}: {message}"
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = f"foreign: {type(error).__name__}: {error} [{Path(last.filename).name}:{last.lineno}]"
    finally:
        told.write(said)
        told.flush()
        os._exit(0)


def write_pairs(folder: Path) -> None:
    """Where probe_train looks for them: beside the model's folder."""
    (folder / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n")


def probe_plan(name: str) -> None:
    search.fit(plan.Work(read_config(name), 4096, (32,)), plan.Machine(70 << 30, 128 << 30))


def probe_train(name: str) -> None:
    data = str(Path(name).parent / "pairs.jsonl")
    settings = {"use_cpu": True, "report_to": "none", "optim": "adamw_torch"}
    run = TrainRun.from_settings(settings | {"model": name, "data": data, "output_dir": f"{name}-out"})
    prepare(run)
    run.load_model(name, policy=True)


def probe_engine(name: str) -> None:
    async def ask() -> None:
        settings = EngineSettings(model=name)
        settings.load_tokenizer()
        engine = settings.make_engine(64)
        await engine.start()
        done = await engine.generate(Request("One?", Sampling(max_tokens=4), logprobs=True))
        scores = await engine.score([1, 2, 3, 4, 5])
        assert np.isfinite([*scores, *done.logprobs]).all(), f"{scores}, {done.logprobs}"

    asyncio.run(ask())


PROBES = {"plan": probe_plan, "train": probe_train, "engine": probe_engine}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sample", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--probe", default=",".join(PROBES))
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    changes, probes = cases(options.seed), options.probe.split(",")
    names = [name for name in changes if re.search(options.only, name)]
    if options.sample:
        names = random.Random(options.seed).sample(names, options.sample)
    log = options.log.open("w") if options.log else sys.stdout
    counts = {probe: collections.Counter() for probe in ["all", *probes]}
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch, "base")
        make(base)
        write_pairs(base.parent)
        for i, name in enumerate(names):
            folder = Path(scratch, f"case{i}")
            shutil.copytree(base, folder)
            changes[name](folder)
            kinds = []
            for probe in probes:
                began = time.monotonic()
                came = outcome(folder, PROBES[probe])
                kinds.append(came.split(":")[0])
                counts[probe][kinds[-1]] += 1
                print(f"{name} | {probe} | {time.monotonic() - began:.2f} s | {came}", file=log, flush=True)
            counts["all"][max(kinds, key=WORST.index)] += 1
            shutil.rmtree(folder)
    for probe, counted in counts.items():
        print(probe, dict(counted))


if __name__ == "__main__":
    main()
