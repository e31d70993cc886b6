"""The recipes side by side: what the published one sets, and what ours does. docs/recipe.md says why they differ.

    what a user gives --fill(recipe, stage)--> the settings of the stage, and which given ones contradict the recipe

official   what the authors' code, command line and model cards do (arXiv 2502.13922 and its repository)
default    what we think better, the same where nothing is said

What no number says (how a document is parted, how a list of questions is read, which answers are filtered) is in
generate/makers.py under the same names.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

DEFAULT, OFFICIAL = "default", "official"

log = logging.getLogger("longpo_ops.recipes")


class Either(tuple):
    """Values that published sources give for one setting; the first is taken, the others are no change."""

    def __new__(cls, *values: Any) -> Either:
        return super().__new__(cls, values)


RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    DEFAULT: {
        "generate": {
            "chunks": 4,
            "questions": 4,
            "question_tokens": 512,
            "answer_tokens": 1024,
            "temperature": 0.7,
            "top_p": 0.9,
            "answer_temperature": 0.0,
            "answer_top_p": 1.0,
            "min_words": 3,
            "max_repeated": 0.4,
            "max_repeated_rejected": 0.4,
            "max_overlap": 0.9,
        },
        "train": {"nll_tokens": "contents"},
    },
    OFFICIAL: {
        "generate": {
            "chunks": 2,
            "questions": 4,
            "min_chunk": 16384,
            "max_chunk": 30000,
            "min_document": 65536,
            "question_tokens": 1024,
            "answer_tokens": 1024,
            "temperature": 0.7,
            "top_p": 0.9,
            "answer_temperature": 1.0,
            "answer_top_p": 1.0,
            "min_words": 2,
            "max_repeated": 0.9,
            "max_repeated_rejected": 0.95,
            # What only the length, the filters above and the model's own theta leave out.
            "max_document": None,
            "join": None,
            "max_overlap": None,
            "short_rope": None,
            # A judge is ours alone.
            "judge": None,
            "min_faithfulness": None,
        },
        "train": {
            "objective": "longpo",
            "objective_options": {"beta": Either(0.01, 0.1), "preference_weight": 0.01},  # command line, paper
            "optim": Either("rmsprop", "adamw_torch", "adamw_torch_fused"),  # command line, paper
            "learning_rate": 5e-7,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
            "weight_decay": 0.0,
            "gradient_accumulation_steps": 8,
            "num_train_epochs": 1,
            "max_grad_norm": 1.0,
            "nll_tokens": "all",
            "rope_theta": 1e7,  # of the policy
            "seed": 42,
            "train_sampling_strategy": "random",
            # What a step's eight single sequences, one epoch and all weights leave out.
            "max_steps": -1,
            "pack_tokens": None,
            "target_length": Either(None, 0),
            "lora_rank": 0,
            "allow_lossy": "nothing",
            "cut_document": False,
            "system": None,
            "lr_scheduler_kwargs": None,
            "optim_args": None,
            "optim_target_modules": None,
            "adam_beta1": 0.9,
            "adam_beta2": 0.999,
            "adam_epsilon": 1e-8,
            "data_seed": Either(None, 42),
            "dataloader_drop_last": False,
            "neftune_noise_alpha": None,
        },
    },
}


def check_recipe(name: Any) -> str:
    """The name of a recipe. Raises ValueError for one that is none."""
    if not isinstance(name, str) or name not in RECIPES:
        raise ValueError(f"recipe is {name!r}; expected one of {', '.join(RECIPES)}")
    return name


def fill(recipe: str, stage: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """-> the recipe's settings of a stage under the given ones, and the names of given ones that the published recipe
    contradicts; ours contradicts none. Raises ValueError for a recipe that is none.
    """
    wanted = RECIPES[check_recipe(recipe)].get(stage, {})
    settings = {name: _under(value, given.get(name)) for name, value in wanted.items()}
    changed = [name for name, value in given.items() if name in wanted and not _agrees(wanted[name], value)]
    return dict(given) | settings, tuple(sorted(changed)) if recipe == OFFICIAL else ()


def title(recipe: str, changed: tuple[str, ...] = ()) -> str:
    """What receipts and cards call it: "official", or "official with changes (chunks, temperature)"."""
    return f"{recipe} with changes ({', '.join(changed)})" if changed else recipe


def tell(recipe: str, stage: str, given: Mapping[str, Any], changed: tuple[str, ...]) -> str:
    """A sentence about each given setting that contradicts the recipe; empty without any."""
    wanted = RECIPES[recipe].get(stage, {})
    told = [f"{name} is {_words(wanted[name])} in the recipe, {given[name]!r} came" for name in changed]
    return f"{'; '.join(told)}: this is recipe {title(recipe, changed)!r}" if told else ""


@functools.cache
def warn(told: str) -> None:
    """What `tell` says, if anything, as a warning: once in a process, however often its run is made or copied."""
    if told:
        log.warning("%s", told)


def _under(wanted: Any, given: Any) -> Any:
    if isinstance(wanted, dict):
        return {name: _under(value, None) for name, value in wanted.items()} | (given or {})
    if given is not None:
        return given
    return wanted[0] if isinstance(wanted, Either) else wanted


def _agrees(wanted: Any, given: Any) -> bool:
    if isinstance(wanted, dict):
        return all(name in wanted and _agrees(wanted[name], value) for name, value in given.items())
    return given in wanted if isinstance(wanted, Either) else given == wanted


def _words(wanted: Any) -> str:
    if isinstance(wanted, dict):
        return ", ".join(f"{name} {_words(value)}" for name, value in wanted.items())
    return " or ".join(map(repr, wanted)) if isinstance(wanted, Either) else repr(wanted)
