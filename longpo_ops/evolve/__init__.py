"""Self-evolution: a model makes its own long-context pairs, trains on them, is measured, and starts again from there.

rounds of: pairs --> train --> evaluate --(short contexts retained?)--> promoted: the next round's start

The public names, loaded with their modules at first use: training is heavy.
"""

import importlib

_HOME = {
    name: module
    for module, names in {
        "settings": ("Bound", "Evolution", "Round"),
        "stages": ("Stage", "plan"),
        "results": ("Result",),
        "run": ("evolve",),
    }.items()
    for name in names
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
