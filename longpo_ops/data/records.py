"""Records of JSON Lines and Parquet files, one at a time, and what becomes of bad ones.

Memory is a few records (Parquet) or one line (JSON Lines) whatever the size of the set. JSON Lines are UTF-8, or what
their byte-order mark says, and parsed line by line, so that one malformed line is one bad record and not an unreadable
file. Not covered: JSON arrays, CSV, and files that are not local. Documents are read by documents/readers.py.

Tests: tests/data/test_pairs.py.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from ..kinds import check_choice, check_object, shown
from ..text import decoded, one_line

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
RECORDS_PER_GROUP = 16  # a record can hold megabytes of text, and readers load a row group at a time

KINDS = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}

T = TypeVar("T")


class BadRecord(ValueError):
    """A record that cannot be trained on. `reason` is the short form that a skipping reader counts; `where`, file and line,
    is the reader's to say."""

    def __init__(self, record_id: str, field_name: str, reason: str, advice: str):
        super().__init__(f"record {record_id!r}, {field_name}: {reason}; {advice}")
        self.record_id, self.field, self.reason, self.where = record_id, field_name, reason, record_id

    def __str__(self) -> str:
        return self.args[0] if self.where == self.record_id else f"{self.where}, {self.args[0]}"


@dataclass
class DataReport:
    """What happened while a set was read; pass one object through reading and tokenising, then print it.

    tell: how many of the records that are skipped for the same reason are told, each with its file, line and field.
    """

    read: int = 0
    kept: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # reason -> records
    told: dict[str, list[str]] = field(default_factory=dict)  # reason -> messages
    tell: int = 1
    cut_documents: int = 0
    cut_tokens: int = 0
    trimmed_contents: int = 0  # contents whose outer whitespace the chat template takes away
    piecewise_pairs: int = 0  # pairs whose answers had to be tokenised on their own (chat.py)
    other_variables: int = 0  # pairs that were generated with other template_kwargs
    merged_contexts: int = 0  # pairs whose context's last tokens are others once an answer follows (context.py)
    swallowed_pairs: int = 0  # pairs with white space at the ends of contents that the template's own tokens take

    def skip(self, bad: BadRecord) -> None:
        """Count a bad record, and keep what is to be told of it."""
        self.skipped[bad.reason] += 1
        told = self.told.setdefault(bad.reason, [])
        told += [str(bad)] if len(told) < self.tell else []

    @property
    def untold(self) -> int:
        """Bad records that are counted and not told."""
        return self.skipped.total() - sum(map(len, self.told.values()))

    def __str__(self) -> str:
        lines = [f"{self.kept} of {self.read} records kept"]
        for reason, count in self.skipped.most_common():
            told = self.told.get(reason, [])
            part = f" ({len(told)} of them told)" if 0 < len(told) < count else ""
            lines += [f"  {count} skipped: {reason}{part}", *(f"    {message}" for message in told)]
        if self.cut_documents:
            lines.append(f"  {self.cut_documents} documents cut by {self.cut_tokens} tokens in all")
        if self.trimmed_contents:
            lines.append(f"  {self.trimmed_contents} contents trimmed as the chat template does")
        if self.piecewise_pairs:
            lines.append(f"  {self.piecewise_pairs} pairs tokenised piecewise")
        if self.other_variables:
            lines.append(
                f"  {self.other_variables} pairs were generated with other template_kwargs than they are formatted with"
            )
        if self.merged_contexts:
            lines.append(f"  {self.merged_contexts} contexts end in tokens that are others once an answer follows")
        if self.swallowed_pairs:
            lines.append(
                f"  {self.swallowed_pairs} pairs lose outer whitespace of contents to tokens of the chat template"
            )
        return "\n".join(lines)


def keep_good(
    records: Iterable[tuple[str, Any]],
    make: Callable[[Any, str], T],
    on_bad_record: str = "raise",
    report: DataReport | None = None,
) -> Iterator[T]:
    """Yield make(record, where) for every (where, record); a BadRecord is raised, or counted and left out.

    Raises ValueError for another `on_bad_record`, and at the end if no record was kept.
    """
    check_choice("on_bad_record", on_bad_record, ("raise", "skip"))
    check_object("report", report, DataReport | None, "a DataReport or None")
    report = DataReport() if report is None else report
    kept_before = report.kept
    for where, record in records:
        report.read += 1
        try:
            value = make(record, where)
        except BadRecord as bad:
            bad.where = where
            if on_bad_record == "raise":
                raise
            report.skip(bad)
            continue
        report.kept += 1
        yield value
    if report.kept == kept_before:
        raise ValueError(f"no usable record was found; expected at least one. {report}")


def data_files(path: str | os.PathLike) -> list[Path]:
    """The data files at `path`: the file itself, or those below a folder, sorted. ValueError if there is none."""
    path = Path(check_object("path", path, str | os.PathLike, "a path"))
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and _is_data(p))
    if not found or not all(_is_data(p) for p in found):
        came = "does not exist" if not path.exists() else "holds no data file" if path.is_dir() else "is another kind"
        raise ValueError(
            f"{path} {came}; expected a file ending in {', '.join(SUFFIXES)}, or a folder of such files{_foreign(path)}"
        )
    return found


def read_records(path: str | os.PathLike) -> Iterator[tuple[str, str | dict]]:
    """Yield ('file:number', record) for every record below `path`; a JSON line is still text (`parse_record` parses it).

    Raises ValueError for a path without data, and for a file that is damaged, naming it.
    """
    for file in data_files(path):
        try:
            yield from _records(file)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno:  # the system's, say of permissions, which names the file
                raise
            raise ValueError(f"{file} cannot be read ({error}); it is damaged or cut off, fetch it again") from error


