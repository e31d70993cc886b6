"""One run at a time in a folder: a second one ends at once, and says which process is at work there.

    OUT/work/lock     held (flock) by the run as long as its process lives; in it "process 4711 on HOST", while it does

The system takes the lock away when the process ends, however that ends: a killed run leaves none behind, and no process that
was forked from it holds it on. What a killed run was writing lies there as .NAME.partial (journal.py) and is removed by the
next run, once it has the lock. A network file system without flock is worked in unlocked, with a warning.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
from contextlib import suppress
from pathlib import Path

log = logging.getLogger("longpo_ops.runs")

UNKNOWN = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # of file systems without such locks


class Lock:
    """Of the folder that the file's own lies in, from here on until close(). Raises ValueError, naming the folder and the
    process that holds it, where another run is at work; OSError where the file cannot be written."""

    def __init__(self, path: Path):
        folder = path.parents[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # the umask says whether a group shares it
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self.file, 200, 0).decode(errors="replace").strip() or "a process that has not said which"
            os.close(self.file)
            host = holder.partition(" on ")[2]
            gone = f"; if {host} is gone for good, remove {path}" if host not in ("", platform.node()) else ""
            raise ValueError(
                f"another run is at work in {folder} ({holder}, or what it started); wait for it, or use another "
                f"folder{gone}"
            ) from None
        except OSError as error:
            if error.errno not in UNKNOWN:
                os.close(self.file)
                raise
            told = "%s: its file system has no locks (flock: %s), so see to it that no other run is at work there"
            log.warning(told, folder, error.strerror)
        with suppress(OSError):  # a full disk: the run itself will say so
            os.ftruncate(self.file, 0)
            os.pwrite(self.file, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        _held.add(self)
        clear_partials(folder, path.parent)

    def close(self) -> None:
        """Lets others in. In a process that was forked since the lock was taken, nothing happens."""
        _held.discard(self)
        if self.file is not None:
            with suppress(OSError):
                os.ftruncate(self.file, 0)
            os.close(self.file)
            self.file = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def holder(path: Path) -> str | None:
    """Who holds the lock of a file now, as it is written there; None where nobody does. Takes it for an instant where it is
    free. Where the file system has no locks, whoever is written there is taken to be at work."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        told = os.pread(file, 200, 0).decode(errors="replace").strip()
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return told or "a process that has not said which"
    except OSError:
        return told or None
    finally:
        os.close(file)
    return None


def clear_partials(*folders: Path) -> None:
    """Removes what a killed run was writing in folders that this process alone writes."""
    for folder in folders:
        for partial in folder.glob(".*.????????.partial"):
            partial.unlink(missing_ok=True)


_held: set[Lock] = set()


def _leave_to_the_parent() -> None:
    """A loader of data that outlives a killed run by seconds must not keep the next one out."""
    for lock in _held:
        os.close(lock.file)
        lock.file = None
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_the_parent)
