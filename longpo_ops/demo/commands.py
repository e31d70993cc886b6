"""`longpo demo`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from ..evolve.commands import one_set_of_bars, show_costs, show_progress, show_scores
from ..recipes import DEFAULT
from ..runs import terminal
from ..runs.disk import writing
from ..runs.locks import Lock


@one_set_of_bars
def demo(
    out: Annotated[Path, typer.Option(help="Folder of everything; an unfinished demo in it goes on.")] = Path(
        "runs/demo"
    ),
    rounds: Annotated[int, typer.Option(help="2 goes on from 1,024 to 2,048 tokens.")] = 1,
    compare: Annotated[bool, typer.Option("--compare", help="Train other methods on the same pairs too.")] = False,
    recipe: Annotated[
        str, typer.Option(help="default, or official: the published one with the sizes that a tiny model needs.")
    ] = DEFAULT,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of documents, pairs and training.")] = 0,
) -> None:
    """The whole loop on real text with a tiny model: it asks itself, answers, trains on its pairs, and is measured."""
    _choose(device)
    from ..tiny.text import prepare
    from .run import evolution

    with terminal.wrong_usage():
        wanted = evolution(out, rounds, seed, recipe)
        if compare and recipe != DEFAULT:
            raise ValueError(
                f"--compare with --recipe {recipe}: the methods' learning rates are tuned on pairs of the default recipe; "
                "leave one of the two out"
            )
    with Lock(out / "work" / "lock"):  # a second demo would write other documents under the first one
        with writing(out, elsewhere=True):
            prepare(out, seed)
        _show(wanted, out, compare)


def _show(wanted, out: Path, compare: bool) -> None:
    """Step by step what the evolution does, and what came of it. Raises ValueError where it stopped before its end."""
    from ..evolve import evolve
    from .show import show_documents, show_pair

    console, began, left = terminal.console(), time.monotonic(), f"what is finished lies in {out}"
    show_documents(console, wanted)
    with terminal.resumable(left), show_progress() as progress:
        result = evolve(wanted, progress)
    for name, followed in result.recipes.items():
        console.print(f"Recipe of round {name}: {followed}")
    show_pair(console, wanted)
    show_scores(console, result)
    show_costs(console, result)
    if compare:
        from .compare import compare as run_comparison
        from .compare import show_comparison

        with terminal.resumable(left), show_progress() as progress:
            runs = run_comparison(wanted, progress)
        show_comparison(console, runs, out)
    console.print(f"{time.monotonic() - began:.0f} s in all. Figure: {out}/accuracy.png   Report: {out}/report.html")
    if result.stopped:
        raise ValueError(f"{result.stopped}. The last promoted model is {result.promoted}")


def _choose(device: str) -> None:
    """Before torch looks for devices."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    elif device != "auto":
        raise typer.BadParameter(f"--device {device}; expected cpu, cuda or auto")
