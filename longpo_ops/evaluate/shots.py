"""Tasks of lm-evaluation-harness with their shots and metric, and sets of them that have a name.

    "arc_challenge:25:acc_norm" --parse--> HarnessTask(task, shots, metric)     TASK[:SHOTS][:METRIC]
    short: official             --------> the published recipe's four tasks of short contexts

What is asked for is the name of its number, so two runs with other shots or another metric never have a number of the
same name. Needs no harness to be installed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..text import read_text

# The published tables name the tasks. Shots and metrics are the first Open LLM Leaderboard's (docs/evaluate.md).
SHORT: dict[str, tuple[str, ...]] = {
    "official": ("mmlu:5:acc", "arc_challenge:25:acc_norm", "hellaswag:10:acc_norm", "winogrande:5:acc")
}


@dataclass(frozen=True)
class HarnessTask:
    """task: a name, or a YAML file. shots: solved examples before each question; None: the task's own number.
    metric: which one is the task's number; None: acc, exact_match, f1, em, else its first.
    """

    task: str
    shots: int | None = None
    metric: str | None = None

    @classmethod
    def parse(cls, text: str) -> HarnessTask:
        """Of TASK[:SHOTS][:METRIC]. Raises ValueError for what is no text."""
        found = re.fullmatch(r"(.+?)(?::(\d+))?(?::([A-Za-z]\w*))?", text) if isinstance(text, str) else None
        if found is None:
            raise ValueError(
                f"harness has {text!r}; expected TASK, TASK:SHOTS or TASK:SHOTS:METRIC, such as mmlu:5:acc"
            )
        task, shots, metric = found.groups()
        return cls(task, None if shots is None else int(shots), metric)

    @property
    def is_file(self) -> bool:
        return self.task.endswith((".yaml", ".yml"))

    def label(self, name: str) -> str:
        """What a number is called in the results: the harness's name of it, and what was asked for."""
        asked = [str(each) for each in (self.shots, self.metric) if each is not None]
        return ":".join([name, *asked])

    def named(self) -> str:
        """The name of its number. Raises ValueError for a file that cannot be read or names no task."""
        return self.label(_name_in(Path(self.task)) if self.is_file else self.task)


def harness_tasks(short: str | None, harness: Sequence[str]) -> tuple[HarnessTask, ...]:
    """The tasks of a named set, then further ones, each once. Raises ValueError for a set that is none."""
    if short is not None and (not isinstance(short, str) or short not in SHORT):
        raise ValueError(f"short is {short!r}; expected {', '.join(SHORT)}, or none")
    return tuple(dict.fromkeys(HarnessTask.parse(each) for each in (*SHORT.get(short, ()), *harness)))


def harness_names(evaluation: Mapping[str, Any]) -> tuple[str, ...]:
    """The names in Scores.harness of what fields of EvaluateRun ask for. Raises ValueError as `harness_tasks`."""
    tasks = harness_tasks(evaluation.get("short"), evaluation.get("harness") or ())
    return tuple(each.named() for each in tasks)


def _name_in(file: Path) -> str:
    try:
        text = read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"harness: {file} cannot be read ({error})") from None
    found = re.search(r"^task:[ \t]*[\"']?([\w.-]+)", text, re.MULTILINE)
    if found is None:
        raise ValueError(
            f"harness: {file} has no line task: NAME; expected the file of a task, a group is asked for by its name"
        )
    return found[1]
