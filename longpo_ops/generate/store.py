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

Tests: tests/generate/test_run.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data import write_pairs
from ..runs.disk import writing
from ..runs.journal import Outcome, Shard, check_settings, sync, write_atomically
from ..runs.locks import Lock


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
        self._lock = Lock(self.work / "lock")
        check_settings(self.out / "run.json", self.settings)
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
        self._lock.close()

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
            with writing(file):
                write_pairs(pairs, file)
                sync(file)  # before the receipt, which lets the journal go
