"""gpu_check.json as what a person reads.

Tests: tests/benchmarks/gpu/test_report.py.
"""

from __future__ import annotations

from collections import Counter


def summary(content: dict) -> str:
    """The table that is printed last: per question how many rows passed, were measured, were skipped and failed."""
    counts: dict[str, Counter] = {}
    for row in content["rows"]:
        counts.setdefault(row["question"], Counter())[row["status"].partition(":")[0]] += 1
    return "\n".join(f"{name}: " + ", ".join(f"{n} {s}" for s, n in found.items()) for name, found in counts.items())
