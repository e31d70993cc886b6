"""What the demo runs: an Evolution of the tiny model, all of it below one folder.

OUT/documents-1k, documents-2k    prose with facts planted in it (tiny/text.py)
OUT/held-out                      prose that the tiny model never read
OUT/base, 1k, 2k, report.html     what `evolve` makes of them

Tests: tests/demo/test_commands.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..evolve import Evolution
from ..recipes import DEFAULT, OFFICIAL

RATE = 3e-4  # of RMSprop, whose first steps are ten times those of Adam
TINY = Path(__file__).resolve().parents[1] / "tiny"


def evolution(out: Path, rounds: int = 1, seed: int = 0, recipe: str = DEFAULT) -> Evolution:
    """The first rounds of examples/tiny/evolve.yaml in `out`, after a recipe with the sizes that a tiny model needs. Raises
    ValueError for a number of rounds it has not, and for a recipe that is none."""
    settings = yaml.safe_load((TINY / "evolve.yaml").read_text(encoding="utf-8"))
    if not 1 <= rounds <= len(settings["rounds"]):
        raise ValueError(f"--rounds {rounds}; expected 1 to {len(settings['rounds'])}")
    settings = _moved(settings, {"runs/tiny": str(out), "examples/tiny": str(TINY)})
    settings |= {"rounds": settings["rounds"][:rounds], "recipe": recipe}
    for each in settings["rounds"]:
        each["generate"] = each["generate"] | {"seed": seed}
        each["train"] = each["train"] | {"seed": seed} | ({"learning_rate": RATE} if recipe == OFFICIAL else {})
    return Evolution.from_settings(settings)


def _moved(value: Any, places: dict[str, str]) -> Any:
    """The settings with the beginnings of paths replaced."""
    if isinstance(value, dict):
        return {name: _moved(item, places) for name, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, places) for item in value]
    for place, instead in places.items():
        if isinstance(value, str) and (value == place or value.startswith(f"{place}/")):
            return instead + value[len(place) :]
    return value
