"""Processes of their own for tests, forked from one that has imported what takes seconds: to be killed, stopped and read.

A run of `longpo train` on a tiny model spends ten seconds on imports and one on the run. Here a server imports once for all
tests of a pytest process and forks a child per run, which is in every other way a process like any other. Not for what
is about imports, installed packages or a process's memory: such tests start an interpreter.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

CLI = "from longpo_ops.cli import main\nmain()"
PRELOADED = (
    "longpo_ops.cli",
    "longpo_ops.train.run",
    "longpo_ops.evolve.run",
    "longpo_ops.evaluate.run",
    "longpo_ops.ops.preference",  # this and those below are imported by a run that needs them: half the time of a training
    "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
)
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(list(PRELOADED))


SMALL_FILES = """# What a run begins with on whose disk no file grows beyond {0} bytes
import resource, sys
sys.dont_write_bytecode = True  # Python would take half a module, left by one run, for a whole one in the next
resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))
"""


@contextmanager
def small_files(nbytes: int) -> Iterator[None]:
    """No file grows beyond: the system refuses (EFBIG), in the middle of it, as it does on a full disk."""
    before, writes = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        sys.dont_write_bytecode = writes


class Started:
    """A run under way, with the methods of subprocess.Popen that tests need."""

    def __init__(self, code: str, *arguments: object, environment: dict[str, str] | None = None):
        self.arguments, self._folder = [str(argument) for argument in arguments], tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        self._process = SERVER.Process(target=_perform, args=(code, self.arguments, environment or {}, self._files))
        with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):  # the server's, if this is the first run
            self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def first_line(self, timeout: float = 300.0) -> str:
        """What it wrote first on standard output, once it has."""
        end = time.monotonic() + timeout
        while "\n" not in self._written()[0]:
            assert self.poll() is None and time.monotonic() < end, self._written()
            time.sleep(0.01)
        return self._written()[0].splitlines()[0]

    def communicate(self, timeout: float = 300.0) -> tuple[str, str]:
        """Wait for the end -> what it wrote on standard output and standard error."""
        self._process.join(timeout)
        if self.poll() is None:
            self.kill()
            self._process.join()
            raise subprocess.TimeoutExpired(self.arguments, timeout, *self._written())
        return self._written()

    def _written(self) -> tuple[str, str]:
        return tuple(file.read_text() if file.exists() else "" for file in self._files)


def run(code: str, *arguments: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """The code, run to its end with sys.argv[1:] of these arguments."""
    started = Started(code, *arguments, environment=environment)
    stdout, stderr = started.communicate()
    return subprocess.CompletedProcess(started.arguments, started.returncode, stdout, stderr)


def longpo(*arguments: object) -> subprocess.CompletedProcess:
    """`longpo` with these arguments, run to its end."""
    return run(CLI, *arguments)


def killed_once(file: Path, text: str = "", times: int = 0) -> str:
    """Code to put before a run's: SIGKILL, at whatever moment the file is there with the text in it so often.

    A thread of the run itself looks, so that a busy machine cannot let the run end before it is killed.
    """
    return f"""
import os, signal, threading, time
def look():
    while True:
        time.sleep(0.002)
        if os.path.exists({str(file)!r}) and open({str(file)!r}, "rb").read().count({text.encode()!r}) >= {times}:
            os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=look, daemon=True).start()
"""


def killed_in(owner: str, name: str, text: str = "", after: bool = False) -> str:
    """Code to put before a run's: SIGKILL where the function `name` of a module ("module:Class" for a method) is first called
    with a path that has the text in it, or just after that call."""
    return f"""
import os, pkgutil, signal
owner = pkgutil.resolve_name({owner!r})
def replaced(*args, real=getattr(owner, {name!r}), **kwargs):
    met = any({text!r} in str(a) for a in args if isinstance(a, (str, os.PathLike))) or not {text!r}
    if met and not {after}:
        os.kill(os.getpid(), signal.SIGKILL)
    result = real(*args, **kwargs)
    if met:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, {name!r}, replaced)
"""


def _perform(code: str, arguments: list[str], environment: dict[str, str], files: list[Path]) -> None:
    """In the child: what the interpreter would do with -c."""
    gc.freeze()  # what was imported is no garbage
    for number, file in enumerate(files, 1):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.update(environment)
    sys.argv = ["longpo", *arguments]
    exec(compile(code, "<test>", "exec"), {"__name__": "__main__"})
