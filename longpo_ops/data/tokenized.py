"""A pair as token ids, and the columns it is stored in.

Columns, as in the official tokenised sets: `chosen_` and `rejected_` (long inputs), `ref_chosen_` and `ref_rejected_`
(short inputs, one sequence per turn), each with `input_ids`, `attention_mask`, `labels` (answers, else -100) and, for the
long ones, `lm_labels` (what the NLL term counts, else -100). Ours besides: `id`, `tokenizer` (its fingerprint), the
reference's log-probs `ref_chosen_logp` and `ref_rejected_logps`, and, for R > 1 rejected conversations, `rejected_` as
R sequences and `ref_rejected_` as R * turns of them, one conversation after another. Padding (attention mask 0 at an end) is
dropped on reading.

Memory: 8 bytes per id and label, 24 per token of a long sequence.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..kinds import check_choice, check_each, check_flag, check_object, check_whole, shown
from .pairs import _logps, check_logps
from .records import BadRecord, DataReport, came, keep_good, parse_record, read_records, record_id, write_records

IGNORE = -100
NLL_TOKENS = ("contents", "all")  # which tokens of a long sequence its NLL term may count


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """One sequence; labels are aligned with ids (a label equals its id, or is -100) and not shifted."""

    ids: np.ndarray  # (T,) int64
    labels: np.ndarray  # (T,) int64: answer tokens
    nll_labels: np.ndarray | None = None  # (T,) int64: tokens of the NLL term; None counts nothing

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is None and name == "nll_labels":
                continue
            good = isinstance(value, np.ndarray) and value.dtype == np.int64 and value.ndim == 1
            if not good or len(value) != len(self.ids):
                came = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else shown(value)
                raise ValueError(f"TokenSequence: {name} is {came}, expected an int64 array (T,), the same T in all")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def answer_ids(self) -> np.ndarray:
        """The ids of the answer tokens, in order."""
        return self.ids[self.labels != IGNORE]


@dataclass(frozen=True, eq=False)
class TokenizedPair:
    """A chosen and R rejected long sequences, and the short inputs of the reference, one per turn."""

    id: str
    chosen: TokenSequence
    rejected: tuple[TokenSequence, ...]  # (R,)
    ref_chosen: tuple[TokenSequence, ...] = ()  # (turns,), or () where a data set has none
    ref_rejected: tuple[tuple[TokenSequence, ...], ...] = ()  # (R, turns)
    ref_chosen_logp: float | None = None  # reference log-probs summed over the turns, where the data holds them
    ref_rejected_logps: tuple[float, ...] | None = None  # (R,)

    def __post_init__(self):
        check_object("TokenizedPair: id", self.id, str, "text")
        sequence = TokenSequence, "a TokenSequence", (tuple, list)
        check_object("TokenizedPair: chosen", self.chosen, *sequence[:2])
        for name, given in (("rejected", self.rejected), ("ref_chosen", self.ref_chosen)):
            tuple(check_each(f"TokenizedPair: {name}", given, *sequence))
        for turns in check_each(
            "TokenizedPair: ref_rejected", self.ref_rejected, (tuple, list), "a tuple", (tuple, list)
        ):
            if len(tuple(check_each("TokenizedPair: ref_rejected", turns, *sequence))) != len(self.ref_chosen):
                came = f"{len(turns)} short inputs, {len(self.ref_chosen)} in ref_chosen"
                raise ValueError(f"TokenizedPair: ref_rejected has {came}, expected one per turn in both")
        check_logps(self)

    @property
    def length(self) -> int:
        """Tokens of the longest long sequence: the context the policy needs."""
        return max(len(sequence) for sequence in (self.chosen, *self.rejected))

    @property
    def digest(self) -> str:
        """Of every id, label and log-prob, in 32 letters; the pair's own id is not in it."""
        digest = hashlib.sha256(repr((self.ref_chosen_logp, self.ref_rejected_logps)).encode())
        for sequences in ((self.chosen,), self.rejected, self.ref_chosen, *self.ref_rejected):
            digest.update(f"{len(sequences)};".encode())
            for sequence in sequences:
                for part in (sequence.ids, sequence.labels, sequence.nll_labels):
                    digest.update(b"none" if part is None else np.int64(len(part)).tobytes() + part.tobytes())
        return digest.hexdigest()[:32]

    def counting(self, nll_tokens: str) -> TokenizedPair:
        """The pair whose NLL labels are its own ("contents": no system prompt, no role markers), or every token of a long
        sequence ("all"). Raises ValueError for another word."""
        if check_choice("nll_tokens", nll_tokens, NLL_TOKENS) == "contents":
            return self
        chosen, *rejected = (replace(s, nll_labels=s.ids) for s in (self.chosen, *self.rejected))
        return replace(self, chosen=chosen, rejected=tuple(rejected))

    def short_pairs(self) -> tuple[TokenizedPair, ...]:
        """The reference's short inputs, one pair per turn.

        A batch of them runs like any other: chunk and question are read once for chosen and rejected answers. The
        log-probs of Eq. 13 are the sums over these pairs.
        """
        return tuple(
            TokenizedPair(f"{self.id}#{i}", chosen, tuple(turns[i] for turns in self.ref_rejected))
            for i, chosen in enumerate(self.ref_chosen)
        )

    @classmethod
    def from_record(
        cls,
        record: dict,
        where: str = "record",
        vocab_size: int | None = None,
        fingerprint: str | None = None,
        allow_equal: bool = False,
    ) -> TokenizedPair:
        """Check a record of tokenised columns and make a TokenizedPair of it.

        Raises BadRecord for columns missing or of different lengths, labels that are neither -100 nor their id, ids
        outside [0, vocab_size), a stored tokenizer fingerprint other than `fingerprint`, sequences without answer
        tokens, and a rejected sequence equal to the chosen one (unless allow_equal).
        """
        allow_equal = check_flag("allow_equal", allow_equal)
        vocab_size = None if vocab_size is None else check_whole("vocab_size", vocab_size, 1)
        check_object("fingerprint", fingerprint, str | None, "text or None")
        record = parse_record(record, where)
        columns = _Columns(record, record_id(record, where), vocab_size)
        stored = record.get("tokenizer")
        if fingerprint is not None and stored is not None and stored != fingerprint:
            advice = "it was tokenised with another tokenizer; tokenise the text again with this model's"
            raise columns.bad("tokenizer", "another tokenizer", advice)
        chosen = columns.sequences("chosen_", nll=True)
        if len(chosen) != 1:
            raise columns.bad("chosen_input_ids", "wrong shape", f"{len(chosen)} sequences came; expected one")
        rejected = columns.sequences("rejected_", nll="rejected_lm_labels" in record)
        turns, turns_rejected = (), ()
        if "ref_chosen_input_ids" in record or "ref_rejected_input_ids" in record:
            turns = columns.sequences("ref_chosen_")
            flat = columns.sequences("ref_rejected_")
            n = len(turns)
            if len(flat) != n * len(rejected):
                advice = f"{len(flat)} sequences came; expected {n} turns times {len(rejected)} rejected sequences"
                raise columns.bad("ref_rejected_input_ids", "wrong shape", advice)
            turns_rejected = tuple(flat[j * n : (j + 1) * n] for j in range(len(rejected)))
        for j, sequence in enumerate(rejected):
            if not allow_equal and np.array_equal(sequence.ids, chosen[0].ids):
                raise columns.bad("rejected_input_ids", "chosen equal to rejected", f"sequence {j}; remove it")
        ref_chosen_logp = _logps(columns.id, record, "ref_chosen_logp", None)
        ref_rejected_logps = _logps(columns.id, record, "ref_rejected_logps", len(rejected))
        return cls(columns.id, chosen[0], rejected, turns, turns_rejected, ref_chosen_logp, ref_rejected_logps)

    def to_record(self, fingerprint: str | None = None) -> dict:
        """The pair in the columns described on top of this file."""
        flat = tuple(sequence for turns in self.ref_rejected for sequence in turns)
        record = {"id": self.id, "tokenizer": fingerprint}
        record |= {name: values[0] for name, values in _columns("chosen_", (self.chosen,)).items()}
        record |= _columns("rejected_", self.rejected)
        record |= _columns("ref_chosen_", self.ref_chosen) | _columns("ref_rejected_", flat)
        logps = self.ref_rejected_logps
        return record | {
            "ref_chosen_logp": self.ref_chosen_logp,
            "ref_rejected_logps": None if logps is None else list(logps),
        }


