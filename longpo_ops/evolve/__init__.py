"""Self-evolution: a model makes its own long-context pairs, trains on them, is measured, and starts again from there.

rounds of: pairs --> train --> evaluate --(short contexts retained?)--> promoted: the next round's start

The public names, loaded with their modules at first use: training is heavy.
"""

from ..lazy import public_names

__all__, __getattr__, __dir__ = public_names(
    __name__,
    {
        "settings": ("Bound", "Evolution", "Round"),
        "stages": ("Stage", "plan"),
        "results": ("Result",),
        "run": ("evolve",),
    },
)
