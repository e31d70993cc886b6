"""The table of recipes: what is filled in, what contradicts, and what it is called then."""

from __future__ import annotations

from dataclasses import fields

import pytest

from longpo_ops.engines.settings import EngineSettings
from longpo_ops.generate import GenerateRun
from longpo_ops.recipes import RECIPES, Either, fill, tell, title
from longpo_ops.train.identity import DECIDING


def test_what_is_not_given_is_the_recipes():
    settings, changed = fill("official", "train", {"save_steps": 5, "optim": "adamw_torch"})
    assert settings["objective_options"] == {"beta": 0.01, "preference_weight": 0.01}
    assert (settings["optim"], settings["save_steps"], changed) == ("adamw_torch", 5, ())
    assert fill("official", "generate", {})[0] == RECIPES["official"]["generate"]
    assert not any(isinstance(value, Either) for value in fill("official", "train", {})[0].values())


def test_what_contradicts_is_told_and_named():
    given = {"learning_rate": 1e-6, "objective_options": {"beta": 0.2}, "seed": 42}
    settings, changed = fill("official", "train", given)
    assert changed == ("learning_rate", "objective_options") and settings["learning_rate"] == 1e-6
    assert settings["objective_options"] == {"beta": 0.2, "preference_weight": 0.01}
    assert title("official", changed) == "official with changes (learning_rate, objective_options)"
    told = tell("official", "train", given, changed)
    assert "learning_rate is 5e-07 in the recipe, 1e-06 came" in told and "beta 0.01 or 0.1" in told
    assert fill("official", "train", {"objective_options": {"beta": 0.1}})[1] == ()
    assert fill("official", "train", {"objective_options": {"label_smoothing": 0.1}})[1] == ("objective_options",)
    assert fill("default", "generate", {"chunks": 9})[1] == () and title("default") == "default"
    assert tell("official", "train", {}, ()) == ""


def test_every_setting_that_decides_is_judged():
    """A setting that no table names would change what is made or trained, and the title would still say official."""
    train, generate = RECIPES["official"]["train"], RECIPES["official"]["generate"]
    own = {
        "max_position_embeddings",
        "max_length",
        "lora_alpha",
        *("lora_dropout", "lora_target_modules", "lora_target_parameters", "use_rslora", "quantization"),
        "template_kwargs",  # of the model's own template, as in generate
        "dtype",
        "constraint_weight",
    }
    own |= {"bf16", "fp16", "tf32", "ignore_data_skip", "accelerator_config"}  # of the machine, and of other methods
    own |= {"separate", "sparse_hidden_gradient"}  # of the model: same losses; off where it is not asked for
    assert {*DECIDING["run"], *DECIDING["config"]} - set(train) == own
    numbers = {f.name for f in fields(GenerateRun) if f.default is None} - {"prompts", "rope", "max_documents"}
    numbers -= {"judge_model", "judge_options"}  # of a judge, which is a change by itself
    assert numbers - {f.name for f in fields(EngineSettings)} - set(generate) == set()


@pytest.mark.parametrize(
    ("stage", "name", "value"),
    [
        ("generate", "max_overlap", 0.9),
        ("generate", "max_document", 90000),
        ("generate", "short_rope", {"rope_theta": 1e7}),
        ("train", "cut_document", True),
        ("train", "adam_beta2", 0.95),
        ("train", "data_seed", 3),
        ("train", "dataloader_drop_last", True),
    ],
)
def test_what_the_recipe_leaves_out_is_a_change(stage, name, value):
    assert fill("official", stage, {name: value})[1] == (name,)


@pytest.mark.parametrize("name", ["offical", None, 3, ["official"]])
def test_a_recipe_that_is_none(name):
    with pytest.raises(ValueError, match="expected one of default, official"):
        fill(name, "generate", {})
