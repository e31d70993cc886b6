"""What a stage does, in whatever process it runs, and its settings as plain values that travel to another one.

    run --perform--> the stage's output        run --to_plain--> JSON --from_plain--> the same run

Tests: tests/evolve/test_run.py, tests/evolve/test_child.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..evaluate import EvaluateRun, evaluate
from ..generate import GenerateRun, generate_and_summarise
from ..train.run import TrainRun, train

Run = GenerateRun | TrainRun | EvaluateRun
Tell = Callable[[float, str], None]
MERGED = "merged"  # folder in a training's own, of the model with its adapters in its weights


def perform(run: Run, tell: Tell) -> None:
    """The stage to its end, or on from where it was stopped. tell(fraction, note) is called under way.

    Raises ValueError where nothing came that the next stage could use, and whatever the piece raises.
    """
    WORK[type(run)](run, tell)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """A ValueError from within says where it came from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def to_plain(run: Run) -> dict[str, Any]:
    """A run as JSON can hold it: as it was given. What a recipe fills in by the number of processes is filled in where it
    runs."""
    own = {f.name: getattr(run, f.name) for f in dataclasses.fields(run) if f.name != "training"}
    return {"kind": type(run).__name__, "settings": own | getattr(run, "training", {})}


def from_plain(plain: dict[str, Any]) -> Run:
    """The run of which `to_plain` made this. Raises ValueError where this process refuses it."""
    kind, settings = RUNS[plain["kind"]], plain["settings"]
    if kind is TrainRun:
        return TrainRun.from_settings(settings)
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()})


def _generate(run: GenerateRun, tell: Tell) -> None:
    result, summary = generate_and_summarise(
        run, lambda fraction, documents, made, _: tell(fraction, f"{documents:,} documents, {made:,} pairs")
    )
    if result.missing:
        raise ValueError(
            f"{result.missing} documents that were begun are no longer there; put them back, or remove {run.out} to begin again"
        )
    if not result.made:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in summary["left_out"].items())
        raise ValueError(
            f"no pair is left of {summary['documents']} documents, so there is nothing to train on. Turns left out: "
            f"{reasons}; see {run.out}/summary.html"
        )


def _train(run: TrainRun, tell: Tell) -> None:
    first = _run_training(run, tell)
    if first and run.lora_rank:
        _merge(run)


def _run_training(run: TrainRun, tell: Tell) -> bool:
    """-> whether this is the first of the processes."""
    trainer = train(run, StepsTold(tell))
    trainer.accelerator.free_memory()
    return trainer.is_world_process_zero()


def _merge(run: TrainRun) -> None:
    """The saved adapters into the model's weights, on the CPU, however they were held in training."""
    from peft import PeftModel

    model = replace(run, lora_rank=0).load_model(run.model, policy=True)
    merged = str(Path(run.output_dir) / MERGED)
    PeftModel.from_pretrained(model, run.output_dir).merge_and_unload().save_pretrained(merged)
    run.load_tokenizer().save_pretrained(merged)


def _evaluate(run: EvaluateRun, tell: Tell) -> None:
    scores = evaluate(run, lambda done, total, label: tell(done / max(1, total), label))
    if not scores.complete:  # a number of fewer windows is not the one that others are compared with
        raise ValueError(
            f"the evaluation is not complete: {'; '.join(scores.notes)}; the same command asks again. Where the same fails "
            "each time, leave its length, text or harness task out in evaluate: and remove the receipts of the evaluations "
            f"that are there, evaluate.json and untrained.json in the folders of {Path(run.out).parents[1]}: their answers "
            "are kept"
        )


WORK = {GenerateRun: _generate, TrainRun: _train, EvaluateRun: _evaluate}
RUNS = {kind.__name__: kind for kind in WORK}


class StepsTold(TrainerCallback):
    """Calls tell(fraction, note) after every step of a training."""

    def __init__(self, tell: Tell):
        self.tell = tell

    def on_step_end(self, args, state, control, **_):
        self.tell(state.global_step / max(1, state.max_steps), f"step {state.global_step:,} of {state.max_steps:,}")
