"""`longpo doctor`: the page, or its JSON. Exit code 0 only if training would start.

Tests: tests/doctor/test_examine.py.
"""

from __future__ import annotations

import textwrap
from typing import Annotated

import typer

from ..runs import terminal
from ..runs.settings_file import assigned

MARKS = {True: "yes", False: "no", None: "-"}
WIDTH, NAME = 118, 20


def doctor(
    model: Annotated[str, typer.Option(help="Causal LM: a name or a folder.")],
    length: Annotated[
        int | None, typer.Option(help="Tokens of a pair's pack: the plan for them on this machine.")
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(help="LoRA of this rank; 0 is full fine-tuning.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting of `longpo train` as name=value (YAML), repeatable."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of a page.")] = False,
) -> None:
    """Which parts of the library take a model and why not, what this machine has, the plan, and the command to run next.

    Exit code 0 only if training would start.
    """
    import json

    from ..memory.plan_report import as_json
    from .examine import examine

    with terminal.wrong_usage((ValueError, TypeError)):
        settings = assigned(set_ or []) | {"model": model}
        settings |= {} if lora_rank is None else {"lora_rank": lora_rank}
        found = examine(settings, length)
    if json_:
        told = {"model": found.model, "starts": found.starts, "command": found.command}
        told["parts"] = [vars(part) for part in found.parts]
        told["plan"] = None if found.plan is None else as_json(found.plan, settings.get("allow_lossy", "nothing"))
        typer.echo(json.dumps(told, indent=1))
    else:
        typer.echo(found.model)
        for part in found.parts:
            typer.echo(_lines(part))
        typer.echo(f"\nnext: {found.command}" if found.starts else "\nnext: mend what `training` says, and ask again")
    if not found.starts:
        raise typer.Exit(1)


def _lines(part) -> str:
    """A part with its mark; what it tells goes on under itself."""
    lead, told = f"{part.name:{NAME}s}{MARKS[part.takes]:4s}", part.told.splitlines() or [""]
    lines = [line for each in told for line in textwrap.wrap(each, WIDTH - NAME - 4, drop_whitespace=True) or [""]]
    return "\n".join([lead + lines[0], *(" " * len(lead) + line for line in lines[1:])])
