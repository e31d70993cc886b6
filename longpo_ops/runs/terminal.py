"""What the commands share at a terminal: wrong usage, a run that is stopped, bars and tables. rich is loaded when needed.

Tests: tests/test_cli.py, tests/generate/test_commands.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import typer

from . import disk


@contextmanager
def wrong_usage(kinds: type[Exception] | tuple[type[Exception], ...] = ValueError) -> Iterator[None]:
    """Makes errors of these kinds errors of usage: exit code 2."""
    try:
        yield
    except kinds as error:
        raise typer.BadParameter(str(error)) from None


@contextmanager
def resumable(what_is_left: str) -> Iterator[None]:
    """Ctrl-C ends the command with code 130, saying what is left of it and that it can go on. A failing disk's OSError says
    what is left, too."""
    try:
        yield
    except OSError as error:
        if error.errno not in disk.ADVICE:
            raise
        raise OSError(error.errno, f"{error.strerror}; {what_is_left}", error.filename) from error
    except KeyboardInterrupt:
        typer.echo(f"stopped; {what_is_left}, run the same command again to go on", err=True)
        raise typer.Exit(130) from None


def console(stderr: bool = False):
    from rich.console import Console

    return Console(stderr=stderr)


def bars(percentage: bool = True, note: bool = False):
    """Bars on standard error with the time taken and left, and the field `note` of each behind it: a context."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [TextColumn("{task.description}"), BarColumn()]
    columns += [TaskProgressColumn()] if percentage else []
    columns += [TimeElapsedColumn(), TimeRemainingColumn()]
    columns += [TextColumn("{task.fields[note]}")] if note else []
    return Progress(*columns, console=console(stderr=True))


def print_table(console, title: str, header: Iterable[str], lines: Iterable[Iterable[str]]) -> None:
    """Names on the left, numbers on the right."""
    from rich.table import Table
    from rich.text import Text

    from .page import printable

    table = Table(title=title)
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left")
    for line in lines:
        table.add_row(*(Text(printable(cell)) for cell in line))
    console.print(table)


def print_values(values: Iterable[tuple[str, str]]) -> None:
    """Names and their values, on standard output."""
    from rich.table import Table
    from rich.text import Text

    from .page import printable

    grid = Table(show_header=False, box=None)
    grid.add_column()
    grid.add_column(justify="right")
    for name, value in values:
        grid.add_row(Text(printable(name)), Text(printable(value)))
    console().print(grid)
