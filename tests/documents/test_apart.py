"""The process of the foreign parsers: its end is one file's, not the run's."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from longpo_ops.documents import apart
from longpo_ops.documents.apart import MEMORY_ERROR, Apart
from longpo_ops.documents.unreadable import NO_LIMIT, Unreadable
from tests.documents.writing import pdf

GOOD = pdf("The wind turns.")


def running(monkeypatch, tmp_path, body: str) -> Apart:
    """An `Apart` whose process runs `body` in the place of the parser where the file says "bad"."""
    script = tmp_path / "sitecustomize.py"
    script.write_text(
        "import longpo_ops.documents.layout as layout\n"
        "import os, resource, signal\n"
        "read = layout.read_pdf\n"
        "def bad():\n    " + body.replace("\n", "\n    ") + "\n"
        "layout.read_pdf = lambda source, limit: bad() if source == b'bad' else read(source, limit)\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return Apart()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "unreadable (its reader ended with SIGSEGV)"),
        ("os._exit(7)", "unreadable (its reader ended with 7)"),
        (
            "if resource.getrlimit(resource.RLIMIT_CPU)[0] < 310: os.kill(os.getpid(), signal.SIGXCPU)",
            "unreadable (it takes more than 300 s)",
        ),
        ("return 'x' * apart_memory", MEMORY_ERROR),
        ("raise RecursionError", "unreadable (RecursionError)"),
        ("print('noise')\nreturn 'text'", "text"),
    ],
)
def test_what_ends_the_process_ends_one_file_alone(body, reason, monkeypatch, tmp_path):
    body = body.replace("apart_memory", str(apart.MEMORY))
    process = running(monkeypatch, tmp_path, body)
    assert process.read(".pdf", b"bad", NO_LIMIT) == reason
    assert process.read(".pdf", GOOD, NO_LIMIT) == "The wind turns."


def test_one_process_reads_file_after_file_and_ends_with_its_owner(tmp_path):
    path = tmp_path / "wind \udcff.pdf"  # a name that is no UTF-8
    path.write_bytes(GOOD)
    owner = Apart()
    assert owner.process is None
    assert [owner.read(".pdf", source, NO_LIMIT) for source in (path, GOOD)] == ["The wind turns."] * 2
    assert isinstance(owner.read(".pdf", b"", NO_LIMIT), Unreadable)
    number = owner.process.pid
    owner.process.send_signal(signal.SIGINT)  # Ctrl-C reaches both: this process decides
    assert owner.read(".pdf", GOOD, NO_LIMIT) == "The wind turns." and owner.process.pid == number
    del owner
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)
