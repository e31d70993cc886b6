"""A user's own needle tasks, written as YAML files:

name: codes
needle: " The code: {key} {value}."     between sentences as it is written here, leading space included
question: "What is the code of {key}?"  several asked keys become "a, b, and c"
keys: [Alice, Bob, Cleo]                or words, uuids, {digits: 7}
value: {digits: 4}                      or a list, words, uuids
every: 110                              or needles_per_sample: 4

Tests: tests/evaluate/test_needles.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path

from ..runs.settings_file import read_yaml
from .needles import NeedleTask
from .tasks import LOADED, TASKS


def load_tasks(path: str | Path) -> dict[str, NeedleTask]:
    """The needle tasks of a YAML file, or of all of a folder, by name; `make_samples` knows them from then on.

    Raises ValueError for files that are no YAML or no needle task, and for a name that is taken.
    """
    path = Path(path)
    files = sorted({*path.glob("*.yaml"), *path.glob("*.yml")}) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"no needle tasks in {path}; expected files ending in .yaml")
    found: dict[str, NeedleTask] = {}
    for file in files:
        task = _load(file)
        if task.name in found:
            raise ValueError(f"{file}: the name {task.name!r} is another file's too; name them apart")
        found[task.name] = task
    LOADED.update(found)
    return found


def _load(file: Path) -> NeedleTask:
    try:
        given = read_yaml(file)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{file}: expected the fields of a needle task, such as name, needle and question")
    known = {field.name: field.default is MISSING for field in fields(NeedleTask)}
    if unknown := sorted(str(name) for name in given if name not in known):
        raise ValueError(f"{file}: unknown {', '.join(unknown)}; the fields are {', '.join(known)}")
    if missing := [name for name, required in known.items() if required and name not in given]:
        raise ValueError(f"{file}: {', '.join(missing)} missing; a needle task has at least "
                         f"{', '.join(name for name, required in known.items() if required)}")  # fmt: skip
    if "every" in given and "needles_per_sample" in given:
        raise ValueError(f"{file}: both every and needles_per_sample; give one of them")
    if given["name"] in TASKS:
        raise ValueError(f"{file}: {given['name']!r} is one of RULER's tasks; take another name")
    kinds = {name: _kind(given[name]) for name in ("keys", "value")}
    try:
        return NeedleTask(**given | kinds)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _kind(value):
    if isinstance(value, Mapping) and set(value) == {"digits"}:
        return value["digits"]
    return tuple(value) if isinstance(value, list) else value
