"""Packages whose public names are loaded with their modules at first use: importing one costs nothing.

Tests: tests/test_packaging.py.
"""

import importlib
import sys
from collections.abc import Callable


def public_names(package: str, modules: dict[str, tuple[str, ...]]) -> tuple[list[str], Callable, Callable]:
    """-> __all__, __getattr__ and __dir__ of a package. modules: names by the submodule that they come from."""
    home = {name: module for module, names in modules.items() for name in names}

    def __getattr__(name: str):
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        setattr(sys.modules[package], name, value)  # then a plain attribute, which torch.compile can trace
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home})

    return list(home), __getattr__, __dir__
