"""What an evaluation keeps of every sample beside the means, so that two runs can be compared sample by sample.

    answers.jsonl    id, task, length, asked, references, answer, score, ..   a line per sample of tasks and published files
    values.jsonl     of, id, asked, value                                    a line per window of a perplexity (`of`
                     perplexity/LENGTH, nats a token) and per question of the harness (harness/TASK, its metric)

`asked` is a digest of the prompt, the window's token ids, or the harness's document: equal ones were asked the same.

Tests: tests/evaluate/test_comparison.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..runs.journal import write_text

ANSWERS, VALUES = "answers.jsonl", "values.jsonl"


def digest(text: str) -> str:
    """Of what was asked."""
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """A line of JSON each."""
    write_text(path, "".join(json.dumps(each, ensure_ascii=False, allow_nan=False) + "\n" for each in records))


def read_lines(path: Path, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    """What `write_lines` wrote; none without the file. Raises ValueError for a line that is none or lacks a field."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: no valid JSON ({error}); run the evaluation again") from None
        if not isinstance(record, dict) or not all(name in record for name in needed):
            raise ValueError(f"{path}, line {number}: expected {', '.join(needed)}; run the evaluation again")
        records.append(record)
    return records
