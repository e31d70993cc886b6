"""A little evolution of the tiny model of tests/engines, as settings and as a finished run."""

from __future__ import annotations

from pathlib import Path

import pytest

from longpo_ops.evolve import Evolution, evolve
from tests.engines.conftest import documents, model, tokenizer  # noqa: F401  (fixtures of this folder, too)

NEEDLES = """
name: keepers
needle: " {value} walked along the pier at noon. Nobody saw {value} near the boats that day, and {value}, who {key}, went home."
question: "Who {key}?"
keys: [writes the log of the harbour, counts the boats at night, mends the nets in winter, rings the bell]
value: [Ann, Bob, Cleo, Dan, Eve, Finn]
haystack: prose
max_tokens: 12
"""


@pytest.fixture(scope="session")
def make_settings(model, documents, tmp_path_factory):  # noqa: F811
    """make_settings(out, **changes of the first round): plain settings, as a YAML file gives them."""
    folder = tmp_path_factory.mktemp("needles")
    (folder / "keepers.yaml").write_text(NEEDLES)

    def make(out: Path, **changes) -> dict:
        sizes = dict(min_document=256, min_chunk=48, max_chunk=128, question_tokens=80, answer_tokens=24)
        first = {
            "name": "one",
            "length": 1024,
            "documents": str(documents),
            "rope_theta": 2e4,
            "generate": sizes | {"prompts": f"{model}/prompts", "max_documents": 3},
            "train": {
                "learning_rate": 1e-4,
                "gradient_accumulation_steps": 1,
                "max_steps": 4,
                "save_steps": 1,
                "use_cpu": True,
            },
        }
        evaluate = {
            "tasks": ["keepers"],
            "needles": str(folder / "keepers.yaml"),
            "texts": [str(documents)],
            "lengths": [128, 256],
            "samples": 4,
            "perplexity": [str(documents)],
        }
        bounds = [{"measure": "perplexity", "within": 1.0}, {"measure": "accuracy", "length": 256, "within": 1.0}]
        return {
            "model": str(model),
            "out": str(out),
            "evaluate": evaluate,
            "retention": bounds,
            "rounds": [first | changes],
        }

    return make


@pytest.fixture(scope="session")
def finished(make_settings, tmp_path_factory):
    """(settings, Result) of two rounds that nothing disturbed."""
    settings = make_settings(tmp_path_factory.mktemp("evolution") / "whole")
    first = settings["rounds"][0]
    second = {"name": "two", "rope_theta": 4e4, "generator": "base", "reference": "one"}
    second |= {"generate": first["generate"] | {"max_documents": 2}, "train": first["train"] | {"max_steps": 2}}
    settings["rounds"].append(first | second)
    return settings, evolve(Evolution.from_settings(settings))
