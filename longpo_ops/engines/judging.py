"""A model that rates answers: what it is asked with, and what its words say.

    prompt --judge, greedy--> text --rating--> 0.1 to 1, or None where it gives no rating

Tests: tests/generate/test_judge.py, tests/evaluate/test_published.py.
"""

from __future__ import annotations

import re

from .fields import check_fields
from .server import ServerEngine

JUDGE_TOKENS = 1024
SELF = "self"  # in the place of a URL: the model that answered


def rating(text: str) -> float | None:
    """The last [[rating]] of what a judge says, as a score from 0.1 to 1; None without any."""
    found = re.findall(r"\[\[[^\]\d]*(\d+(?:\.\d+)?)[^\]]*\]\]", text)
    return float(found[-1]) / 10 if found and 1 <= float(found[-1]) <= 10 else None


def judge_engine(run) -> ServerEngine:
    """The judge at `run.judge`, not started; run: settings with a judge's."""
    limits = dict(timeout=run.timeout, patience=run.patience, key_variable=run.judge_key_variable)
    options = dict(options=run.judge_options, flag="--judge-option")
    return ServerEngine((run.judge,), run.judge_model, run.concurrency, **limits, **options)


def check_judge(run) -> None:
    """Raises ValueError for settings of a judge that make no sense; run: EngineSettings with a judge's."""
    if run.judge not in (None, SELF):
        run.check_server("judge", (run.judge,), run.judge_key_variable)
    check_fields(run.judge_options or {}, "--judge-option")
    if run.judge in (None, SELF) and (run.judge_model or run.judge_options):
        raise ValueError("judge_model or judge_options without a judge's server; expected its URL as judge, too")
