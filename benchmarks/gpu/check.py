"""make gpu-check: is everything right on this GPU, how fast is it, and how long a sequence fits? It needs no install.

    python -m benchmarks.gpu.check [--deadline SECONDS] [--piece NAME ...] [--only failed] [--host-bytes N]
                                   [--rehearse] [--list]

The questions of questions.py are asked in order of worth until the deadline. This process keeps gpu_check.json in the folder
$OUT (default: benchmarks/results), whole after every row, and never touches the device; a worker computes the rows
(worker.py). A worker that dies is started again behind the row that killed it; a failed row that is cheap is asked
once more with another seed; a row for which no time or memory is left says so. Exit status 1 if any row failed.

--only failed   the rows that failed in the last report; the first that fails again runs under compute-sanitizer
--rehearse      all of it on the CPU with tiny shapes: a check of this script, not of any speed; into build/rehearsal
--list          the questions and what they cost on an H100 and an H200

Where .carry/ lies beside this checkout (make gpu-pack), its kernels, library and wheels are used (carried.py). Not covered:
several GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..stamp import RESULTS, ROOT, command
from .carried import CARRY, allocator, prepare
from .questions import BY_NAME, LONG, QUESTIONS, Question
from .report import read, summary
from .tables import failed

FILE, BEFORE = "gpu_check.json", "gpu_check_before.json"  # the report, and the one that it found in its place
GRACE = 3.0  # seconds before the deadline by which the last row must be done
CHEAP = 10.0  # seconds up to which a failed row is asked again
DEATHS = 3  # of workers, after which a question is given up
WORKER = "benchmarks.gpu.worker"
PROBE = "import torch; raise SystemExit(not torch.cuda.is_available())"
STOPPED = "skipped: no time: the deadline came"


def folder(rehearsal: bool) -> Path:
    return Path(os.environ.get("OUT") or (ROOT / "build/rehearsal" if rehearsal else RESULTS))


class Report:
    """gpu_check.json, whole after every change."""

    def __init__(self, path: Path, **head):
        self.path, self.content = path, head | {"state": "running", "running": None, "rows": []}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.replace(path.with_name(BEFORE))
        self._write()

    def note(self, **more) -> None:
        self.content = more | self.content | more  # the head stays in front
        self._write()

    def add(self, row: dict) -> None:
        """The row, in the place of an earlier one of its name, whose status it keeps as "first"."""
        rows, names = self.content["rows"], ("question", "what", "backend", "case")
        earlier = next((i for i, old in enumerate(rows) if all(old[n] == row[n] for n in names)), None)
        if earlier is None:
            rows.append(row)
        else:
            rows[earlier] = row | {"first": rows[earlier]["status"]}
        self.note(running=None)
        print(_line(row), flush=True)

    def rows(self, question: str) -> list[dict]:
        return [row for row in self.content["rows"] if row["question"] == question]

    def pace(self) -> float:
        """Seconds that rows took, over what they should have taken; within bounds, as short rows say little about long ones."""
        timed = [row for row in self.content["rows"] if "took" in row]
        expected = sum(row["expected"] for row in timed)
        return min(max(sum(row["took"] for row in timed) / expected, 0.5), 1.5) if expected else 1.0

    def _write(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        temporary.replace(self.path)


def _line(row: dict) -> str:
    name = " | ".join(row[key] for key in ("what", "backend", "case") if row[key])
    numbers = {
        "milliseconds": "ms",
        "seconds": "s",
        "tflops": "TFLOP/s",
        "fraction_of_matmul": "of matmul",
        "fraction_of_copy": "of copy",
    }
    shown = [f"{row[key]:.4g} {unit}" for key, unit in numbers.items() if key in row]
    return f"{name}: {row['status']}" + (f", {', '.join(shown)}" if shown else "")


class Died(Exception):
    """A worker is gone; says how."""


class Worker:
    """A process of worker.py, started at once, so that its imports go by while others compute."""

    def __init__(self, options: list[str], environment: dict[str, str], wrapper: tuple[str, ...] = ()):
        words = [*wrapper, sys.executable, "-m", WORKER, *options]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(words, cwd=ROOT, env=os.environ | environment, **pipes)
        self.messages: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with suppress(ValueError):  # a line that the worker's death cut off
            for line in self.process.stdout:
                self.messages.put(json.loads(line))
        self.messages.put(None)

    def send(self, order: dict) -> None:
        with suppress(OSError):  # it may be dead: next() says how
            print(json.dumps(order), file=self.process.stdin, flush=True)

    def next(self, until: float) -> dict:
        """The next message. Raises TimeoutError at the unix time `until`, and Died."""
        try:
            message = self.messages.get(timeout=max(0.0, until - time.time()))
        except queue.Empty:
            raise TimeoutError from None
        if message is None:
            status = self.process.wait()
            raise Died(f"its process ended with {f'signal {-status}' if status < 0 else f'status {status}'}")
        return message

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class Check:
    """One run of the questions into one report."""

    def __init__(self, report: Report, until: float, options: list[str], environment: dict[str, str]):
        self.report, self.until, self.options, self.environment = report, until, options, environment
        self.workers: dict[str, Worker] = {}

    def start(self, questions: list[Question]) -> None:
        for question in questions:
            self._worker(question)

    def ask(self, question: Question, only: list | None = None) -> None:
        """All rows of a question, or those with these keys; then once more those that failed and are cheap."""
        self._answers(question, only, seed=0)
        again = [_key(row) for row in self.report.rows(question.name) if failed(row) and row.get("took", 0) <= CHEAP]
        if again and time.time() < self.until:
            self._answers(question, again, seed=1)
        if question.own_process:
            self._end_worker(question)  # which gives back its part of the device

    def end(self) -> None:
        for worker in self.workers.values():
            worker.end()

    def _name(self, question: Question) -> str:
        return question.name if question.own_process else ""

    def _worker(self, question: Question) -> Worker:
        name = self._name(question)
        if name not in self.workers:
            self.workers[name] = Worker(self.options, self.environment)
        return self.workers[name]

    def _end_worker(self, question: Question) -> None:
        if (worker := self.workers.pop(self._name(question), None)) is not None:
            worker.end()

    def _answers(self, question: Question, only: list | None, seed: int) -> None:
        done, deaths = [], 0
        while deaths < DEATHS and time.time() < self.until:
            worker = self._worker(question)
            order = {"question": question.name, "only": only, "done": done, "seed": seed}
            worker.send(order | {"until": self.until - GRACE, "pace": self.report.pace()})
            try:
                self._listen(question, worker, done)
                return
            except Died as death:
                deaths += 1
                self._close_running(question, f"failed: {death}", done)
            except TimeoutError:
                self._close_running(question, STOPPED, done)
            self._end_worker(question)
        self._tell_rest(question, STOPPED if deaths < DEATHS else f"skipped: {deaths} workers have died")

    def _tell_rest(self, question: Question, status: str) -> None:
        self.report.add(
            {"question": question.name, "what": "rows", "backend": "", "case": "the rest", "status": status}
        )

    def _listen(self, question: Question, worker: Worker, done: list) -> None:
        while "end" not in (message := worker.next(self.until)):
            if "head" in message:
                self.report.note(**message["head"] | {"command": self.report.content["command"]})
            elif "start" in message:
                self.report.note(running=[question.name, *message["start"]])
            else:
                done.append(_key(message["row"]))
                self.report.add(message["row"])

    def _close_running(self, question: Question, status: str, done: list) -> None:
        """The row that a worker did not come back from, if it was at one."""
        running = self.report.content["running"]
        if running is None:
            running = [question.name, "worker", "", "between rows"]
        done.append(running[1:])
        self.report.add(dict(zip(("question", "what", "backend", "case"), running, strict=True)) | {"status": status})


def _key(row: dict) -> list[str]:
    return [row["what"], row["backend"], row["case"]]


def last_report(out: Path) -> dict:
    """The newest gpu_check.json, of $OUT or of the results. Raises ValueError where there is none that can be read."""
    found = [path for path in (out / FILE, *sorted(RESULTS.glob("*gpu-check*.json"), reverse=True)) if path.exists()]
    if not found:
        raise ValueError(f"--only failed: no {FILE} in {out} and no *gpu-check*.json in {RESULTS}: run the check first")
    return read(found[0]).content


def sees_gpu() -> bool:
    """Whether torch sees a GPU: asked of another process, as this one never touches the device."""
    return subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT).returncode == 0


def sanitise(check: Check, question: Question, key: list[str]) -> None:
    """The row once more under compute-sanitizer's memcheck, whose findings become a row of their own."""
    log = check.report.path.with_name("sanitizer.log")
    worker = Worker(check.options, check.environment, ("compute-sanitizer", "--log-file", str(log)))
    worker.send({"question": question.name, "only": [key], "done": [], "seed": 0, "until": check.until, "pace": 0.0})
    told = {"question": question.name, "what": "compute-sanitizer", "backend": key[1], "case": f"{key[0]}: {key[2]}"}
    try:
        while "end" not in worker.next(check.until):
            pass
    except (Died, TimeoutError) as error:
        check.report.add(told | {"status": f"skipped: {error or 'no time'}"})
    finally:
        worker.end()
    if log.exists():
        lines = log.read_text().splitlines()
        found = [line for line in lines if "=========" in line and "Invalid" in line]
        status = f"failed: {found[0].strip('= ')}" if found else "passed"
        check.report.add(told | {"status": status, "log": lines[:40]})


