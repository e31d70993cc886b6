"""Rows of preference data as other programs store them: what `longpo pairs convert` reads.

    .jsonl[.gz|.zst], .parquet      as records.py reads them; a .json or .jsonl file may hold one JSON array instead
    .csv[.gz|.zst]                  the first row names the columns; a cell that is a list or an object in JSON is read as that
    a folder of save_to_disk        one split of the `datasets` library, memory-mapped
    a folder                        of such files, in order of their names

Memory: one row; a JSON array is held as a whole. Not covered: names of data sets on a hub, which `datasets` loads and saves to
disk.

Tests: tests/data/test_convert.py.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..kinds import shown
from ..text import decoded, one_line
from .records import OPENERS, SUFFIXES, BadRecord, read_records


class Cells(dict):
    """A row of a CSV: texts by column, which check_cells looks into."""


ROWS = (".json", ".csv", ".csv.gz", ".csv.zst")  # that read_records does not take
SPLITS, SPLIT = "dataset_dict.json", "dataset_info.json"  # what save_to_disk puts into its folders


def read_rows(path: Path) -> Iterator[tuple[str, str | dict]]:
    """Yield ('file:number', row) of every row at `path`; a JSON line is still text. Raises ValueError for a path without such
    files and for a file that is damaged; of several splits for all of them."""
    if (path / SPLITS).is_file():
        splits = json.loads((path / SPLITS).read_text(encoding="utf-8"))["splits"]
        raise ValueError(f"{path} holds several splits; give one: {', '.join(str(path / split) for split in splits)}")
    if (path / SPLIT).is_file():
        yield from _saved(path)
        return
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if _is_rows(file))
    if not files or not all(_is_rows(file) for file in files):
        came = "does not exist" if not path.exists() else "holds no such file" if path.is_dir() else "is another kind"
        raise ValueError(
            f"{path} {came}; expected a file ending in {', '.join((*SUFFIXES, *ROWS))}, a folder of such files, or one of "
            "save_to_disk"
        )
    for file in files:
        yield from _rows(file)


def is_foreign(path: Path) -> bool:
    """Whether a path holds rows that read_rows takes and read_records does not."""
    if path.is_dir():
        return any((path / name).is_file() for name in (SPLITS, SPLIT)) or any(map(is_foreign, path.iterdir()))
    return path.is_file() and path.name.endswith(ROWS) and not path.name.startswith(".") and path.name != SPLIT


def is_array(file: Path) -> bool:
    """Whether the text of a file begins as a JSON array does."""
    suffix = file.suffix if file.suffix in OPENERS else ""
    with decoded(OPENERS.get(suffix, open)(file, "rb")) as text:
        while piece := text.read(256):
            if stripped := piece.lstrip():
                return stripped[0] == "["
    return False


def _is_rows(path: Path) -> bool:
    return path.is_file() and path.name.endswith((*SUFFIXES, *ROWS)) and not path.name.startswith(".")


def _rows(file: Path) -> Iterator[tuple[str, str | dict]]:
    name = one_line(file.name)
    try:
        if file.name.endswith(".parquet"):
            yield from read_records(file)
        elif ".csv" in file.suffixes[-2:]:
            yield from ((f"{name}:{number}", row) for number, row in _csv(file))
        elif is_array(file):
            yield from ((f"{name}:{number}", row) for number, row in enumerate(_array(file), 1))
        elif file.suffix == ".json":
            with decoded(open(file, "rb")) as lines:
                yield from ((f"{name}:{number}", line) for number, line in enumerate(lines, 1) if line.strip())
        else:
            yield from read_records(file)
    except (csv.Error, EOFError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({error}); it is damaged or cut off, fetch it again") from error


def _array(file: Path) -> list[Any]:
    suffix = file.suffix if file.suffix in OPENERS else ""
    with decoded(OPENERS.get(suffix, open)(file, "rb")) as text:
        return json.load(text)


def _csv(file: Path) -> Iterator[tuple[int, Cells]]:
    csv.field_size_limit(sys.maxsize)  # a document is one cell
    suffix = file.suffix if file.suffix in OPENERS else ""
    with decoded(OPENERS.get(suffix, open)(file, "rb"), newline="") as text:
        rows = csv.reader(text, strict=True)
        names = next(rows, [])
        for number, cells in enumerate(filter(None, rows), 1):
            if len(cells) != len(names):
                yield number, Cells({"": f"{len(cells)} cells came, the first row names {len(names)} columns"})
            else:
                yield number, Cells(zip(names, cells, strict=True))


def check_cells(record: Cells, where: str) -> dict[str, Any]:
    """A row of a CSV: cells that hold JSON as what they say, without empty ones. BadRecord for a row of another length, and for
    cells that look like messages and are no JSON."""
    if "" in record and len(record) == 1:
        raise BadRecord(
            where, "row", "another number of cells", f"{record['']}; quote cells that hold commas or line breaks"
        )
    return {name: _cell(where, name, cell) for name, cell in record.items() if cell != ""}


def _cell(where: str, name: str, cell: Any) -> Any:
    inner = cell.strip() if isinstance(cell, str) else ""
    if (inner[:1], inner[-1:]) not in (("[", "]"), ("{", "}")):
        return cell
    try:
        return json.loads(inner)
    except (ValueError, RecursionError):
        if "role" in inner and "content" in inner:
            advice = f"{shown(cell)} came; expected them as JSON: write json.dumps(messages), or save JSON Lines"
            raise BadRecord(where, name, "messages that are no JSON", advice) from None
        return cell


def _saved(path: Path) -> Iterator[tuple[str, dict]]:
    from datasets import load_from_disk

    try:
        rows = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read ({error}); it is damaged or cut off, save it again") from error
    yield from ((f"{one_line(path.name)}:{number}", row) for number, row in enumerate(rows, 1))
