"""What every measurement stands on: a process of its own, and its peak memory.

What is measured is the benchmarks' own: losses/measurement.py, training/step.py and the others. Memory of a CUDA device is
not in Peak: torch counts that itself. Tests: tests/benchmarks/losses/test_run.py.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from .stamp import ROOT


def fresh(
    module: str,
    *arguments: str,
    seconds: float | None = None,
    environment: dict[str, str] | None = None,
    python: str = sys.executable,
) -> dict:
    """The JSON that a module prints last, run in a fresh process, by the interpreter of another environment where one is named.
    Raises RuntimeError with the last line of its failure, and subprocess.TimeoutExpired after so many seconds."""
    command, surroundings = [python, "-m", module, *arguments], os.environ | (environment or {})
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT, env=surroundings)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


class Peak:
    """Peak resident bytes within a `with`, beyond those at its start: the kernel's own mark where it can be reset,
    else the largest of samples taken every millisecond."""

    def __enter__(self) -> Peak:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed must not count as there already
        self.start = _resident("VmRSS")
        self.exact = _reset_mark()
        if not self.exact:
            self.largest, self.done = self.start, threading.Event()
            self.thread = threading.Thread(target=self._sample, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        if not self.exact:
            self.done.set()
            self.thread.join()
        self.bytes = (_resident("VmHWM") if self.exact else self.largest) - self.start

    def _sample(self) -> None:
        while not self.done.wait(0.001):
            self.largest = max(self.largest, _resident("VmRSS"))


def _reset_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}: expected Linux")
