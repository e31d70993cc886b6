"""Files to documents, one in memory at a time.

    folders, globs, files --find_files--> files --read_documents--> Document

Where a document may be parted is chunks.py's matter; which documents a run takes is the generator's (generate/run.py).
Memory: the text, and 100 bytes per document seen, to know exact duplicates.
"""

from __future__ import annotations

import glob
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .readers import Unreadable, read_texts

BYTES_PER_TOKEN = 64  # more than natural text ever takes: longer documents are refused before they are tokenised


@dataclass(frozen=True)
class Document:
    """`id` is the digest of the text, so it does not change when files are moved, and equal texts share it."""

    id: str
    text: str
    source: str  # file below the given folder, and the record in it
    position: float = 0.0  # how much of all files lies before its end, 0 to 1


@dataclass
class Listing:
    """What was found while documents were read: kept, and left out by reason."""

    found: int = 0
    selected: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"{self.selected} of {self.found} documents selected"]
        return "\n".join(lines + [f"  {count} left out: {reason}" for reason, count in self.skipped.most_common()])


def find_files(sources: Iterable[str | Path]) -> list[tuple[Path, str]]:
    """(file, name) of every file below folders, globs and files, sorted, each once; hidden ones are left out.

    The name is the path below its source. Raises ValueError for a source without files.
    """
    found: dict[Path, str] = {}
    for source in sources:
        path = Path(source)
        roots = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(source), recursive=True))]
        before = len(found)
        for root in roots:
            files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
            for file in files:
                name = file.name if root.is_file() else file.relative_to(root).as_posix()
                if not any(part.startswith(".") for part in Path(name).parts):
                    found.setdefault(file.resolve(), name)
        if len(found) == before and not any(root.is_file() for root in roots):
            raise ValueError(
                f"no documents at {source}; expected a file, a folder with files, or a glob that matches some"
            )
    return list(found.items())


def read_documents(
    files: list[tuple[Path, str]], listing: Listing, column: str = "text", max_tokens: int | None = None
) -> Iterator[Document]:
    """Stream the documents of files, in their order, without exact duplicates; `listing` counts what cannot be read.

    column: of JSON Lines and Parquet. max_tokens: bounds how much of a file is read at all.
    """
    limit = None if max_tokens is None else max_tokens * BYTES_PER_TOKEN
    sizes = [_size(file) for file, _ in files]
    total, before, seen = max(1, sum(sizes)), 0, set()
    for (file, name), size in zip(files, sizes):
        for number, text, share in read_texts(file, column, limit):
            listing.found += 1
            if isinstance(text, Unreadable):
                listing.skipped[str(text)] += 1
                continue
            digest = hashlib.sha256(text.encode()).digest()[:16]
            if digest in seen:
                listing.skipped["duplicate"] += 1
                continue
            seen.add(digest)
            position = (before + share * size) / total
            yield Document(digest.hex(), text, name if number is None else f"{name}:{number}", position)
        before += size


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