def listing() -> str:
    """A line for each question: seconds on an H100, on an H200, and what is asked."""
    from .setting import CARDS

    lines = []
    for question in (*QUESTIONS, *LONG):
        costs = [f"{question.seconds(setting):6.0f}" for setting in CARDS.values()]
        lines.append(f"{question.name:12} {' '.join(costs)}   {question.asks}")
    return "\n".join([f"{'seconds on':12} {' '.join(f'{card:>6}' for card in CARDS)}", *lines])


def main(arguments: list[str] | None = None) -> int:
    start = time.time()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--deadline", type=_number(float, "seconds above 0"), default=3600.0, help="seconds that all of it may take"
    )
    parser.add_argument("--piece", action="append", choices=BY_NAME, help="only this question (repeatable)")
    parser.add_argument("--only", choices=["failed"], help="only rows that failed in the last report")
    parser.add_argument(
        "--host-bytes",
        type=_number(int, "bytes, 1 or more"),
        help="of the host, where more can be had than is available now",
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU with tiny shapes")
    parser.add_argument("--list", action="store_true", help="what is asked, and what it costs")
    options = parser.parse_args(arguments)
    if options.list:
        print(listing())
        return 0
    out = folder(options.rehearse)
    try:
        questions, only = _chosen(options, out)
    except ValueError as error:
        parser.error(str(error))
    if not questions:
        print("--only failed: no row failed in the last report")
        return 0
    if not options.rehearse and not sees_gpu():
        print("gpu-check needs a CUDA device, and torch sees none; --rehearse runs the script on the CPU")
        return 1
    report = Report(out / FILE, command=command(), rehearsal=options.rehearse, deadline=options.deadline)
    words = ["--rehearse"] * options.rehearse
    words += ["--host-bytes", str(options.host_bytes)] if options.host_bytes else []
    check = Check(report, start + options.deadline, words, {} if options.rehearse else _carried(report))
    try:
        check.start(questions)
        for question in questions:
            check.ask(question, only and only[question.name])
        if only and shutil.which("compute-sanitizer"):
            _sanitise_first(check)
        state = "finished"
    except KeyboardInterrupt:
        state = "interrupted"
    finally:
        check.end()
    report.note(state=state, seconds=time.time() - start)
    print(summary(report.content, report.path), flush=True)
    return int(state != "finished" or any(map(failed, report.content["rows"])))


def _number(kind: type, expected: str) -> Callable:
    """What argparse turns a word into a number with."""

    def number(text: str):
        with suppress(ValueError):
            if 0 < (value := kind(text)) < float("inf"):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return number


def _carried(report: Report) -> dict[str, str]:
    """The environment in which what gpu-pack sent along is used; what came of it is told."""
    if not CARRY.is_dir():
        return allocator()
    environment, facts = prepare(CARRY, ROOT / "build" / "carried")
    report.note(carried=facts)
    print(f"carried: {json.dumps(facts)}", flush=True)
    return environment


def _chosen(options: argparse.Namespace, out: Path) -> tuple[list[Question], dict[str, list] | None]:
    """The questions, and for each the keys of the rows that are asked (None: all)."""
    if options.only is None:
        return [BY_NAME[name] for name in options.piece] if options.piece else list(QUESTIONS), None
    only: dict[str, list] = {}
    for row in filter(failed, last_report(out)["rows"]):
        only.setdefault(row["question"], []).append(_key(row))
    return [BY_NAME[name] for name in only], only


def _sanitise_first(check: Check) -> None:
    first = next(filter(failed, check.report.content["rows"]), None)
    if first is not None:
        sanitise(check, BY_NAME[first["question"]], _key(first))


if __name__ == "__main__":
    raise SystemExit(main())