def tokenizer_fingerprint(tokenizer) -> str:
    """A digest of a tokenizer's vocabulary and added tokens: equal where ids mean the same."""
    if isinstance(tokenizer, type) or not hasattr(tokenizer, "get_vocab"):
        raise ValueError(f"tokenizer: expected a transformers tokenizer, got {shown(tokenizer)}")
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def read_tokenized(
    path: str | os.PathLike,
    vocab_size: int | None = None,
    fingerprint: str | None = None,
    on_bad_record: str = "raise",
    report: DataReport | None = None,
    allow_equal: bool = False,
) -> Iterator[TokenizedPair]:
    """Stream tokenised pairs, the official sets included; errors as `TokenizedPair.from_record` and `keep_good`."""

    def make(record, where):
        return TokenizedPair.from_record(record, where, vocab_size, fingerprint, allow_equal)

    return keep_good(read_records(path), make, on_bad_record, report)


def write_tokenized(pairs: Iterable[TokenizedPair], path: str | os.PathLike, fingerprint: str | None = None) -> int:
    """Write tokenised pairs with the fingerprint of their tokenizer; returns their number."""
    check_object("fingerprint", fingerprint, str | None, "text or None")
    pairs = check_each("pairs", pairs, TokenizedPair, "a TokenizedPair")
    records = (pair.to_record(fingerprint) for pair in pairs)
    if not str(path).endswith(".parquet"):
        return write_records(records, path)
    import pyarrow as pa

    ids, mask = pa.list_(pa.int32()), pa.list_(pa.int8())
    columns = [("id", pa.string()), ("tokenizer", pa.string())]
    for prefix in ("chosen_", "rejected_", "ref_chosen_", "ref_rejected_"):
        nest = (lambda kind: kind) if prefix == "chosen_" else pa.list_
        names = ("input_ids", "labels") if prefix.startswith("ref_") else ("input_ids", "labels", "lm_labels")
        columns += [(prefix + name, nest(ids)) for name in names] + [(f"{prefix}attention_mask", nest(mask))]
    columns += [("ref_chosen_logp", pa.float64()), ("ref_rejected_logps", pa.list_(pa.float64()))]
    return write_records(records, path, pa.schema(columns))


