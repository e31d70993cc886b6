"""The tiny model of the generator's tests, and a little world it half knows: who is named once in a text of no names."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from longpo_ops.evaluate import EvaluateRun
from tests.engines.conftest import model, tokenizer  # noqa: F401

NEEDLES = """
name: names
needle: " {value} walked along the pier at {key}."
question: "{key}: Who writes the log of the harbour?"
keys: [noon, dusk, night]
value: [Ann, Bob, Cleo, Dan, Eve, Finn]
max_tokens: 12
"""
BEGUN = NEEDLES.replace("name: names", "name: begun") + 'prefill: "By {key}"\n'
SENTENCES = (
    "The wind turned and the boats went home.",
    "The lamps of the old harbour were lit at dusk.",
    "The bell of the pier rings in winter.",
    "There were boats near the old pier that day.",
)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """text/ to hide needles in, held/ to read, needles/ with two tasks: `names`, and `begun` with a prefill."""
    folder, draw = tmp_path_factory.mktemp("world"), random.Random(0)
    for name, paragraphs in (("text/a.txt", 40), ("held/b.txt", 30), ("held/c.txt", 6)):
        (folder / name).parent.mkdir(exist_ok=True)
        words = "\n\n".join(" ".join(draw.choices(SENTENCES, k=4)) for _ in range(paragraphs))
        (folder / name).write_text(words)
    (folder / "needles").mkdir()
    (folder / "needles/names.yaml").write_text(NEEDLES)
    (folder / "needles/begun.yaml").write_text(BEGUN)
    return folder


@pytest.fixture
def settings(world, tmp_path, request):
    """settings(**changes): a run of `names`, by default with the tiny model in the transformers engine."""

    def make(**changes) -> EvaluateRun:
        if "endpoints" in changes:
            given = dict(model=request.getfixturevalue("tokenizer").name_or_path, engine="server", concurrency=8)
            given |= dict(timeout=5.0, patience=5.0)
        else:
            given = dict(model=str(request.getfixturevalue("model")))
        given |= dict(out=str(tmp_path / "out"), lengths=(96, 160), tasks=("names",), samples=6)
        given |= dict(needles=str(world / "needles"), texts=(str(world / "text"),))
        return EvaluateRun(**given | changes)

    return make
