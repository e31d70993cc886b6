"""What every long run stands on: nothing finished is lost or written twice, whenever the process is killed.

    OUT/run.json               the settings that decide what is made; a run with others may not go on here
    OUT/work/NAME.journal      documents, then a line per finished request of theirs
    OUT/work/lock              held by the process that runs here (locks.py)

A line counts once it is whole: killed while one was being written, that request is asked again. Files that others read
appear under their names only when they are complete. What lies in the folder beside these is the run's own (the generator's
in generate/store.py). Not covered: several processes in one folder, which the lock refuses. Memory: the results in the
journal.

Tests: tests/generate/test_run.py, tests/evaluate/test_run.py.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import Pair
from .disk import writing


@dataclass(frozen=True)
class Outcome:
    """What became of a document: a pair or None, counts of what was left out, lengths in tokens by kind."""

    pair: Pair | None
    counts: dict[str, int]
    lengths: dict[str, list[int]]


class Shard:
    """Documents that are committed together, and the results of their requests so far."""

    def __init__(self, journal: Path, number: int):
        self.number, self.path = number, journal
        self.members: dict[str, Outcome | None] = {}
        self._results: dict[tuple[str, str], Any] = {}
        lines, self._end = _whole_lines(journal)
        for line in lines:
            self._take(line)
        self._file = os.open(journal, os.O_RDWR | os.O_CREAT, 0o666)
        os.ftruncate(self._file, self._end)

    def add(self, document: str) -> None:
        """Make a document a member."""
        if document not in self.members:
            self._write({"document": document})

    def result(self, document: str, step: str) -> Any:
        """What a step of a document gave, or None."""
        return self._results.get((document, step))

    def record(self, document: str, step: str, value: Any) -> None:
        """Keep what a step gave. Raises OSError (a full disk) with the journal as it was before, and ValueError for a number
        that is not finite, which JSON has not."""
        self._write({"document": document, "step": step, "value": value})

    def close(self) -> None:
        os.close(self._file)

    def _take(self, line: dict) -> None:
        self.members.setdefault(line["document"], None)
        if "step" in line:
            self._results[line["document"], line["step"]] = line["value"]

    def _write(self, line: dict) -> None:
        data = memoryview(
            (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")
        )
        try:
            with writing(self.path):
                written = 0
                while written < len(data):
                    written += os.pwrite(self._file, data[written:], self._end + written)
        except OSError:
            os.ftruncate(self._file, self._end)
            raise
        self._end += len(data)
        self._take(line)


def write_atomically(path: Path, data: bytes) -> None:
    """The file appears under its name only when it is complete, whoever else writes it, on this machine or another."""
    partial = path.with_name(f".{path.name}.{os.urandom(4).hex()}.partial")  # containers have equal process ids
    try:
        with writing(path):
            partial.write_bytes(data)
            sync(partial)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_atomically` in UTF-8; what is no character becomes an escape, which JSON reads back."""
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def sync(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _whole_lines(path: Path) -> tuple[list[dict], int]:
    """The lines of a journal up to the first damaged one, and the bytes they take."""
    lines, end = [], 0
    if path.exists():
        with open(path, "rb") as file:
            for line in file:
                odd: list[str] = []  # NaN and infinities, which are no results: what gave them is asked again
                try:
                    value = json.loads(line, parse_constant=odd.append) if line.endswith(b"\n") else None
                except (ValueError, RecursionError):
                    value = None
                if odd and isinstance(value, dict):
                    value["value"] = None
                if not isinstance(value, dict) or not isinstance(value.get("document"), str):
                    break
                lines.append(value)
                end += len(line)
    return lines, end


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a folder, or raise ValueError where it holds something that others have made."""
    made = [file for file in (path.parent / "work").iterdir() if file.stat().st_size and file.name != "lock"]
    made += [file for file in path.parent.iterdir() if file.name not in (path.name, "work")]
    if not path.exists() or not made:
        write_atomically(path, (json.dumps(settings, indent=1, sort_keys=True) + "\n").encode())
        return
    changed = changes(json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(settings)))
    if changed:
        raise ValueError(f"{path.parent} was begun with other settings ({changed}); use those, or another folder")


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two settings, in words; empty where nothing does."""
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    return "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names)


def check_folder(out: Path) -> None:
    """Raises ValueError for a file, and for a folder that holds anything but a run."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; expected a folder, or a name that is free")
    if out.is_dir() and not (out / "run.json").exists() and not all(map(_is_of_a_start, out.iterdir())):
        raise ValueError(f"{out} is neither empty nor the folder of a run; use another")


def _is_of_a_start(path: Path) -> bool:
    """Whether a run that was killed before it had its run.json may have left it."""
    if path.name == "work" and path.is_dir():
        return all(file.name == "lock" or _is_of_a_start(file) for file in path.iterdir())
    return path.match(".*.????????.partial")
