"""Preference pairs as people write them: one long document, one or more turns asked about it.

    {"id": "doc-17",
     "document": "...the whole long text C_L...",
     "turns": [{"instruction": "...I_i...", "chunk": "...C_S^i, the part of the document it is about...",
                "chosen": "...y_S^i...", "rejected": ["...y_L^i..."]}],
     "provenance": {...},
     "ref_chosen_logp": -41.5, "ref_rejected_logps": [-63.25]}

`id` may be left out (file and line then name the record), `provenance` holds anything, the reference's log-probs on the
short inputs (Eq. 13: summed over all turns) are optional. Several rejected answers per turn (LOGO) form several
rejected conversations: the j-th takes the j-th rejected answer of every turn. The official unformatted records
(`prompt`, `short_prompts`, `questions`, `chosens`, `rejecteds`) are read into the same type; their further columns
become provenance.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..kinds import LARGEST, check_each, check_flag, check_number, check_object, shown
from .records import (
    BadRecord,
    DataReport,
    as_json,
    came,
    check_text,
    keep_good,
    parse_record,
    read_records,
    write_records,
)
from .records import record_id as name_of

if TYPE_CHECKING:
    from .context import ContextPair

PAIR_FIELDS = {"id", "document", "turns", "provenance", "ref_chosen_logp", "ref_rejected_logps"}
TURN_FIELDS = {"instruction", "chunk", "chosen", "rejected"}
OFFICIAL_LISTS = ("short_prompts", "questions", "chosens", "rejecteds")


@dataclass(frozen=True)
class Turn:
    """One question, the short chunk it was asked about, its chosen answer and one or more rejected ones."""

    instruction: str
    chunk: str
    chosen: str
    rejected: tuple[str, ...]

    def __post_init__(self):
        for name in ("instruction", "chunk", "chosen"):
            check_object(f"Turn: {name}", getattr(self, name), str, "text")
        tuple(check_each("Turn: rejected", self.rejected, str, "text", (tuple, list)))


@dataclass(frozen=True)
class Pair:
    """One record: a chosen conversation over the whole document and one or more rejected ones."""

    id: str
    document: str
    turns: tuple[Turn, ...]
    provenance: dict[str, Any] = field(default_factory=dict)
    ref_chosen_logp: float | None = None
    ref_rejected_logps: tuple[float, ...] | None = None

    def __post_init__(self):
        for name in ("id", "document"):
            check_object(f"Pair: {name}", getattr(self, name), str, "text")
        if not tuple(check_each("Pair: turns", self.turns, Turn, "a Turn", (tuple, list))):
            raise ValueError("Pair: turns is empty, expected at least one Turn")
        check_object("Pair: provenance", self.provenance, dict, "a dict")
        check_logps(self)

    @classmethod
    def from_record(cls, record: dict, where: str = "record", allow_equal: bool = False) -> Pair:
        """Check a record and make a Pair of it; `where` names a record that has no id.

        Raises BadRecord for fields missing, empty, unknown or of another type, a different number of rejected answers
        between turns, and a rejected conversation equal to the chosen one (unless allow_equal).
        """
        allow_equal = check_flag("allow_equal", allow_equal)
        record = parse_record(record, where)
        if not record:
            raise BadRecord(where, "record", "empty record", "expected at least a document and turns")
        record_id = name_of(record, where)
        if "document" not in record and "prompt" in record:
            record = _from_official(record, record_id)
        _refuse_unknown(record_id, "record", record, PAIR_FIELDS, "keep further data under 'provenance'")
        turns = _get(record_id, record, "turns", list, "turns")
        if not turns:
            raise BadRecord(record_id, "turns", "empty field", "[] came; expected a list of at least one turn")
        turns = tuple(_turn(record_id, f"turns[{i}]", turn) for i, turn in enumerate(turns))
        pair = cls(
            id=record_id,
            document=_text(record_id, record, "document", "document"),
            turns=turns,
            provenance=_provenance(record_id, record),
            ref_chosen_logp=_logps(record_id, record, "ref_chosen_logp", None),
            ref_rejected_logps=_logps(record_id, record, "ref_rejected_logps", len(turns[0].rejected)),
        )
        _check_answers(pair, allow_equal)
        return pair

    def to_record(self) -> dict[str, Any]:
        """The pair as the JSON object described on top of this file; absent log-probs are None."""
        return asdict(self)


def pair_of(record: str | dict, where: str = "record", allow_equal: bool = False) -> Pair | ContextPair:
    """A record of either kind, told by its columns. Raises BadRecord, for a record in the columns of other libraries with the
    command that converts it."""
    from .context import ContextPair
    from .convert import advice_for

    record = parse_record(record, where)
    if "context" in record:
        return ContextPair.from_record(record, where, allow_equal)
    if advice := advice_for(record):
        raise BadRecord(name_of(record, where), "record", "columns of another library", advice)
    return Pair.from_record(record, where, allow_equal)


def read_pairs(
    path: str | os.PathLike,
    on_bad_record: str = "raise",
    report: DataReport | None = None,
    allow_equal: bool = False,
) -> Iterator[Pair | ContextPair]:
    """Stream the pairs of a .jsonl[.gz|.zst] or .parquet file, or of a folder of them in order of their names.

    on_bad_record: "raise" stops at the first bad record, "skip" leaves it out and counts its reason in `report`.
    Raises BadRecord (a ValueError), and ValueError for a path without data or without one usable record.
    """
    return keep_good(
        read_records(path), lambda record, where: pair_of(record, where, allow_equal), on_bad_record, report
    )


def write_pairs(pairs: Iterable[Pair | ContextPair], path: str | os.PathLike) -> int:
    """Write pairs to a .jsonl, .jsonl.gz or .parquet file and return their number.

    Parquet columns have one type for all records, so provenance is stored there as JSON text, and a ContextPair not at all.
    """
    from .context import ContextPair

    parquet = str(path).endswith(".parquet")
    kinds = (Pair, "a Pair; contexts go into a .jsonl or .jsonl.gz file") if parquet else (Pair | ContextPair, "a Pair")
    records = (pair.to_record() for pair in check_each("pairs", pairs, *kinds))
    if not parquet:
        return write_records(records, path)
    import pyarrow as pa

    text, number = pa.string(), pa.float64()
    turn = pa.struct({"instruction": text, "chunk": text, "chosen": text, "rejected": pa.list_(text)}.items())
    columns = {"id": text, "document": text, "turns": pa.list_(turn), "provenance": text}
    schema = pa.schema(columns | {"ref_chosen_logp": number, "ref_rejected_logps": pa.list_(number)})
    records = (record | {"provenance": as_json(record["provenance"], record["id"])} for record in records)
    return write_records(records, path, schema)


def _from_official(record: dict, record_id: str) -> dict:
    lists = {name: _get(record_id, record, name, list, name) for name in OFFICIAL_LISTS}
    counts = {name: len(entries) for name, entries in lists.items()}
    if len(set(counts.values())) != 1:
        raise BadRecord(record_id, "questions", "lists of different lengths", f"{counts} came; expected one per turn")
    known = {"id", "prompt", "ref_chosen_logp", "ref_rejected_logps", *OFFICIAL_LISTS}
    turns = [
        {"chunk": chunk, "instruction": question, "chosen": chosen, "rejected": rejected}
        for chunk, question, chosen, rejected in zip(*lists.values(), strict=True)
    ]
    kept = {name: record[name] for name in PAIR_FIELDS & record.keys()}
    provenance = {name: value for name, value in record.items() if name not in known | PAIR_FIELDS}
    provenance |= _provenance(record_id, record)
    return kept | {"document": record["prompt"], "turns": turns, "provenance": provenance}


def _turn(record_id: str, name: str, turn: Any) -> Turn:
    if not isinstance(turn, dict):
        raise BadRecord(record_id, name, "wrong type", f"{came(turn)}; expected an object with {_and(TURN_FIELDS)}")
    _refuse_unknown(record_id, name, turn, TURN_FIELDS, f"a turn has the fields {_and(TURN_FIELDS)}")
    rejected = turn.get("rejected")
    if isinstance(rejected, str):
        turn = turn | {"rejected": [rejected]}
    rejected = _get(record_id, turn, "rejected", list, f"{name}.rejected")
    if not rejected:
        raise BadRecord(record_id, f"{name}.rejected", "empty field", "[] came; expected at least one rejected answer")
    texts = {key: _text(record_id, turn, key, f"{name}.{key}") for key in ("instruction", "chunk", "chosen")}
    answers = (_text(record_id, {"": text}, "", f"{name}.rejected[{j}]") for j, text in enumerate(rejected))
    return Turn(**texts, rejected=tuple(answers))


def _get(record_id: str, record: dict, key: str, kind: type, name: str) -> Any:
    value, wanted = record.get(key), {list: "a list", str: "text"}[kind]
    if value is None:
        found, others = "null" if key in record else "nothing", ", ".join(sorted(map(str, set(record) - {key})))
        advice = f"{found} came; expected {wanted}" + (f" beside {others}" if others else "")
        raise BadRecord(record_id, name, "missing field", advice)
    if not isinstance(value, (list, tuple) if kind is list else kind):
        raise BadRecord(record_id, name, "wrong type", f"{came(value)}; expected {wanted}")
    return value


def _and(names: Iterable[str]) -> str:
    return ", ".join(sorted(map(str, names)))


def _text(record_id: str, record: dict, key: str, name: str) -> str:
    return check_text(record_id, name, _get(record_id, record, key, str, name))


def _refuse_unknown(record_id: str, name: str, record: dict, known: set[str], advice: str) -> None:
    unknown = sorted(str(key) for key, value in record.items() if key not in known and value is not None)
    if unknown:
        raise BadRecord(record_id, name, "unknown field", f"{', '.join(unknown)} came; {advice}")


def _provenance(record_id: str, record: dict) -> dict:
    value = record.get("provenance", {})
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, dict):
        raise BadRecord(
            record_id, "provenance", "wrong type", f"{came(value)}; expected an object, or JSON text of one"
        )
    return value


def _logps(record_id: str, record: dict, key: str, count: int | None) -> Any:
    """A finite log-prob <= 0 (count None) or a tuple of `count` of them; None if the record has none."""
    value = record.get(key)
    if value is None:
        return None
    values = [value] if count is None else value
    wanted = "a number" if count is None else f"a list of {count}, one per rejected answer,"
    good = isinstance(values, (list, tuple)) and len(values) == (count or 1)
    if not good or not all(type(v) in (int, float) and -LARGEST <= v <= 0 for v in values):
        raise BadRecord(record_id, key, "bad log-probs", f"{came(value)}; expected {wanted} finite and at most 0")
    return float(value) if count is None else tuple(float(v) for v in values)


def check_logps(pair) -> None:
    """Raises ValueError unless the reference's log-probs of a Pair or TokenizedPair are finite numbers of at most 0, or None;
    makes plain floats of them."""
    name, chosen, rejected = type(pair).__name__, pair.ref_chosen_logp, pair.ref_rejected_logps
    if chosen is not None:
        object.__setattr__(pair, "ref_chosen_logp", _check_logp(f"{name}: ref_chosen_logp", chosen))
    if rejected is not None:
        given = check_object(f"{name}: ref_rejected_logps", rejected, (tuple, list), "a tuple of numbers")
        plain = tuple(_check_logp(f"{name}: ref_rejected_logps", value) for value in given)
        object.__setattr__(pair, "ref_rejected_logps", plain)


def _check_logp(name: str, value: Any) -> float:
    number = check_number(name, value)
    if number > 0:
        raise ValueError(f"{name}: got {number}, expected a log-prob, which is at most 0")
    return number


def _check_answers(pair: Pair, allow_equal: bool) -> None:
    counts = [len(turn.rejected) for turn in pair.turns]
    if len(set(counts)) != 1:
        advice = f"{counts} came; expected the same number in every turn"
        raise BadRecord(pair.id, "turns", "different numbers of rejected answers", advice)
    for j in range(counts[0]):
        if not allow_equal and all(turn.chosen.strip() == turn.rejected[j].strip() for turn in pair.turns):
            advice = f"rejected answer {j} says the same in every turn, {shown(pair.turns[0].chosen)}, which is no preference"
            advice += "; remove it"
            raise BadRecord(pair.id, "rejected", "chosen equal to rejected", advice)
    names = ("ref_chosen_logp", "ref_rejected_logps")
    there = [name for name in names if getattr(pair, name) is not None]
    if len(there) == 1:
        raise BadRecord(pair.id, *there, "bad log-probs", f"it came alone; expected both of {_and(names)}, or neither")
