"""Foreign parsers in a process of their own: a broken file cannot end, stop or fill this one.

    read_texts --Apart.read: format, path or bytes--> `python -m longpo_ops.documents.apart` --text or reason--> read_texts

The process reads file after file. It has MEMORY bytes, and SECONDS of CPU time for each file; where it ends over one, by a
crash or a limit, that file is unreadable, and the next file gets a new process. It starts at the first file that needs it
(0.2 s) and ends with the `Apart` that owns it, or when this process is gone: its input is then at its end.

A question is a line of JSON and the bytes it announces, where the file came packed; an answer likewise. Not covered: parsers
that mean harm, which may do there what this user may do.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

from .unreadable import Unreadable

SECONDS = 300
MEMORY = 4 << 30  # of addresses; what is used is far less
MEMORY_ERROR = Unreadable("unreadable (it takes more than 4 GiB of memory)")


class Apart:
    """The process, started when it is needed."""

    def __init__(self):
        self.process: subprocess.Popen | None = None
        self.closed = None

    def read(self, kind: str, source: Path | bytes, limit: int) -> str:
        """The text of a file, or why there is none. kind: ".pdf", ".docx", ".epub". Raises ImportError where the parser is
        not installed."""
        process = self._running()
        path, data = (None, source) if isinstance(source, bytes) else (os.fsencode(source).hex(), b"")
        question = {"kind": kind, "path": path, "bytes": len(data), "limit": limit}
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n" + data)
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            text = process.stdout.read(answer["bytes"]).decode()
        except (OSError, ValueError):  # it is gone
            return self._ended()
        if answer["what"] == "missing":
            raise ImportError(text)
        if text == MEMORY_ERROR:  # what is left of it is not to be trusted
            self._ended()
        return text if answer["what"] == "text" else Unreadable(text)

    def _running(self) -> subprocess.Popen:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
            self.closed = weakref.finalize(self, _close, self.process)
        return self.process

    def _ended(self) -> Unreadable:
        code = self.process.wait()
        self.closed()
        self.process = None
        if code == -signal.SIGXCPU:
            return Unreadable(f"unreadable (it takes more than {SECONDS} s)")
        return Unreadable(f"unreadable (its reader ended with {signal.Signals(-code).name if code < 0 else code})")


def _close(process: subprocess.Popen) -> None:
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # it had not read all of it
            pipe.close()
    if process.poll() is None:
        process.kill()
    process.wait()


def read(kind: str, source: Path | bytes, limit: int) -> tuple[str, str]:
    """What the process answers: ("text", it), ("reason", why there is none) or ("missing", the package)."""
    try:
        if kind == ".pdf":
            from .layout import read_pdf

            text = read_pdf(source, limit)
        else:
            from .office import read_office

            text = read_office(source, kind)
    except ImportError as error:
        return "missing", str(error)
    except MemoryError:
        return "reason", MEMORY_ERROR
    except Exception as error:  # parsers of foreign files raise whatever they like
        return "reason", f"unreadable ({type(error).__name__})"
    return "reason" if isinstance(text, Unreadable) else "text", text


def serve() -> None:
    """Answer questions until there are none. What parsers print goes nowhere."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks decides
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    while line := questions.readline():
        question = json.loads(line)
        data = questions.read(question["bytes"])
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + SECONDS, hard))
        path = question["path"]
        what, text = read(
            question["kind"], data if path is None else Path(os.fsdecode(bytes.fromhex(path))), question["limit"]
        )
        encoded = text.encode("utf-8", "replace")
        answers.write(json.dumps({"what": what, "bytes": len(encoded)}).encode() + b"\n" + encoded)
        answers.flush()
        if text is MEMORY_ERROR:
            return


if __name__ == "__main__":
    serve()
