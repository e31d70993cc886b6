"""The methods of the paper's Figure 4 and others in miniature: long accuracy and short retention against steps, same pairs.

    first round's pairs --train, one method after the other--> checkpoints --evaluate at two lengths--> curves

    OUT/compare/METHOD              the training's folder
    OUT/compare/METHOD-STEP         a checkpoint's evaluation
    OUT/compare/results.json, OUT/compare.png

What is finished is not done again.

Tests: tests/demo/test_commands.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import yaml

from ..evaluate import Scores, evaluate
from ..evolve import Evolution, plan
from ..evolve.work import StepsTold
from ..runs import terminal
from ..runs.journal import write_atomically
from ..train.run import TrainRun, train
from .run import TINY


def compare(evolution: Evolution, progress: Callable[[str, float, str], None]) -> list[dict]:
    """-> a row per method and checkpoint: method, step, learning_rate, long and short accuracy, perplexity."""
    settings = yaml.safe_load((TINY / "compare.yaml").read_text(encoding="utf-8"))
    stages = {stage.kind: stage for stage in plan(evolution) if stage.round == evolution.rounds[0]}
    first, measured, out = stages["train"].run, stages["evaluate"].run, Path(evolution.out) / "compare"
    ends, rows = (min(measured.lengths), evolution.rounds[0].length), []
    for method, rate in settings["methods"].items():
        own = {"objective": method, "learning_rate": float(rate), "max_steps": settings["steps"]}
        own |= {"save_steps": settings["every"], "save_total_limit": None}
        told = partial(progress, f"train {method}")
        _train(replace(first, output_dir=str(out / method), training=first.training | own), told)
        rows.append(_row(method, 0, rate, Scores.load(stages["untrained"].out), ends))
        checkpoints = sorted((_step(path), path) for path in (out / method).glob("checkpoint-*"))
        for i, (step, path) in enumerate(checkpoints):
            progress(f"evaluate {method}", i / len(checkpoints), f"step {step}")
            run = replace(measured, model=str(path), out=str(out / f"{method}-{step}"), lengths=ends)
            rows.append(_row(method, step, rate, evaluate(replace(run, perplexity_lengths=ends[:1])), ends))
            write_atomically(out / "results.json", (json.dumps(rows, indent=1, allow_nan=False) + "\n").encode())
            draw(rows, Path(evolution.out) / "compare.png")
        progress(f"evaluate {method}", 1.0, "")
    return rows


def _train(run: TrainRun, told: Callable[[float, str], None]) -> None:
    """Once; a training that was stopped goes on."""
    done = Path(run.output_dir) / "trained.json"
    if not done.exists():
        steps = train(run, StepsTold(told)).state.global_step
        write_atomically(done, f"{steps}\n".encode())
    told(1.0, "")


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _row(method: str, step: int, rate: float, scores: Scores, ends: tuple[int, int]) -> dict:
    short, long = ends
    numbers = {"long": scores.accuracy(long), "short": scores.accuracy(short), "perplexity": scores.perplexity[short]}
    return {"method": method, "step": step, "learning_rate": rate} | numbers


def draw(rows: list[dict], path: Path) -> None:
    """Long accuracy, short accuracy and short perplexity against steps, a line per method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axis, name, title in zip(
        axes, ("long", "short", "perplexity"), ("long accuracy", "short accuracy", "short perplexity")
    ):
        for method in dict.fromkeys(row["method"] for row in rows):
            points = [(row["step"], row[name]) for row in rows if row["method"] == method]
            axis.plot(*zip(*points, strict=True), marker=".", label=method)
        axis.set_title(title, fontsize=10)
        if name != "perplexity":
            axis.set_ylim(0, 1.03)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show_comparison(console, rows: list[dict], out: Path) -> None:
    """The last checkpoint of every method."""
    header = ("method", "learning rate", "steps", "long accuracy", "short accuracy", "short perplexity")
    lines = []
    for row in {row["method"]: row for row in rows}.values():
        numbers = (f"{row['long']:.3f}", f"{row['short']:.3f}", f"{row['perplexity']:.2f}")
        lines.append((row["method"], f"{row['learning_rate']:g}", str(row["step"]), *numbers))
    terminal.print_table(console, "methods on the same pairs, after the last step", header, lines)
    console.print(f"Curves: {out}/compare.png")
