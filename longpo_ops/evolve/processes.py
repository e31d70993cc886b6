"""Starts a stage in processes of its own, by itself or through a launcher, looks after them, and ends them all.

    Apart(folder, words).run(task, lock, tell)     words + [-m longpo_ops.evolve.child FOLDER], see child.py

torchrun starts its processes in sessions of their own, where no signal to its group comes: so all that is below the
launcher is signalled, one by one. SIGINT first, so that everything may close its files; SIGTERM and SIGKILL later. The
lock of the evolution's folder goes to the launcher as well: while it lives no second evolution begins there.

Tests: tests/evolve/test_child.py, tests/parallel/test_evolve_ranks.py.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..runs.locks import Lock
from .child import ENDED, LOG, PARENT, TASK, TOLD, machine

MODULE = "longpo_ops.evolve.child"
CLEARED = re.compile(
    r"(LOCAL_|GROUP_|NODE_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|(MASTER|ACCELERATE|FSDP|PARALLELISM_CONFIG|TORCHELASTIC)_.*"
)
POLL = 0.25
SIGNALS = ((signal.SIGINT, 20.0), (signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0))  # and seconds until the next one
TAIL = 5  # lines of the log, where nobody has said why


def check_launch(launch: Sequence[str]) -> None:
    """Raises ValueError for a program that is not there, or a config file that is not."""
    if launch and shutil.which(launch[0]) is None:
        raise ValueError(
            f"launch: no program {launch[0]!r} is to be found; expected one that can be run, say torchrun or accelerate"
        )
    for word, following in zip(launch, [*launch[1:], ""]):
        name, _, value = word.partition("=")
        if name in ("--config_file", "--config-file") and not Path(value or following).is_file():
            raise ValueError(f"launch: {name} {value or following}: no such file")


def command(launch: Sequence[str], folder: Path) -> list[str]:
    """The words that start a task: behind those of a launcher, or by this interpreter."""
    words = list(launch) or [sys.executable]
    return [*words, *([] if words[-1] in ("-m", "--module") else ["-m"]), MODULE, str(folder)]


def environment() -> dict[str, str]:
    """Of a stage: without what a launcher has told this process."""
    kept = {name: value for name, value in os.environ.items() if not CLEARED.fullmatch(name)}
    return kept | {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}


class Apart:
    """A task in processes of its own; what they leave and print is in `folder`. launch: words of a launcher, or none."""

    def __init__(self, folder: Path, launch: Sequence[str] = ()):
        self.folder, self.words = folder, command(launch, folder)

    def run(self, task: dict[str, Any], lock: Lock, tell: Callable[[float, str], None]) -> None:
        """To its end. Raises ValueError with the words of the process that failed, MemoryError if it lacked memory.

        On Ctrl-C, and whatever else ends it early, nothing of the task is left running.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in (self.folder / TASK, self.folder / TOLD, self.folder / ENDED, *self.folder.glob("*.partial")):
            left.unlink(missing_ok=True)
        (self.folder / TASK).touch(mode=0o600)  # an address in it may hold a key
        (self.folder / TASK).write_text(json.dumps(task | {"machine": machine()}, indent=1), encoding="utf-8")
        with open(self.folder / PARENT, "wb") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            with open(self.folder / LOG, "ab") as log:
                log.write(f"$ {shlex.join(self.words)}\n".encode())
                log.flush()
                process = subprocess.Popen(
                    self.words,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment(),
                    start_new_session=True,
                    pass_fds=(lock.file,),
                )
            try:
                while process.poll() is None:
                    tell(*self._news())
                    time.sleep(POLL)
            finally:
                end(process)
                (self.folder / TASK).unlink(missing_ok=True)
        self._raise_what_was_said(process.returncode)

    def peaks(self) -> tuple[int, int]:
        """Bytes of the host and of the device, of the first process so far."""
        told = _read(self.folder / TOLD)
        return told.get("host_bytes", 0), told.get("device_bytes", 0)

    def _news(self) -> tuple[float, str]:
        told = _read(self.folder / TOLD)
        return told.get("fraction", 0.0), told.get("note", "")

    def _raise_what_was_said(self, code: int) -> None:
        ended, log = _read(self.folder / ENDED), self.folder / LOG
        if not ended:
            lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = "\n".join([line for line in lines if line.strip()][-TAIL:])
            raise ValueError(f"{self.words[0]} {_how(code)}, and the stage has not said why; {log} ends with\n{last}")
        if ended["error"] is None:
            return
        if ended["kind"] == "memory":
            raise MemoryError(f"{ended['error']}; see {log}")
        known = ended["kind"] == "told"
        raise ValueError(ended["error"] if known else f"{ended['kind']}: {ended['error']}; its traceback is in {log}")


def end(process: subprocess.Popen) -> None:
    """A process and all below it. A second Ctrl-C goes on to the next signal at once."""
    import psutil

    family: set[psutil.Process] = set()
    for number, seconds in SIGNALS:
        try:
            if process.poll() is None:
                family.add(psutil.Process(process.pid))
            family |= {below for each in family for below in _below(each)}
            for each in family:
                with suppress(psutil.NoSuchProcess):
                    each.send_signal(number)
            until = time.monotonic() + seconds
            while process.poll() is None or any(map(_lives, family)):
                if time.monotonic() > until:
                    break
                time.sleep(0.05)
            else:
                return
        except KeyboardInterrupt:
            continue


def _below(process) -> list:
    import psutil

    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _lives(process) -> bool:
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _how(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
