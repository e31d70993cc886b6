"""make gpu-check: is everything right on this GPU, and how fast is it? It needs torch, triton and nvcc, and no install.

    python -m benchmarks.gpu.check [--piece NAME ...] [--rehearse]

Each piece runs in a process of its own under a limit of less than nine minutes and writes its rows, as they come, to
gpu_check_PIECE.json in the folder $OUT (default: benchmarks/results), with the hardware, versions, commit, command and
date. A piece that crashes or hangs leaves what it had; the next one still runs. Exit status 1 if any row failed.

    correctness   every tile function of every back-end against float64 by error budget; public: the public functions
    attention     every attention kernel on rows of pairs against float64
    ceilings      what torch.mm and a copy reach at our shapes, and our products beside them
    epilogue      tile functions against a copy           logprobs   scoring against torch.mm
    loss          forward and backward at 6NHV            workspace  the same by size of scratch
    peers         Liger, CCE, QuACK and torch, where they can be imported
    step          a whole training step, its features on and off, against transformers (needs transformers and torchao)
    offload       activation offload and tiling: gradients against plain checkpointing, slowdown, rate of copies

--rehearse runs all of it on the CPU with tiny shapes: a check of this script, not of any speed. Its default folder is
build/rehearsal. Not covered: several GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ..stamp import RESULTS, ROOT, stamp
from . import attention, correctness, speed
from .setting import FULL, REHEARSAL, Setting


def step(setting: Setting) -> Iterator[dict]:
    from ..training.step import rows  # here: it needs more packages than the other pieces

    yield from rows(setting)


def offload(setting: Setting) -> Iterator[dict]:
    from ..training.offload import rows

    yield from rows(setting)


PIECES = {  # name -> (its rows, seconds it may take)
    "correctness": (correctness.correctness, 530),
    "public": (correctness.public, 530),
    "attention": (attention.rows, 530),
    "ceilings": (speed.ceilings, 240),
    "epilogue": (speed.epilogue, 530),
    "logprobs": (speed.logprobs, 530),
    "loss": (speed.loss, 530),
    "workspace": (speed.workspace, 530),
    "peers": (speed.peers, 530),
    "step": (step, 530),
    "offload": (offload, 530),
}


def file_of(piece: str, rehearsal: bool) -> Path:
    return (
        Path(os.environ.get("OUT") or (ROOT / "build/rehearsal" if rehearsal else RESULTS)) / f"gpu_check_{piece}.json"
    )


class Report:
    """One piece's JSON, whole after every row."""

    def __init__(self, path: Path, head: dict):
        self.path, self.content = path, head | {"state": "running", "rows": []}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def add(self, row: dict) -> None:
        self.content["rows"].append(row)
        self._write()
        print(_line(row), flush=True)

    def close(self, state: str) -> None:
        self.content["state"] = state
        self._write()

    def _write(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        temporary.replace(self.path)


def _line(row: dict) -> str:
    name = " | ".join(str(row[key]) for key in ("what", "backend", "case") if key in row)
    numbers = {
        "milliseconds": "ms",
        "tflops": "TFLOP/s",
        "fraction_of_matmul": "of matmul",
        "fraction_of_copy": "of copy",
    }
    shown = [f"{row[key]:.4g} {unit}" for key, unit in numbers.items() if key in row]
    return f"{name}: {row['status']}" + (f", {', '.join(shown)}" if shown else "")


def failed(row: dict) -> bool:
    return row["status"].startswith("failed")


def run_piece(name: str, setting: Setting) -> bool:
    """Rows of one piece into its file -> whether none failed."""
    rehearsal = not setting.on_gpu
    report = Report(file_of(name, rehearsal), stamp(piece=name, rehearsal=rehearsal))
    for row in PIECES[name][0](setting):
        report.add(row)
    failures = sum(map(failed, report.content["rows"]))
    report.close(f"finished: {len(report.content['rows'])} rows, {failures} failed")
    return failures == 0


def run_in_process(name: str, rehearse: bool) -> bool:
    """One piece in a fresh process under its limit -> whether it finished and none of its rows failed."""
    limit, path = PIECES[name][1], file_of(name, rehearse)
    path.unlink(missing_ok=True)  # rows of an earlier run must not pass for this one's
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--here", "--piece", name]
    try:
        state = subprocess.run([*command, *(["--rehearse"] if rehearse else [])], timeout=limit, cwd=ROOT).returncode
        state = state and f"exit status {state}"
    except subprocess.TimeoutExpired:
        state = f"stopped after {limit} s"
    content = json.loads(path.read_text()) if path.exists() else {"piece": name, "rows": []}
    if not content.get("state", "").startswith("finished"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content | {"state": f"failed: {state}"}, indent=1) + "\n")
    print(f"== {name}: {'passed' if state == 0 else 'failed'} ({json.loads(path.read_text())['state']})", flush=True)
    return state == 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--piece", action="append", choices=PIECES, help="only this piece (repeatable; default: all)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU with tiny shapes")
    parser.add_argument("--here", action="store_true", help="in this process, without a limit")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        print("gpu-check needs a CUDA device, and torch sees none; --rehearse runs the script on the CPU")
        return 1
    setting = REHEARSAL if options.rehearse else FULL
    results = [
        run_piece(name, setting) if options.here else run_in_process(name, options.rehearse)
        for name in options.piece or PIECES
    ]
    return 0 if all(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
