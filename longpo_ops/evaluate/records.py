"""Records of published files: read, parsed, and checked for what they must have.

Tests: tests/evaluate/test_published.py, tests/evaluate/test_mt_bench.py.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..text import read_text as read


def read_text(file: Path) -> str:
    """Raises ValueError for a file that cannot be read."""
    try:
        return read(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def loads(text: str, where: str):
    """What JSON text holds. Raises ValueError for text that is none."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: no valid JSON: {error}") from error


def read_lines(file: Path) -> list[tuple[object, str]]:
    """The JSON of every line that is not empty, and where it is. Raises ValueError for none and for lines that are none."""
    places = ((line, f"{file}, line {number}") for number, line in enumerate(read_text(file).split("\n"), 1))
    records = [(loads(line, where), where) for line, where in places if line.strip()]
    if not records:
        raise ValueError(f"{file} has no records")
    return records


def check_record(record: object, needed: dict, where: str) -> None:
    """Raises ValueError for a record that is no object, or lacks a field or has one of another type."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with {', '.join(needed)}")
    if wrong := [name for name, kind in needed.items() if not isinstance(record.get(name), kind)]:
        raise ValueError(f"{where}: {', '.join(wrong)} missing or of another type; expected {', '.join(needed)}")
