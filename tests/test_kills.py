"""The short form of tests/kills.py: two kills of each command that takes seconds, just before operations on files."""

from __future__ import annotations

import random

import pytest

from tests.engines.conftest import model  # noqa: F401
from tests.kills import commands


@pytest.mark.parametrize("name", ["train-constraint", "generate", "evaluate", "merge"])
def test_a_command_that_is_killed_ends_with_the_files_of_one_that_is_not(name, model, tmp_path):  # noqa: F811
    (command,) = (each for each in commands(tmp_path, model) if each.name == name)
    command.measure()
    assert command.trial(random.Random(name), most=2, timed=False)