def count_records(path: str | os.PathLike) -> int:
    """How many records `read_records` yields, without looking into them. Raises as that."""
    return sum(
        _rows(file) if file.suffix == ".parquet" else sum(1 for _ in read_records(file)) for file in data_files(path)
    )


def _records(file: Path) -> Iterator[tuple[str, str | dict]]:
    name = one_line(file.name)
    if file.suffix == ".parquet":
        yield from ((f"{name}:{number}", record) for number, record in enumerate(_parquet(file), 1))
        return
    with decoded(OPENERS.get(file.suffix, open)(file, "rb")) as lines:
        yield from ((f"{name}:{number}", line) for number, line in enumerate(lines, 1) if line.strip())


def _rows(file: Path) -> int:
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(file).num_rows


def _parquet(file: Path) -> Iterator[dict]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:
        for group in table.iter_batches(batch_size=RECORDS_PER_GROUP):
            yield from group.to_pylist()


def _open_zstd(file: Path, mode: str) -> io.BufferedReader:
    import pyarrow  # the package zstandard takes the end of a cut file for its end

    return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))


OPENERS = {".gz": gzip.open, ".zst": _open_zstd}


def parse_record(record: str | dict, where: str) -> dict:
    """A record as a dict without empty columns. BadRecord for text that is no JSON object."""
    if isinstance(record, str):
        line = record
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            advice = (
                f"{error}; {shown(line.strip())} came, expected one object per line{_arrays(line.strip()[:1] == '[')}"
            )
            raise BadRecord(where, "line", "no valid JSON", advice) from None
    if not isinstance(record, dict):
        raise BadRecord(
            where,
            "line",
            "no JSON object",
            f"{came(record)}; expected one object per line{_arrays(isinstance(record, list))}",
        )
    return {name: value for name, value in record.items() if value is not None}


def _arrays(begins: bool) -> str:
    return "; of a file that is one JSON array `longpo pairs convert` makes pairs" if begins else ""


def record_id(record: dict, where: str) -> str:
    """What a record is called: its id, a whole number as text, or where it stands. BadRecord for an id of another kind."""
    value = record.get("id")
    if value is None or value == "":
        return where
    if isinstance(value, float) and value.is_integer():  # what pandas makes of whole numbers where one is missing
        value = int(value)
    if type(value) not in (str, int):
        raise BadRecord(where, "id", "wrong type", f"{came(value)}; expected text or a whole number, or no id")
    return check_text(where, "id", str(value))


def check_text(record: str, name: str, text: str) -> str:
    """-> text. BadRecord where it is empty, or cannot be written as UTF-8."""
    if not text.strip():
        raise BadRecord(
            record, name, "empty field", f"{text!r} came; expected text: fill the field or remove the record"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        advice = f"character {error.start} is half a surrogate pair or no UTF-8; store the file as UTF-8"
        raise BadRecord(record, name, "broken text encoding", advice) from None
    return text


def came(value: Any) -> str:
    """What came in the place of something else, as JSON calls it."""
    kind = "null" if value is None else KINDS.get(type(value), type(value).__name__)
    return f"{kind} came" + ("" if value is None else f", {shown(value)}")


def write_records(records: Iterable[dict], path: str | os.PathLike, schema=None) -> int:
    """Write records to a .jsonl, .jsonl.gz or .parquet file and return their number.

    The file appears under its name only when it is complete. `schema` (pyarrow.Schema) is needed for Parquet.
    """
    path = Path(check_object("path", path, str | os.PathLike, "a path"))
    write = _write_parquet if path.suffix == ".parquet" else _write_json_lines
    if not _is_data(path) or path.suffix == ".zst":
        raise ValueError(f"cannot write {path}; expected a name ending in .jsonl, .jsonl.gz or .parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.urandom(4).hex()}.partial")
    try:
        count = write(records, partial, schema, path.suffix == ".gz")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _write_json_lines(records, partial: Path, schema, compress: bool) -> int:
    count = 0
    with gzip.open(partial, "wt", encoding="utf-8") if compress else open(partial, "w", encoding="utf-8") as out:
        for record in records:
            out.write(as_json(record, record.get("id")) + "\n")
            count += 1
    return count


def as_json(value: Any, record_id: Any) -> str:
    """Text that UTF-8 can hold: half a surrogate pair becomes JSON's own escape of it. Raises ValueError for a NaN or an
    infinity, which JSON has not."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace").decode()
    except ValueError as error:
        raise ValueError(f"record {record_id!r}: {error}; JSON has neither NaN nor infinities: take them out") from None


def _write_parquet(records, partial: Path, schema, compress: bool) -> int:
    import pyarrow
    import pyarrow.parquet

    count, records = 0, iter(records)
    with pyarrow.parquet.ParquetWriter(partial, schema) as writer:
        while group := list(islice(records, RECORDS_PER_GROUP)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))
            count += len(group)
    return count


def _foreign(path: Path) -> str:
    """What converts a path that other programs wrote, or nothing."""
    from .foreign import is_foreign

    command = f"; `longpo pairs convert {path} --from trl --out pairs.jsonl` reads JSON arrays, CSV and folders of save_to_disk"
    return command if path.exists() and is_foreign(path) else ""


def _is_data(path: Path) -> bool:
    return path.name.endswith(SUFFIXES) and not path.name.startswith(".")
