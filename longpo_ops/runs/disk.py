"""Files that cannot be written: the system's reason, whatever a library made of it, and what to do about it.

    OSError(ENOSPC)                                        Python, pyarrow: often without the file's name
    SafetensorError("... (os error 28)")                   safetensors
    RuntimeError("... unexpected pos 576 vs 534")          torch.save, which tells no reason
    OSError("Not enough disk space. ...")                  datasets, without a number

`writing` makes all of them an OSError with the system's number and a path, `told` makes that a line for people.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ADVICE = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there, or have the quota raised",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or move the folder to a file system that takes such files",
    errno.EROFS: "have it mounted for writing, or use another folder",
    errno.EACCES: "get the right to write there, or use another folder",
    errno.EPERM: "get the right to write there, or use another folder",
    errno.EIO: "see the system's log for what the disk met",
}
NUMBERED = re.compile(r"\(os error (\d+)\)")
UNTOLD = re.compile(r"PytorchStreamWriter|inline_container.*unexpected pos|iostream error|Not enough disk space")
MORE = 2**16  # bytes


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """A file or folder that the block writes. Errors of the disk leave it as OSError with the system's number and a path: the
    one they name, else the place. Other errors stay what they are."""
    try:
        yield
    except Exception as error:
        if (found := _reason(error, place)) is None:
            raise
        raise found from error


def told(error: OSError) -> str:
    """The error in a line: for one of the disk the path, the reason in words, and what to do; for another one its own words."""
    if error.errno not in ADVICE:
        return str(error)
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{error.strerror}; {ADVICE[error.errno]}, then run the same command again"


def _reason(error: Exception, place: Path) -> OSError | None:
    """What the disk said, where it is behind an error that does not say so with number and path itself."""
    words, cause = str(error), error.__cause__
    if isinstance(error, OSError) and error.errno is not None:
        unnamed = error.errno in ADVICE and error.filename is None
        return OSError(error.errno, error.strerror, str(place)) if unnamed else None
    if isinstance(error, ValueError):  # somebody's own words
        return None
    if isinstance(cause, OSError) and cause.errno in ADVICE:
        return _reason(cause, place) or cause
    if UNTOLD.search(words):
        number = _ask_again(place)
    else:
        number = int(found[1]) if (found := NUMBERED.search(words)) else 0
    return OSError(number, os.strerror(number), str(place)) if number in ADVICE else None


def _ask_again(place: Path) -> int:
    """The system, for a little more room than the last file below a folder has, which is the one that could not be written."""
    sizes = {path.stat().st_mtime_ns: path.stat().st_size for path in place.rglob("*") if path.is_file()}
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            os.posix_fallocate(file.fileno(), 0, MORE + (sizes[max(sizes)] if sizes else 0))
    except OSError as error:
        if error.errno in ADVICE:
            return error.errno
    return errno.EIO
