"""Runs of the generator over the little documents of tests/engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from longpo_ops.data import Pair, Turn
from longpo_ops.engines import server
from longpo_ops.generate import GenerateRun
from tests.engines.conftest import documents, model, tokenizer  # noqa: F401


@pytest.fixture
def settings(tokenizer, documents, tmp_path):  # noqa: F811
    """settings(**changes): a run over the little documents."""

    def make(**changes) -> GenerateRun:
        given = dict(
            model=tokenizer.name_or_path, documents=(str(documents),), length=1024, out=str(tmp_path / "pairs")
        )
        given |= dict(min_document=256, min_chunk=48, max_chunk=128, question_tokens=80, answer_tokens=24)
        if "endpoints" in changes:
            given |= dict(engine="server", timeout=5.0, patience=5.0, concurrency=8)
        given |= changes
        if (Path(given["model"]) / "prompts").exists():
            given["prompts"] = given["model"] + "/prompts"
        return GenerateRun(**given)

    return make


@pytest.fixture
def short_pauses(monkeypatch):
    """Between tries of a request."""
    monkeypatch.setattr(server, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(server, "LONGEST_PAUSE", 0.1)


@pytest.fixture
def pair() -> Pair:
    turn = Turn(
        "Why does the bell ring?", "The bell rings at noon.", "It rings at noon.", ("It rings at dusk, they say.",)
    )
    return Pair("one", "The bell rings at noon. The wind turns.", (turn,), {"source": "a.md"})
