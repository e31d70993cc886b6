"""The loop: every round generates, trains, evaluates, and is promoted if short contexts were not forgotten.

    OUT/base/evaluate                      the base model, measured
    OUT/ROUND/pairs, untrained             what the generator made; the starting model with theta raised, measured
    OUT/ROUND/train, evaluate              the trained model and its checkpoints; the same measured
    OUT/ROUND/*.json                       receipts of these stages (receipt.py)
    OUT/results.json, report.html, .md     after every stage

A stage whose receipt says that it is done is skipped; one that was stopped goes on by its own means: the generator's
journal, the trainer's checkpoints, the evaluator's journal. Memory: that of the stage under way. Not covered: several
processes, which are refused; docs/evolve.md tells how such a round is trained by hand.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from transformers import TrainerCallback

from ..data import ChatFormat
from ..documents import find_files
from ..evaluate import EvaluateRun, evaluate
from ..evaluate.run import Plan as EvaluationPlan
from ..generate import GenerateRun, generate_and_summarise
from ..generate import check as check_generation
from ..runs.journal import locked
from ..train.checks import check_model
from ..train.run import TrainRun, train
from .report import write_report
from .results import Result, collect, judge, why_stopped
from .settings import BASE, Evolution
from .stages import EVALUATE, PAIRS, TRAIN, Stage, naming, plan

Progress = Callable[[str, float, str], None]
Run = TypeVar("Run", GenerateRun, TrainRun, EvaluateRun)


def evolve(evolution: Evolution, progress: Progress | None = None) -> Result:
    """Run all rounds, or go on with those that were stopped; OUT/report.html shows what there is at any time.

    progress(stage, fraction, note) is called while a stage runs. A bound that does not hold ends the loop with
    Result.stopped. Raises ValueError for settings and inputs that cannot be used, naming the stage, and whatever else a
    stage raises (EngineStopped, OSError for a full disk): mend it and run the same again.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("evolve runs in one process; a round on several is trained by hand, see docs/evolve.md")
    stages = check(evolution)
    lock = _open(Path(evolution.out))
    try:
        for stage in stages:
            try:
                _work(stage, progress or (lambda *_: None))
                judged = judge(evolution, stage) if stage.kind == EVALUATE and stage.round else []
            except Exception as error:
                reason = str(error) if isinstance(error, ValueError) else f"{stage.name}: {error}"
                write_report(evolution, stages, collect(evolution, stages, reason))
                raise
            result = collect(evolution, stages, why_stopped(judged))
            write_report(evolution, stages, result)
            if result.stopped:
                break
        return result
    finally:
        os.close(lock)


def check(evolution: Evolution, base: bool = False) -> list[Stage]:
    """The stages, after trying what can be known to fail. base: its evaluation, too, which a run looks at as it begins.
    Raises ValueError.
    """
    stages = plan(evolution)
    origins, asked = {stage.model.path: stage.model.origin for stage in stages}, []
    for stage in stages:
        with naming(stage.name):
            stage.receipt()
            run = _on_what_is_there(stage.run, origins)
            if stage.kind == PAIRS:
                find_files(run.documents)
                if run.model == stage.run.model:  # a model that is not there yet reads more than its origin
                    check_generation(run)
            if stage.kind == TRAIN:
                check_model(run, run.config())
                if run.reference_model is not None:
                    run.load_tokenizer()  # the reference reads its ids
            elif (talk := (run.model, run.template_kwargs)) not in asked:
                ChatFormat(run.load_tokenizer(), template_kwargs=run.template_kwargs)
                asked.append(talk)
            if stage.kind == EVALUATE and (_differs(stage, run, evolution) if stage.round else base):
                EvaluationPlan(run).check()
    return stages


def _differs(stage: Stage, run: EvaluateRun, evolution: Evolution) -> bool:
    """Whether a round is evaluated otherwise than the base, or with another model's tokenizer."""
    return bool(stage.round.evaluate) or run.model != evolution.model


def _on_what_is_there(run: Run, origins: dict[str, str]) -> Run:
    """The run with the models from which those that are not there yet will be made."""
    there = {"model": origins[run.model]}
    if isinstance(run, TrainRun) and run.reference_model is not None:
        reference = origins.get(run.reference_model, run.reference_model)
        there["reference_model"] = None if reference == there["model"] else reference
    return replace(run, **there)


def _open(out: Path) -> int:
    """Locks the folder. Raises ValueError where it cannot be written, or another process is at work in it."""
    try:
        (out / BASE).mkdir(parents=True, exist_ok=True)
        return locked(out / BASE / "lock")
    except OSError as error:
        raise ValueError(f"out {out} cannot be written ({error.strerror}); expected a folder of your own") from None


def _work(stage: Stage, progress: Progress) -> None:
    def tell(fraction: float, note: str = "") -> None:
        progress(stage.name, fraction, note)

    receipt = stage.receipt()
    if receipt.done:
        return tell(1.0, "done before")
    tell(0.0)
    with naming(stage.name), receipt.measured():
        WORK[type(stage.run)](stage.run, tell)
    return tell(1.0)


def _generate(run: GenerateRun, tell) -> None:
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


def _train(run: TrainRun, tell) -> None:
    trainer = train(run, StepsTold(tell))
    if run.lora_rank:
        merged = str(Path(run.output_dir) / "merged")
        trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(merged)
        trainer.processing_class.save_pretrained(merged)
    trainer.accelerator.free_memory()


def _evaluate(run: EvaluateRun, tell) -> None:
    evaluate(run, lambda done, total, label: tell(done / max(1, total), label))


WORK = {GenerateRun: _generate, TrainRun: _train, EvaluateRun: _evaluate}


class StepsTold(TrainerCallback):
    """Calls tell(fraction, note) after every step of a training."""

    def __init__(self, tell: Callable[[float, str], None]):
        self.tell = tell

    def on_step_end(self, args, state, control, **_):
        self.tell(state.global_step / max(1, state.max_steps), f"step {state.global_step:,} of {state.max_steps:,}")
