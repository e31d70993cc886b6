"""The table of recipes: what is filled in, what contradicts, and what it is called then."""

from __future__ import annotations

import pytest

from longpo_ops.recipes import RECIPES, Either, fill, tell, title


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


@pytest.mark.parametrize("name", ["offical", None, 3, ["official"]])
def test_a_recipe_that_is_none(name):
    with pytest.raises(ValueError, match="expected one of default, official"):
        fill(name, "generate", {})
