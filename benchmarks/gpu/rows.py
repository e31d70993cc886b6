"""A row of the report: what it costs, before anything of it is allocated, and how it is computed.

A Row is cheap to make and says what it will take; `perform` computes it. Results are dicts with a "status": passed | measured |
failed: why | skipped: why. Times are of the card that the setting names.

Tests: tests/benchmarks/gpu/test_check.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from .setting import Setting


class Row(NamedTuple):
    """One line of the report. `what`, `backend` and `case` are unique within their question."""

    what: str
    case: str
    compute: Callable[[int], dict]  # seed -> the result
    backend: str = ""
    seconds: float = 0.3  # that it should take, the compiles that nobody can carry among them
    device_bytes: int = 0  # of the device at most, weights and all
    host_bytes: int = 0

    @property
    def key(self) -> list[str]:
        return [self.what, self.backend, self.case]

    @property
    def name(self) -> dict[str, str]:
        return dict(zip(("what", "backend", "case"), self.key, strict=True))

    def shortage(self, setting: Setting) -> str | None:
        """Which memory of the machine does not hold it."""
        if self.device_bytes > setting.device_bytes:
            return f"memory: it takes {self.device_bytes / 2**30:.1f} GiB of the device"
        if self.host_bytes > setting.host_bytes:
            return f"memory: it takes {self.host_bytes / 2**30:.1f} GiB of the host"
        return None


def unavailable(what: str, backend: str, case: str, reason: str) -> Row:
    """A row that is told instead of computed."""
    return Row(what, case, lambda seed: {"status": reason}, backend, seconds=0.0)


def perform(row: Row, seed: int = 0) -> dict:
    """row.compute(seed), or the failure in words: one case that breaks does not hide the others."""
    try:
        return row.compute(seed)
    except torch.OutOfMemoryError:
        return {"status": "failed: out of memory"}
    except Exception as error:  # whatever it is belongs in the report
        return {"status": f"failed: {type(error).__name__}: {error}"[:500]}


def results(rows: Iterable[Row]) -> Iterator[dict]:
    """Every row computed, here and now."""
    return (row.name | perform(row) for row in rows)
