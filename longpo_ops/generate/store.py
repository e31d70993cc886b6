"""Where a run keeps what it has: nothing generated is lost or written twice, whenever it is killed.

    OUT/run.json               the settings that decide what is generated; another run may not go on here
    OUT/pairs-00007.jsonl      the pairs of one shard of documents, in the order of the documents
    OUT/work/00007.journal     an unfinished shard: its documents, then a line per finished request
    OUT/work/00007.json        its receipt, once pairs-00007.jsonl is there: documents, counts, lengths
    OUT/work/lock              held by the process that runs here

A shard is `size` documents that follow each other in the listing. A finished shard is written in three steps, each
atomic: pairs, receipt, removal of the journal. Killed before the receipt, the shard is made again from its journal,
to the same bytes, without asking the engine; killed while a line was being written, that request is asked again.
Memory: ids of finished documents, journals of unfinished shards.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data import Pair, write_pairs


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
        self._file = os.open(journal, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self._file, self._end)

    def add(self, document: str) -> None:
        """Make a document a member."""
        if document not in self.members:
            self._write({"document": document})

    def result(self, document: str, step: str) -> Any:
        """What a step of a document gave, or None."""
        return self._results.get((document, step))

    def record(self, document: str, step: str, value: Any) -> None:
        """Keep what a step gave. Raises OSError (a full disk) with the journal as it was before."""
        self._write({"document": document, "step": step, "value": value})

    def close(self) -> None:
        os.close(self._file)

    def _take(self, line: dict) -> None:
        self.members.setdefault(line["document"], None)
        if "step" in line:
            self._results[line["document"], line["step"]] = line["value"]

    def _write(self, line: dict) -> None:
        data = memoryview((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._file, data[written:], self._end + written)
        except OSError as error:
            os.ftruncate(self._file, self._end)
            what = f"{error.strerror}; what was generated is kept, mend it and run the same command again"
            raise OSError(error.errno, what, str(self.path)) from None
        self._end += len(data)
        self._take(line)


@dataclass
class Store:
    """A run's folder. Raises ValueError where another process is at work or the folder belongs to other settings."""

    out: Path
    settings: dict[str, Any]
    size: int = 16
    receipts: dict[int, dict] = field(default_factory=dict)
    open_shards: dict[int, Shard] = field(default_factory=dict)

    def __post_init__(self):
        self.work = self.out / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        self._lock = locked(self.work / "lock")
        check_settings(self.out / "run.json", self.settings)
        for partial in (*self.out.glob(".*.partial"), *self.work.glob(".*.partial")):
            partial.unlink(missing_ok=True)
        for file in sorted(self.work.glob("*.json")):
            self.receipts[int(file.stem)] = json.loads(file.read_text(encoding="utf-8"))
        for file in sorted(self.work.glob("*.journal")):
            if int(file.stem) in self.receipts:
                file.unlink()
            else:
                self.open_shards[int(file.stem)] = Shard(file, int(file.stem))
        self._home = {document: shard for shard in self.open_shards.values() for document in shard.members}
        self._done = {document for receipt in self.receipts.values() for document in receipt["documents"]}

    def done(self, document: str) -> bool:
        """Whether the document is in a finished shard."""
        return document in self._done

    def shard_of(self, document: str) -> Shard:
        """The shard of a document; a new one joins the last shard, or opens one where that is full or finished."""
        if document not in self._home:
            last = max([*self.receipts, *self.open_shards], default=-1)
            shard = self.open_shards.get(last)
            if shard is None or len(shard.members) >= self.size:
                shard = self.open_shards[last + 1] = Shard(self.work / f"{last + 1:05d}.journal", last + 1)
            shard.add(document)
            self._home[document] = shard
        return self._home[document]

    def finish(self, document: str, outcome: Outcome) -> None:
        """Take a document's outcome; the last one of a full shard commits it."""
        shard = self._home[document]
        shard.members[document] = outcome
        if len(shard.members) >= self.size and None not in shard.members.values():
            self._commit(shard)

    def finish_all(self) -> int:
        """Commit what is left when no document will follow; returns how many documents were never finished.

        A shard with such documents (their file is gone, say) gets its pairs but no receipt: it stays open.
        """
        missing = 0
        for shard in list(self.open_shards.values()):
            lacking = sum(outcome is None for outcome in shard.members.values())
            missing += lacking
            if lacking:
                self._write_pairs(shard)
            else:
                self._commit(shard)
        return missing

    def outcomes(self) -> Iterator[dict]:
        """Counts and lengths of every document in a finished shard."""
        for _, receipt in sorted(self.receipts.items()):
            yield from receipt["documents"].values()

    def close(self) -> None:
        for shard in self.open_shards.values():
            shard.close()
        os.close(self._lock)

    def _commit(self, shard: Shard) -> None:
        self._write_pairs(shard)
        documents = {
            document: {"pairs": int(outcome.pair is not None), "counts": outcome.counts, "lengths": outcome.lengths}
            for document, outcome in shard.members.items()
        }
        receipt = {"documents": documents}
        write_atomically(self.work / f"{shard.number:05d}.json", json.dumps(receipt).encode())
        shard.close()
        shard.path.unlink()
        del self.open_shards[shard.number]
        self.receipts[shard.number] = receipt
        for document in documents:
            del self._home[document]
            self._done.add(document)

    def _write_pairs(self, shard: Shard) -> None:
        pairs = [outcome.pair for outcome in shard.members.values() if outcome is not None and outcome.pair is not None]
        if pairs:
            file = self.out / f"pairs-{shard.number:05d}.jsonl"
            write_pairs(pairs, file)
            _sync(file)  # before the receipt, which lets the journal go


def write_atomically(path: Path, data: bytes) -> None:
    """The file appears under its name only when it is complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        _sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
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
                try:
                    value = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    value = None
                if not isinstance(value, dict) or "document" not in value:
                    break
                lines.append(value)
                end += len(line)
    return lines, end


def locked(path: Path) -> int:
    """A lock that ends with the process, however that ends."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"another run is at work in {path.parents[1]}; wait for it, or use another folder") from None
    return lock


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a folder, or raise ValueError where it holds something that others have made."""
    made = [file for file in (path.parent / "work").iterdir() if file.stat().st_size]
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
    if out.is_dir() and any(out.iterdir()) and not (out / "run.json").exists():
        raise ValueError(f"{out} is neither empty nor the folder of a run; use another")
