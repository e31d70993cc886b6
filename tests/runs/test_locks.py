"""One run in a folder at a time: the second one is told who is there, a killed one keeps nobody out."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import platform
import signal

import pytest

from longpo_ops.runs.locks import Lock

from ..processes import Started

HOLDS = """
import os, sys, time
from pathlib import Path
from longpo_ops.runs.locks import Lock
lock = Lock(Path(sys.argv[1]))
if {forks}:
    child = os.fork()
    if child == 0:
        time.sleep(600)
    print(child, flush=True)
print("held", flush=True)
time.sleep(600)
"""


def test_the_second_run_is_told_the_folder_and_the_process_and_a_killed_one_keeps_nobody_out(tmp_path):
    path = tmp_path / "out/work/lock"
    first = Started(HOLDS.format(forks=False), path)
    try:
        assert first.first_line() == "held"
        told = rf"another run is at work in {tmp_path}/out \(process {first.pid} on {platform.node()}, or what it started\)"
        with pytest.raises(ValueError, match=told):
            Lock(path)
    finally:
        first.kill()
        first.communicate()
    with Lock(path):
        assert path.read_text() == f"process {os.getpid()} on {platform.node()}\n"
        with pytest.raises(ValueError, match=f"process {os.getpid()} "):
            Lock(path)
    assert path.read_bytes() == b""
    Lock(path).close()


def test_a_group_may_share_a_folder(tmp_path):
    before = os.umask(0o002)
    try:
        Lock(tmp_path / "work/lock").close()
    finally:
        os.umask(before)
    assert (tmp_path / "work/lock").stat().st_mode & 0o777 == 0o664


def test_what_to_do_with_the_lock_of_another_host_is_told(tmp_path):
    """A network file system may keep the lock of a host that is gone."""
    path = tmp_path / "work/lock"
    with Lock(path):
        path.write_text("process 4711 on node-of-old\n")
        with pytest.raises(ValueError, match=f"another folder; if node-of-old is gone for good, remove {path}$"):
            Lock(path)
        path.write_text(f"process 4711 on {platform.node()}\n")
        with pytest.raises(ValueError, match=r"or use another folder$"):
            Lock(path)


def test_a_process_that_was_forked_from_a_killed_one_keeps_nobody_out(tmp_path):
    process = Started(HOLDS.format(forks=True), tmp_path / "work/lock")
    child = int(process.first_line())
    try:
        process.kill()
        process.communicate()
        Lock(tmp_path / "work/lock").close()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_forked_process_does_not_let_others_in(tmp_path):
    with Lock(tmp_path / "work/lock") as lock:
        child = multiprocessing.get_context("fork").Process(target=lock.close)
        child.start()
        child.join()
        with pytest.raises(ValueError, match="another run is at work"):
            Lock(tmp_path / "work/lock")


def test_what_a_killed_run_was_writing_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "work").mkdir()
    left = [tmp_path / ".run.json.0a1b2c3d.partial", tmp_path / "work/.00001.json.0a1b2c3d.partial"]
    others = [tmp_path / "notes.partial", tmp_path / "below/.run.json.0a1b2c3d.partial", tmp_path / ".hidden"]
    others[1].parent.mkdir()
    for file in (*left, *others):
        file.write_text("half")
    with Lock(tmp_path / "work/lock"):
        assert not any(file.exists() for file in left) and all(file.exists() for file in others)


def test_a_file_system_without_locks_is_worked_in_with_a_warning(tmp_path, monkeypatch, caplog):
    """None is at hand here: flock answers as it does on one."""

    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with Lock(tmp_path / "work/lock"):
        assert f"{tmp_path}: its file system has no locks (flock: Function not implemented)" in caplog.text
