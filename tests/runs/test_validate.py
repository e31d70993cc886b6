"""Kinds of settings: what is of the wanted kind passes, what is not is named."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from transformers import SchedulerType

from longpo_ops.runs.validate import check_kinds


@dataclass
class Settings:
    name: str
    rate: float | None
    steps: int
    flag: bool
    lengths: tuple[int, ...]
    other: Path
    free: dict | None = None
    names: tuple[str, ...] = ()
    schedule: SchedulerType | str = "cosine"


@pytest.mark.parametrize(
    "values",
    [
        {"name": "x", "rate": 1, "steps": 2, "flag": True, "lengths": [1, 2]},
        {"name": SchedulerType.COSINE, "rate": np.float64(0.5), "lengths": (1,)},
        {"name": Path("folder"), "rate": None, "other": 3},
        {"schedule": "linear", "names": ["a"], "free": {"a": [1.5, "nan"]}},
        {"schedule": SchedulerType.LINEAR, "names": ("a", "b"), "free": None},
    ],
)
def test_right_kinds_pass(values):
    check_kinds(values, Settings)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"name": 3}, "name=3: expected str"),
        ({"rate": "fast"}, "rate='fast': expected float or int"),
        ({"steps": 1.5}, r"steps=1\.5: expected int"),
        ({"steps": True}, "steps=True: expected int"),
        ({"flag": 1}, "flag=1: expected bool"),
        ({"lengths": "1,2"}, "lengths='1,2': expected list or tuple"),
        ({"rate": float("nan")}, "rate=nan: expected a finite number"),
        ({"rate": np.float64("-inf")}, ".*inf.*: expected a finite number"),
        ({"steps": float("inf")}, "steps=inf: expected a finite number"),
        ({"free": {"theta": [1.0, float("nan")]}}, r"free={'theta': \[1.0, nan\]}: expected finite numbers"),
        ({"names": ["a", 1]}, r"names=\['a', 1\]: expected texts"),
        ({"names": "abc"}, "names='abc': expected list or tuple"),
        ({"schedule": False}, "schedule=False: expected one of linear, cosine, "),
        ({"schedule": "cosin"}, "schedule='cosin': expected one of linear, cosine, "),
        ({"nonsense": 1}, "nonsense: Settings has no such setting"),
    ],
)
def test_wrong_kinds_are_named(values, message):
    with pytest.raises(ValueError, match=f"^there: {message}"):
        check_kinds(values, Settings, "there: ")