def _columns(prefix: str, sequences: tuple[TokenSequence, ...]) -> dict[str, list]:
    columns = {
        "input_ids": [s.ids.tolist() for s in sequences],
        "attention_mask": [[1] * len(s) for s in sequences],
        "labels": [s.labels.tolist() for s in sequences],
        "lm_labels": [s.nll_labels.tolist() for s in sequences if s.nll_labels is not None],
    }
    return {prefix + name: values for name, values in columns.items() if len(values) == len(sequences) > 0}


@dataclass
class _Columns:
    """The tokenised columns of one record, checked as they are taken out."""

    record: dict
    id: str
    vocab_size: int | None

    def bad(self, name: str, reason: str, advice: str) -> BadRecord:
        return BadRecord(self.id, name, reason, advice)

    def sequences(self, prefix: str, nll: bool = False) -> tuple[TokenSequence, ...]:
        ids = self._sequences_of(f"{prefix}input_ids")
        labels = self._sequences_of(f"{prefix}labels")
        masks = self._sequences_of(f"{prefix}attention_mask") if f"{prefix}attention_mask" in self.record else None
        masks = [np.ones_like(each) for each in ids] if masks is None else masks
        nll_labels = self._sequences_of(f"{prefix}lm_labels") if nll else [None] * len(ids)
        if not len(ids) == len(labels) == len(masks) == len(nll_labels) or not ids:
            counts = f"{len(ids)}, {len(labels)}, {len(masks)} and {len(nll_labels)} sequences"
            raise self.bad(f"{prefix}input_ids", "ids and labels differ in length", f"{counts} came; expected equal")
        return tuple(self._sequence(prefix, *columns) for columns in zip(ids, labels, masks, nll_labels, strict=True))

    def _sequences_of(self, name: str) -> list[np.ndarray]:
        """A column as a list of sequences; a flat column is one."""
        value = self.record.get(name)
        if value is None:
            raise self.bad(name, "missing field", "nothing came; expected a tokenised column; tokenise the text again")
        try:
            nested = len(value) > 0 and not np.isscalar(value[0])
            found = [np.asarray(each) for each in (value if nested else [value])]
            good = all(each.ndim == 1 and (each.size == 0 or each.dtype.kind in "iu") for each in found)
        except (KeyError, TypeError, ValueError):
            good = False
        if not good:
            raise self.bad(name, "wrong type", f"{came(value)}; expected a list of integers, or a list of such lists")
        return [each.astype(np.int64) for each in found]

    def _sequence(self, prefix: str, ids, labels, mask, nll_labels) -> TokenSequence:
        lengths = {len(a) for a in (ids, labels, mask, nll_labels) if a is not None}
        if len(lengths) != 1:
            advice = f"lengths {sorted(lengths)} came; expected the same for ids, mask and labels"
            raise self.bad(f"{prefix}input_ids", "ids and labels differ in length", advice)
        used = np.flatnonzero(mask)
        if used.size == 0 or used[-1] - used[0] + 1 != used.size:
            advice = f"{shown(mask.tolist())} came; expected ones with zeros only at the ends"
            raise self.bad(f"{prefix}attention_mask", "bad mask", advice)
        kept = slice(used[0], used[-1] + 1)
        ids, labels = ids[kept], labels[kept]
        nll_labels = None if nll_labels is None else nll_labels[kept]
        if ids.min() < 0 or (self.vocab_size is not None and ids.max() >= self.vocab_size):
            came = f"ids from {ids.min()} to {ids.max()} came, the vocabulary has {self.vocab_size}"
            advice = f"{came}: it was made with another tokenizer, tokenise the text again with this model's"
            raise self.bad(f"{prefix}input_ids", "another tokenizer", advice)
        for name, values in (("labels", labels), ("lm_labels", nll_labels)):
            wrong = () if values is None else np.flatnonzero((values != IGNORE) & (values != ids))
            if len(wrong):
                came = f"{values[wrong[0]]} came at position {wrong[0]}, where the id is {ids[wrong[0]]}"
                advice = f"{came}; expected each label to be -100 or the id at its place, not shifted"
                raise self.bad(prefix + name, "labels are not ids", advice)
        if not np.any(labels[1:] != IGNORE) or labels[0] != IGNORE:
            raise self.bad(f"{prefix}labels", "no answer tokens", "expected answer tokens, and none at position 0")
        return TokenSequence(ids, labels, nll_labels)
