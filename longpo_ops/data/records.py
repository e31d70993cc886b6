"""Records of JSON Lines and Parquet files, one at a time, and what becomes of bad ones.

Files are read through `datasets` in streaming mode: memory is a few records (Parquet) or 10 MiB of text (JSON Lines)
whatever the size of the set. JSON Lines are parsed line by line here, so that one malformed line is one bad record and
not an unreadable file. Not covered: JSON arrays, CSV, and files that are not local. Documents are read by
documents/readers.py.

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

from ..kinds import check_choice, check_object

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
RECORDS_PER_GROUP = 16  # a record can hold megabytes of text, and readers load a row group at a time

T = TypeVar("T")


class BadRecord(ValueError):
    """A record that cannot be trained on. `reason` is the short form that a skipping reader counts."""

    def __init__(self, record_id: str, field_name: str, reason: str, advice: str):
        super().__init__(f"record {record_id!r}, {field_name}: {reason}; {advice}")
        self.record_id, self.field, self.reason = record_id, field_name, reason


@dataclass
class DataReport:
    """What happened while a set was read; pass one object through reading and tokenising, then print it."""

    read: int = 0
    kept: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # reason -> records
    cut_documents: int = 0
    cut_tokens: int = 0
    trimmed_contents: int = 0  # contents whose outer whitespace the chat template takes away
    piecewise_pairs: int = 0  # pairs whose answers had to be tokenised on their own (chat.py)

    def __str__(self) -> str:
        lines = [f"{self.kept} of {self.read} records kept"]
        lines += [f"  {count} skipped: {reason}" for reason, count in self.skipped.most_common()]
        if self.cut_documents:
            lines.append(f"  {self.cut_documents} documents cut by {self.cut_tokens} tokens in all")
        if self.trimmed_contents:
            lines.append(f"  {self.trimmed_contents} contents trimmed as the chat template does")
        if self.piecewise_pairs:
            lines.append(f"  {self.piecewise_pairs} pairs tokenised piecewise")
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
            if on_bad_record == "raise":
                raise
            report.skipped[bad.reason] += 1
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
        raise ValueError(f"{path} {came}; expected a file ending in {', '.join(SUFFIXES)}, or a folder of such files")
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


def _records(file: Path) -> Iterator[tuple[str, str | dict]]:
    if file.suffix == ".parquet":
        from datasets import load_dataset

        records = load_dataset(
            "parquet", data_files=str(file), split="train", streaming=True, batch_size=RECORDS_PER_GROUP
        )
        yield from ((f"{file.name}:{number}", record) for number, record in enumerate(records, 1))
    else:
        for number, line in enumerate(_zstd_lines(file) if file.suffix == ".zst" else _lines(file), 1):
            if line.strip():
                yield f"{file.name}:{number}", line


def _lines(file: Path) -> Iterator[str]:
    """Bytes that are no UTF-8 become \\xff escapes, which JSON does not know: one bad record, not a bad file."""
    from datasets import load_dataset

    given = dict(data_files=str(file), split="train", streaming=True, encoding_errors="backslashreplace")
    yield from (record["text"] for record in load_dataset("text", **given))


def _zstd_lines(file: Path) -> Iterator[str]:
    """The same through pyarrow: what `datasets` uses takes the end of a file that was cut off for its end."""
    import pyarrow

    stream = io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))
    with io.TextIOWrapper(stream, encoding="utf-8", errors="backslashreplace") as lines:
        yield from lines


def parse_record(record: str | dict, where: str) -> dict:
    """A record as a dict without empty columns. BadRecord for text that is no JSON object."""
    if isinstance(record, str):
        try:
            record = json.loads(record)
        except (ValueError, RecursionError) as error:
            raise BadRecord(where, "line", "no valid JSON", f"{error}; expected one object per line") from None
    if not isinstance(record, dict):
        came = type(record).__name__
        raise BadRecord(where, "line", "no JSON object", f"a {came} came; expected one object per line")
    return {name: value for name, value in record.items() if value is not None}


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
    """Raises ValueError for a NaN or an infinity, which JSON has not."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
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


def _is_data(path: Path) -> bool:
    return path.name.endswith(SUFFIXES) and not path.name.startswith(".")
