"""docs/evolve.md: its file is an evolution, its training settings are the config's, its options and files are there."""

from __future__ import annotations

import re
from pathlib import Path

import typer
import yaml

from longpo_ops.cli import app
from longpo_ops.evolve import Evolution
from longpo_ops.generate import GenerateRun
from longpo_ops.train.run import TrainRun

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs/evolve.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOC, re.DOTALL)


def test_the_documented_file_is_an_evolution(tmp_path):
    (block,) = blocks("yaml")
    (tmp_path / "run.yaml").write_text(block)
    evolution = Evolution.from_file(tmp_path / "run.yaml")
    assert evolution.rounds[0].train["learning_rate"] == 5e-7 and len(evolution.retention) == 3


PLANNED = ("fit", "allow_lossy")


def test_training_by_hand_is_the_ready_configs():
    (text,) = re.findall(r"<<'END'\n(.*?)END\n", DOC, re.DOTALL)
    by_hand = yaml.safe_load(text.replace("5e-7", "5.0e-7"))
    run, evolution = TrainRun.from_settings(by_hand), Evolution.from_file(ROOT / "examples/evolve/mistral-7b.yaml")
    first = evolution.rounds[0]
    pairs = GenerateRun(
        evolution.model, first.documents, first.length, "pairs", recipe=evolution.recipe, **first.generate
    )
    assert run.config().gradient_accumulation_steps == 8 and run.max_position_embeddings == pairs.sequence_length
    assert run.title == evolution.recipe == pairs.title
    same = {name: value for name, value in first.train.items() if name not in PLANNED}
    assert same.items() <= by_hand.items() and by_hand["rope_theta"] == first.rope_theta


def test_documented_options_and_files_are_there():
    commands = typer.main.get_command(app).commands
    text = "\n".join(blocks("sh")).replace("\\\n", " ")
    calls = re.findall(r"^longpo (\w+) (.*)$", text, re.MULTILINE)
    assert {"plan", "evolve", "evaluate"} <= {name for name, _ in calls}
    for name, arguments in calls:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", arguments)) <= known
    for path in re.findall(r"(?:examples|docs)/[\w./-]+\w", DOC):
        assert (ROOT / path).exists(), path
