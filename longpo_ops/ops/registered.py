"""Classes of numbers that travel through registered operators: as a name and a list of floats.

    @dataclass(frozen=True, kw_only=True)
    class Mine(Registered): beta: float = 0.1        ->  "my_module:Mine", [0.1]  ->  Mine(beta=0.1)

torch.compile sees strings and numbers alone, and an operator makes the object again. A class is registered when it is made,
under its `name` or module:Class; what it computes is examined when an object is made, once for its numbers.

Not covered: fields that are no float, int or bool, and objects that keep a state.

Tests: tests/ops/test_objective.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import ClassVar

import torch

from ..kinds import check_flag, check_number, check_whole

# Of a field, by its annotation, which is text under `from __future__ import annotations`; others are floats.
KINDS = {bool: check_flag, int: check_whole, "bool": check_flag, "int": check_whole}
PYTHON = {bool: bool, int: int, "bool": bool, "int": int}
REGISTERED: dict[str, type[Registered]] = {}


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A frozen dataclass of numbers, found again by its name. Raises ValueError for a field that is no such number."""

    name: ClassVar[str] = ""  # module:Class, unless a class has its own
    method: ClassVar[str] = "losses"  # what a class defines that can be made

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "name" not in cls.__dict__:
            cls.name = f"{cls.__module__}:{cls.__qualname__}"
        if not hasattr(cls, cls.method):  # what others are made of
            return
        before = REGISTERED.setdefault(cls.name, cls)
        if (before.__module__, before.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"objective {cls.name!r}: {before.__qualname__} of {before.__module__} has that name")
        REGISTERED[cls.name] = cls

    def __post_init__(self):
        for field in fields(self):
            check = KINDS.get(field.type, check_number)
            value = check(f"{type(self).__name__}: {field.name}", getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if not hasattr(self, self.method):
            raise ValueError(f"{type(self).__name__}() has no {self.method}: expected an object of a subclass")
        self.check()
        if not torch.compiler.is_compiling():  # else when it is rebuilt within the operator
            _examined(type(self), tuple(self.parameters()))

    def check(self) -> None:
        """Raises ValueError for numbers that make no loss."""

    def examine(self) -> None:
        """Raises ValueError where it does not compute what it declares."""

    def refusal(self, name: str, expected: str) -> ValueError:
        """The error for one of the object's numbers."""
        return ValueError(f"{type(self).__name__}({name}={getattr(self, name)}): expected {expected}")

    def wrong(self, came: str, expected: str) -> ValueError:
        """The error for what it computes."""
        return ValueError(f"objective {self.name}: {came}; expected {expected}")

    def parameters(self) -> list[float]:
        return [float(getattr(self, field.name)) for field in fields(self)]


def _values(cls: type[Registered], parameters) -> dict[str, float | int | bool]:
    given = zip(fields(cls), parameters, strict=True)
    return {field.name: PYTHON.get(field.type, float)(value) for field, value in given}


def rebuild(name: str, parameters: list[float]) -> Registered:
    """The inverse of (name, parameters())."""
    cls = REGISTERED[name]
    return cls(**_values(cls, parameters))


@functools.lru_cache(maxsize=256)
def _examined(cls: type[Registered], parameters: tuple[float, ...]) -> None:
    made = object.__new__(cls)  # like the object that is being made, which __init__ would ask about again
    for name, value in _values(cls, parameters).items():
        object.__setattr__(made, name, value)
    made.examine()
