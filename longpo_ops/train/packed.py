"""Tokenised pairs as the packs a trainer draws: the sequences of a pair a method reads, packed within a token budget.

Tests: tests/train/test_trainer.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from ..data import PairBatch, TokenizedPair, pack, pack_within, packed_length, write_tokenized
from ..data.triples import pack_triples, with_short
from ..runs.journal import write_atomically
from .methods import Method

DIGESTS = ".digests.json"


@dataclass(frozen=True, slots=True)
class Pack:
    """A pack on its way through a DataLoader. Without a `to` it stays on the host, where its rows are planned."""

    batch: PairBatch
    pairs: tuple[TokenizedPair, ...]
    index: int  # in its PackedPairs


class PairStore(Sequence[TokenizedPair]):
    """Tokenised pairs on disk, memory-mapped: any number of them, read one at a time; and beside them their digests."""

    def __init__(self, path: str | os.PathLike):
        from datasets import Dataset as Table

        self.path = path = Path(path)
        self._table = Table.from_parquet(str(path), cache_dir=str(path.parent / "mapped")).with_format("arrow")

    @classmethod
    def write(
        cls, pairs: Iterable[TokenizedPair], path: str | os.PathLike, fingerprint: str | None = None
    ) -> PairStore:
        """Writes pairs to a Parquet file, atomically, and opens it."""
        path, records = Path(path), []

        def noted() -> Iterator[TokenizedPair]:
            for pair in pairs:
                records.append([pair.id, pair.digest])
                yield pair

        path.parent.mkdir(parents=True, exist_ok=True)
        write_tokenized(noted(), path, fingerprint)
        write_atomically(path.with_suffix(DIGESTS), json.dumps(records).encode())
        return cls(path)

    @property
    def records(self) -> list[list[str]]:
        """[id, digest of the content] of every pair, in order."""
        return read_digests(self.path)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> TokenizedPair:
        record = self._table[range(len(self))[index]]
        return TokenizedPair.from_record({n: _value(record[n][0]) for n in record.column_names}, allow_equal=True)


def read_digests(path: Path) -> list[list[str]]:
    """The records of the store at `path`. Raises OSError where there is none."""
    return json.loads(path.with_suffix(DIGESTS).read_bytes())


def _value(scalar):
    """An Arrow value as Python's; lists of integers as arrays, which tokens by the hundred thousand need."""
    if not scalar.is_valid or not hasattr(scalar, "values"):
        return scalar.as_py()
    if hasattr(scalar.values.type, "value_type"):
        return [_value(each) for each in scalar.values]
    return scalar.values.to_numpy() if str(scalar.values.type).startswith("int") else scalar.as_py()


def select(pair: TokenizedPair, method: Method) -> TokenizedPair:
    """What a pack of this method holds of a pair. Raises ValueError naming the record where a part is missing."""
    if method.sequence == "triples":
        with_short(pair)
        selected, rejected = replace(pair, rejected=()), pair.ref_rejected
    elif method.sequence == "pair":
        selected, rejected = pair, pair.rejected
        if not rejected:
            raise ValueError(f"record {pair.id!r}: no rejected answer; objective {method.name!r} compares two")
    else:
        sequence = pair.chosen if method.sequence == "chosen" else pair.rejected[0]
        selected, rejected = replace(pair, chosen=sequence, rejected=()), ()
    if method.one_rejected and len(rejected) != 1:
        raise ValueError(f"record {pair.id!r}: {len(rejected)} rejected answers; {method.name} takes one")
    if method.constraint and pair.ref_chosen:
        short = np.concatenate([sequence.answer_ids for sequence in pair.ref_chosen])
        if not np.array_equal(short, pair.chosen.answer_ids):
            raise ValueError(
                f"record {pair.id!r}: {len(pair.chosen.answer_ids)} answer tokens in the long input, {len(short)} in "
                "the short ones; the constraint compares them one by one, so expected the same answers in both"
            )
    if method.nll == "answers":
        return replace(selected, chosen=replace(selected.chosen, nll_labels=selected.chosen.labels))
    if method.nll and selected.chosen.nll_labels is None:
        raise ValueError(f"record {pair.id!r}: no NLL labels (lm_labels) in the {method.sequence} sequence")
    return selected


def parts_of(method: Method, selected: TokenizedPair) -> tuple[TokenizedPair, ...]:
    """What a pack holds side by side of what was selected of a pair."""
    return with_short(selected) if method.sequence == "triples" else (selected,)


def rows_of(method: Method, selected: TokenizedPair, separate: bool = False) -> int:
    """Rows that they take in a pack."""
    return sum(packed_length(part, separate) for part in parts_of(method, selected))


class PackedPairs(Dataset):
    """A map-style data set of Packs."""

    def __init__(
        self,
        pairs: Sequence[TokenizedPair],
        method: Method,
        *,
        pack_tokens: int | None = None,
        target_length: int | None = None,
        seed: int = 0,
        separate: bool = False,
    ):
        """pack_tokens: budget of a pack, None for a pair each. target_length (0 is none too), seed and separate as in
        data.pack."""
        self.pairs, self.method, self.target_length, self.seed = pairs, method, target_length or None, seed
        self.separate = separate
        self.groups = [[i] for i in range(len(pairs))] if pack_tokens is None else self._group(pack_tokens)

    def _group(self, pack_tokens: int) -> list[list[int]]:
        index, groups = 0, []
        selected = (select(pair, self.method) for pair in self.pairs)
        length = partial(rows_of, self.method)
        for group in pack_within(selected, pack_tokens, separate=self.separate, length=length):
            groups.append(list(range(index, index + len(group))))
            index += len(group)
        return groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Pack:
        pairs = tuple(self.pairs[i] for i in self.groups[index])
        selected = [select(pair, self.method) for pair in pairs]
        if self.method.sequence == "triples":
            return Pack(pack_triples(selected, separate=self.separate), pairs, index)
        return Pack(pack(selected, self.target_length, self.seed, separate=self.separate), pairs, index)


def collate(packs: list[Pack]) -> dict[str, Pack]:
    """A batch is one pack."""
    (pack,) = packs
    return {"pack": pack}
