"""Whether plain values, as a YAML file or a command line gives them, are of the kinds that a class's fields take.

Ranges, and which values go together, are for the class itself to check.
"""

from __future__ import annotations

from os import PathLike
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

PLAIN = {int, float, str, bool, dict, list, tuple, NoneType}


def check_kinds(values: dict[str, Any], owner: type, where: str = "") -> None:
    """values: by names of fields of `owner`, a class with annotations; where: what a message begins with.

    Raises ValueError for a value that is no number, text, flag, list or dict where one is wanted; fields of other kinds
    are not looked at. A list will do for a tuple, a whole number for any, a path for text.
    """
    kinds = get_type_hints(owner)
    for name, value in values.items():
        if name not in kinds:
            raise ValueError(f"{where}{name}: {owner.__name__} has no such setting")
        choices = get_args(kinds[name]) if get_origin(kinds[name]) in (Union, UnionType) else (kinds[name],)
        wanted = {get_origin(choice) or choice for choice in choices}
        if wanted <= PLAIN:
            wanted |= ({int} if float in wanted else set()) | ({list} if tuple in wanted else set())
            right = isinstance(value, (*wanted, PathLike) if str in wanted else tuple(wanted))
            if not right or (isinstance(value, bool) and bool not in wanted):
                names = sorted(kind.__name__ for kind in wanted - {NoneType})
                raise ValueError(f"{where}{name}={value!r}: expected {' or '.join(names)}")
