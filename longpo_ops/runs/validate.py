"""Whether plain values, as a YAML file or a command line gives them, are of the kinds that a class's fields take.

Numbers are finite, wherever they stand. Ranges, and which values go together, are for the class itself to check.
"""

from __future__ import annotations

import math
from enum import Enum
from os import PathLike
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

ADDRESSES = ("endpoints", "long_endpoints", "judge")  # of servers, which may hold keys: no message repeats them
PLAIN = {int, float, str, bool, dict, list, tuple, NoneType}


def check_kinds(values: dict[str, Any], owner: type, where: str = "") -> None:
    """values: by names of fields of `owner`, a class with annotations; where: what a message begins with.

    Raises ValueError for a value that is no number, text, flag, list or dict where one is wanted, for a word that is none of
    an Enum's where one is wanted, and for a number that is not finite, in lists and dicts too; fields of other kinds are not
    looked at. A list will do for a tuple, a whole number for any, a path for text.
    """
    kinds = get_type_hints(owner)
    for name, value in values.items():
        if name not in kinds:
            raise ValueError(f"{where}{name}: {owner.__name__} has no such setting")
        if expected := _expected(value, kinds[name]):
            came = f": a {type(value).__name__} came;" if name in ADDRESSES else f"={value!r}:"
            raise ValueError(f"{where}{name}{came} expected {expected}")


def _expected(value: Any, kind: Any) -> str | None:
    """What a value of this kind should have been, or None where it is of it."""
    choices = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    wanted = {get_origin(choice) or choice for choice in choices}
    if words := [word.value for choice in wanted if _is_enum(choice) for word in choice]:
        return None if value in words else f"one of {', '.join(words)}"
    if not _finite(value):
        return "a finite number" if isinstance(value, float) else "finite numbers"
    if not wanted <= PLAIN:
        return None
    wanted |= ({int} if float in wanted else set()) | ({list} if tuple in wanted else set())
    right = isinstance(value, (*wanted, PathLike) if str in wanted else tuple(wanted))
    if right and isinstance(value, list | tuple) and (str, ...) in map(get_args, choices):
        return None if all(isinstance(each, str) for each in value) else "texts"
    if right and (bool in wanted or not isinstance(value, bool)):
        return None
    return " or ".join(sorted(each.__name__ for each in wanted - {NoneType}))


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _finite(value: Any) -> bool:
    """Whether every number in a value is."""
    if isinstance(value, dict | list | tuple):
        return all(map(_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)
