"""Settings as people write them: YAML, in which numbers are numbers and words stay words until it is known what they are for.

    YAML --read_yaml, parse_yaml--> plain values, and Word for a plain yes, no, on or off
    names and values, the classes whose fields they are --settle--> flags where a flag is wanted, words elsewhere

YAML 1.1 takes `no` for false wherever it stands, `save_strategy: no` included, and 5e-7, which has no dot, for text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..text import read_text

FLAGS = {"yes": True, "on": True, "no": False, "off": False}
NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")


class Word(str):
    """A plain yes, no, on or off, in any of YAML's spellings: text, unless it stands where a flag is wanted."""

    @property
    def flag(self) -> bool:
        return FLAGS[self.lower()]


def read_yaml(path: str | Path, where: str = "") -> Any:
    """A file's value. Raises OSError, and ValueError, beginning with `where` or the path, for what is no YAML."""
    return _parsed(where or str(path), lambda: read_text(path))


def parse_yaml(text: str, where: str) -> Any:
    """The value of YAML. Raises ValueError, beginning with `where`, for text that is none."""
    return _parsed(where, lambda: text)


def _parsed(where: str, read: Callable[[], str]) -> Any:
    import yaml

    try:
        value = yaml.load(read(), _loader())
        json.dumps(value, skipkeys=True, default=str)  # an anchor that holds itself is a ValueError here
        return value
    except (
        yaml.YAMLError,
        RecursionError,
        ValueError,
    ) as error:  # no UTF-8, or a date that no month has, is a ValueError
        raise ValueError(f"{where}: no valid YAML: {error}") from None


def assigned(assignments: Iterable[str]) -> dict[str, Any]:
    """Values by name of texts "name=value", as --set has them, the value YAML. Raises ValueError for another text."""
    settings: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise ValueError(f"--set {assignment}: expected name=value")
        settings[name] = parse_yaml(value, f"--set {assignment}")
    return settings


def settle(values: dict[str, Any], *owners: type) -> dict[str, Any]:
    """Values by names of fields of `owners`, classes with annotations: a Word becomes a flag where its field takes one, and
    inside a field of names and values, whose own kinds nobody here knows; a quoted 1e-5 a number where one is wanted."""
    kinds = {name: kind for owner in owners for name, kind in get_type_hints(owner).items()}
    return {name: _settled(value, kinds.get(name)) for name, value in values.items()}


def _settled(value: Any, kind: Any) -> Any:
    if isinstance(value, Word):
        return value.flag if bool in (kind, *get_args(kind)) else str(value)
    if (
        isinstance(value, str)
        and NUMBER.match(value)
        and float in (kinds := (kind, *get_args(kind)))
        and str not in kinds
    ):
        return float(value)
    return _flags(value) if isinstance(value, dict) else value


def _flags(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _flags(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_flags(item) for item in value]
    return value.flag if isinstance(value, Word) else value


@cache
def _loader() -> type:
    import yaml

    known = {
        first: [(tag, form) for tag, form in found if tag != "tag:yaml.org,2002:bool"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    loader = type("Loader", (yaml.SafeLoader,), {"yaml_implicit_resolvers": known})
    words = "|".join(form for word in FLAGS for form in (word, word.title(), word.upper()))
    loader.add_implicit_resolver(
        "tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
    )
    loader.add_implicit_resolver("!word", re.compile(f"({words})$"), list("yYnNoO"))
    loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+0123456789"))
    loader.add_constructor("!word", lambda own, node: Word(own.construct_scalar(node)))
    return loader
