"""Files that cannot be written: the system's reason, whatever a library made of it, and what to do about it.

    OSError(ENOSPC)                                        Python, pyarrow: often without the file's name
    SafetensorError("... (os error 28)")                   safetensors
    RuntimeError("... unexpected pos 576 vs 534")          torch.save, which tells no reason
    OSError("Not enough disk space. ...")                  datasets, without a number

`writing` makes all of them an OSError with the system's number and, where it is sure, a path; `told` makes that a line for
people.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ADVICE = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there, or have the quota raised",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or move the folder to a file system that takes such files",
    errno.EROFS: "have it mounted for writing, or use another folder",
    errno.EACCES: "get the right to read or write it, or use another one",
    errno.EPERM: "get the right to read or write it, or use another one",
    errno.EIO: "see the system's log for what the disk met",
}
NUMBERED = re.compile(r"\(os error (\d+)\)")
UNTOLD = re.compile(r"PytorchStreamWriter|inline_container.*unexpected pos|iostream error")
FULL = "Not enough disk space"  # of datasets, before it writes
MORE = 2**16  # bytes


@contextmanager
def writing(place: Path, *, elsewhere: bool = False) -> Iterator[None]:
    """A file or folder that the block writes. Errors of the disk leave it as OSError with the system's number and a path: the
    one they name, else the place. elsewhere: the block, or a library in it, writes in other places too (caches of the home
    folder), so the place is named only where the system says the same there again. Other errors stay what they are, and so
    does one without a reason where the place takes more bytes."""
    try:
        yield
    except Exception as error:
        if (found := _reason(error, place, elsewhere)) is None:
            raise
        raise found from error


def told(error: OSError) -> str:
    """The error in a line: for one of the disk the path, the reason in words, and what to do; for another one its own words."""
    if error.errno not in ADVICE:
        return str(error)
    where = "a file that the system does not name" if error.filename is None else error.filename
    return f"{where}: {error.strerror}; {ADVICE[error.errno]}, then run the same command again"


def _reason(error: Exception, place: Path, elsewhere: bool) -> OSError | None:
    """What the disk said, where it is behind an error that does not say so with number and path itself."""
    if isinstance(error, ValueError):  # somebody's own words
        return None
    said, cause = error, error.__cause__
    if getattr(error, "errno", None) is None and isinstance(cause, OSError) and cause.errno in ADVICE:
        said = cause
    number, words = _number_and_words(said, place)
    where = getattr(said, "filename", None)
    if number not in ADVICE or (said is error and where is not None):
        return None
    if where is None and not (elsewhere and _ask_again(place) != number):
        where = str(place)
    return OSError(number, words, where)


def _number_and_words(error: Exception, place: Path) -> tuple[int, str]:
    """The system's, or 0 for an error that is none of the disk, or whose reason nobody knows."""
    words = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno, error.strerror
    if FULL in words:
        return errno.ENOSPC, words.rstrip(".")
    if UNTOLD.search(words):
        number = _ask_again(place)
    else:
        number = int(found[1]) if (found := NUMBERED.search(words)) else 0
    return number, os.strerror(number)


def _ask_again(place: Path) -> int:
    """The system's number for a little more room than the last file there has, which is the one that could not be written; 0
    where it gives that room."""
    try:
        with tempfile.TemporaryFile(dir=place if place.is_dir() else place.parent) as file:
            os.posix_fallocate(file.fileno(), 0, MORE + _last_size(place))
    except OSError as error:
        return error.errno if error.errno in ADVICE else 0
    return 0


def _last_size(place: Path) -> int:
    """Bytes of the file, or of the last one below the folder, which other processes may be emptying."""
    last = (0, 0)
    for file in [place, *(Path(at, name) for at, _, names in os.walk(place) for name in names)]:
        with suppress(OSError):
            if file.is_file():
                last = max(last, ((found := file.stat()).st_mtime_ns, found.st_size))
    return last[1]
