"""Files to documents, one in memory at a time.

    folders, globs, files --find_files--> files --read_documents--> Document

Where a document may be parted is chunks.py's matter; which documents a run takes is the generator's (generate/run.py).
Memory: the text, and 100 bytes per document seen, to know exact duplicates.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..text import one_line
from .apart import Apart
from .readers import read_texts
from .unreadable import TOO_LONG, Unreadable

BYTES_PER_TOKEN = 64  # more than natural text ever takes: longer documents are refused before they are tokenised
LARGEST = 1 << 25  # bytes of the longest text that is read to be cut, some eight million tokens of English


@dataclass(frozen=True)
class Document:
    """`id` is the digest of the text, so it does not change when files are moved, and equal texts share it."""

    id: str
    text: str
    source: str  # file below the given folder, on one line (text.one_line), and the record in it
    position: float = 0.0  # how much of all files lies before its end, 0 to 1
    folder: str = ""  # where its file lies
    size: int = 0  # bytes in UTF-8
    place: dict = field(default_factory=dict)  # of a part of a text, or of joined ones: where it is from


@dataclass
class Listing:
    """What was found while documents were read: kept, and left out by reason, with the source of the first one each."""

    found: int = 0
    selected: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    size: int = 0  # bytes of all texts, each once, and of what is too long to be read
    lost: int = 0  # bytes of them that no document has for want of length
    cut: int = 0  # texts that were cut, into
    parts: int = 0
    joined: int = 0  # texts that were joined, to
    joins: int = 0
    seen: set[bytes] = field(default_factory=set, repr=False)

    def skip(self, reason: str, source: str) -> None:
        """Count what is left out."""
        self.skipped[str(reason)] += 1
        self.first.setdefault(str(reason), source)

    def lose(self, reason: str, source: str, size: int) -> None:
        """Count what is left out for want of length, and its bytes."""
        self.skip(reason, source)
        self.lost += size

    def take(self, text: str, source: str, position: float, folder: str, place: dict | None = None) -> Document | None:
        """A text as a document, or None, counted, where there was an equal one."""
        data = text.encode()
        digest = hashlib.sha256(data).digest()[:16]
        if digest in self.seen:
            self.skip("duplicate", source)
            return None
        self.seen.add(digest)
        return Document(digest.hex(), text, source, position, folder, len(data), place or {})

    def made(self) -> list[tuple[str, str]]:
        """What came of texts that were out of bounds, and how much of all was lost."""
        told = [("documents cut", f"{self.cut:,} into {self.parts:,}")] if self.cut else []
        told += [("documents joined", f"{self.joined:,} to {self.joins:,}")] if self.joined else []
        share = f"{self.lost / self.size:.1%} of {self.size / 1e6:,.1f} MB" if self.size else "nothing"
        return [*told, ("text lost for want of length", share)]

    def left_out(self) -> list[tuple[str, int]]:
        """Why, and how many, the most frequent first."""
        return [(reason_and_first(reason, self.first), count) for reason, count in self.skipped.most_common()]

    def __str__(self) -> str:
        selected = "{} documents selected of {} found" if self.cut or self.joins else "{} of {} documents selected"
        lines = [selected.format(self.selected, self.found)]
        lines += [f"  {count} left out: {reason}" for reason, count in self.left_out()]
        return "\n".join(lines + [f"  {what}: {how}" for what, how in self.made()])


def size_of(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def reason_and_first(reason: str, first: dict[str, str]) -> str:
    """Why documents were left out, and which one was the first."""
    return f"{reason} (first: {first[reason]})" if reason in first else reason


def find_files(sources: Iterable[str | Path]) -> list[tuple[Path, str]]:
    """(file, name) of every file below folders, globs and files, sorted, each once; hidden ones are left out.

    The name is the path below its source, on one line. A folder that cannot be looked into is among them: reading it fails,
    and it is counted as files are. Raises ValueError for a source without files.
    """
    found: dict[Path, str] = {}
    for source in sources:
        path = Path(source)
        roots = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(source), recursive=True))]
        before = len(found)
        for root in roots:
            for file in [root] if root.is_file() else sorted(_files_below(root)):
                name = Path(file.name) if root.is_file() else file.relative_to(root)
                if not any(part.startswith(".") for part in name.parts):
                    found.setdefault(file.resolve(), one_line(name.as_posix()))
        if len(found) == before and not any(root.is_file() for root in roots):
            raise ValueError(
                f"no documents at {source}; expected a file, a folder with files, or a glob that matches some"
            )
    return list(found.items())


def _files_below(root: Path) -> list[Path]:
    """The files below a folder, and the folders there that cannot be looked into."""
    closed: list[Path] = []
    walk = os.walk(root, onerror=lambda error: closed.append(Path(error.filename)))
    files = [Path(folder, name) for folder, _, names in walk for name in names]
    return closed + [file for file in files if _is_file(file)]


def _is_file(path: Path) -> bool:
    """Neither a pipe nor a broken link; a path that is too long to be looked at is told where it is read."""
    try:
        return path.is_file()
    except OSError:
        return True


def read_documents(
    files: list[tuple[Path, str]], listing: Listing, column: str = "text", max_tokens: int | None = None
) -> Iterator[Document]:
    """Stream the documents of files, in their order, without exact duplicates; `listing` counts what cannot be read.

    column: of JSON Lines and Parquet. max_tokens: bounds how much of a file is read at all.
    """
    limit = None if max_tokens is None else max_tokens * BYTES_PER_TOKEN
    sizes = [_size(file) for file, _ in files]
    total, before, apart = max(1, sum(sizes)), 0, Apart()
    for (file, name), size in zip(files, sizes):
        last, folder = 0.0, str(file.parent)
        for number, text, share in read_texts(file, column, limit, apart):
            listing.found += 1
            source = name if number is None else f"{name}:{number}"
            if text is TOO_LONG:
                there = int((share - last) * size)
                listing.size += there
                listing.lose(text, source, there)
            elif isinstance(text, Unreadable):
                listing.skip(text, source)
            elif (document := listing.take(text, source, (before + share * size) / total, folder)) is not None:
                listing.size += document.size
                yield document
            last = share
        before += size


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
