"""`longpo evolve`, and what of it others show: bars, the table by length, what it cost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated
from unittest import mock

import typer

from ..runs import terminal


def one_set_of_bars(command: Callable) -> Callable:
    """A command during which no library draws bars of its own; imports them, as they look at it then."""

    @wraps(command)
    def wrapped(*arguments, **options):
        with mock.patch.dict(os.environ, TQDM_DISABLE="1"):
            return command(*arguments, **options)

    return wrapped


@one_set_of_bars
def evolve(
    config: Annotated[Path, typer.Option(help="YAML file of the rounds.")],
    out: Annotated[str | None, typer.Option(help="Folder of everything, instead of the file's.")] = None,
    launch: Annotated[
        str | None, typer.Option(help='What starts the processes of a training, such as "torchrun --nproc-per-node 8".')
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the stages and their settings, then stop.")] = False,
) -> None:
    """Rounds of generating, training and evaluating, each from the model before it; goes on where it was stopped."""
    import dataclasses

    from .run import check
    from .run import evolve as run_evolution
    from .settings import Evolution

    with terminal.wrong_usage():
        evolution = Evolution.from_file(config)
        given = {name: value for name, value in {"out": out, "launch": launch}.items() if value is not None}
        evolution = dataclasses.replace(evolution, **given)
    if dry_run:
        for stage in check(evolution, base=True):
            _show(stage)
        if evolution.launch:
            typer.echo(
                f"trained by {' '.join(evolution.launch)}, whose processes check their settings before anything runs"
            )
        return
    with terminal.resumable(f"what there is lies in {evolution.out}"), show_progress() as progress:
        result = run_evolution(evolution, progress)
    console = terminal.console()
    show_scores(console, result)
    show_costs(console, result)
    typer.echo(f"see {evolution.out}/report.html")
    if result.stopped:
        raise ValueError(f"{result.stopped}. The last promoted model is {result.promoted}")
    typer.echo(f"promoted: {result.promoted}")


def _show(stage) -> None:
    receipt = stage.receipt()
    typer.echo(f"{stage.name} ({'done' if receipt.done else 'begun' if receipt.cost.seconds else 'to do'})")
    for name, value in {"model": stage.run.model, "output": stage.out}.items():
        typer.echo(f"    {name:32s}{value}")
    for name, value in stage.settings.items():
        if name != "model":
            typer.echo(f"    {name:32s}{value}")


@contextmanager
def show_progress() -> Iterator[Callable[[str, float, str], None]]:
    """A bar per stage, with the time left; gives what `evolve` calls."""
    with terminal.bars(note=True) as bars:
        tasks = {}

        def update(stage: str, fraction: float, note: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=1.0, note="")
            bars.update(tasks[stage], completed=fraction, **({"note": note} if note else {}))

        yield update


def show_scores(console, result) -> None:
    """Accuracy by length, of comparable and of local tasks, and perplexity where it was measured, a line per model."""
    from .results import by_length, measures

    for title, numbers, write in measures(result.rows):
        lengths, lines = by_length(result.rows, numbers, write)
        terminal.print_table(console, f"{title} by tokens, with 95 % intervals", ("", *lengths), lines)


def show_costs(console, result) -> None:
    """Seconds and peak memory of every stage."""
    from .results import DASH

    lines = []
    for cost in result.stages:
        peaks = (f"{cost[name] / 2**20:,.0f}" if cost[name] else DASH for name in ("host_bytes", "device_bytes"))
        lines.append((cost["stage"], f"{cost['seconds']:,.1f}", *peaks))
    terminal.print_table(console, "what it cost", ("stage", "seconds", "peak memory, MiB", "on the device, MiB"), lines)
