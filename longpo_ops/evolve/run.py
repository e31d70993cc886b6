"""The loop: every round generates, trains, evaluates, and is promoted if short contexts were not forgotten.

    OUT/base/evaluate                      the base model, measured
    OUT/ROUND/pairs, untrained             what the generator made; the starting model with theta raised, measured
    OUT/ROUND/train, evaluate              the trained model and its checkpoints; the same measured
    OUT/ROUND/*.json                       receipts of these stages (receipt.py)
    OUT/ROUND/*.process                    what a stage in processes of its own was told, says and prints (child.py)
    OUT/results.json, report.html, .md     after every stage

A stage whose receipt says that it is done is skipped; one that was stopped goes on by its own means: the generator's
journal, the trainer's checkpoints, the evaluator's journal. Memory: that of the stage under way.

Processes. A stage that uses a GPU is one of its own, as this process would keep what torch and vLLM take there, and so is a
training that has a launcher, or several. On a CPU without a launcher all runs here: starting a process takes ten seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from ..data import ChatFormat
from ..documents import find_files
from ..evaluate import EvaluateRun
from ..evaluate.plan import Plan as EvaluationPlan
from ..generate import GenerateRun
from ..generate import check as check_generation
from ..runs.locks import Lock, clear_partials
from ..train.checks import check_model
from ..train.run import TrainRun
from .processes import Apart, check_launch
from .report import write_report
from .results import Result, collect, judge, why_stopped
from .settings import BASE, Evolution
from .stages import EVALUATE, PAIRS, TRAIN, Stage, plan
from .work import naming, perform, to_plain

Progress = Callable[[str, float, str], None]
Run = TypeVar("Run", GenerateRun, TrainRun, EvaluateRun)


def evolve(evolution: Evolution, progress: Progress | None = None) -> Result:
    """Run all rounds, or go on with those that were stopped; OUT/report.html shows what there is at any time.

    progress(stage, fraction, note) is called while a stage runs. A bound that does not hold ends the loop with
    Result.stopped. Raises ValueError for settings and inputs that cannot be used, naming the stage, and whatever else a
    stage raises (EngineStopped, OSError for a full disk): mend it and run the same again.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            "evolve runs in one process and starts the others itself: run `longpo evolve` without a launcher, and name that "
            "in its file, such as launch: [torchrun, --nproc-per-node, 8]"
        )
    progress = progress or (lambda *_: None)
    stages = check(evolution)
    with _locked(Path(evolution.out)) as lock:
        clear_partials(*(stage.out.parent for stage in stages))
        _check_apart(evolution, stages, lock, progress)
        before = [stage.receipt().done for stage in stages]
        for number, stage in enumerate(stages):
            try:
                _work(evolution, stage, lock, progress)
                judged = judge(evolution, stage) if stage.kind == EVALUATE and stage.round else []
            except Exception as error:
                reason = str(error) if isinstance(error, ValueError) else f"{stage.name}: {error}"
                with suppress(OSError):  # of a full disk the stage's own error tells more
                    write_report(evolution, stages, collect(evolution, stages, reason))
                raise
            result = collect(evolution, stages, why_stopped(judged))
            if result.stopped or before[number : number + 2] != [True, True]:  # else the next one's page is the same
                write_report(evolution, stages, result)
            if result.stopped:
                break
        return result


def check(evolution: Evolution, base: bool = False) -> list[Stage]:
    """The stages, after trying what can be known to fail. base: its evaluation, too, which a run looks at as it begins.
    What a training refuses of its settings is found out in its own processes, where it has any. Raises ValueError.
    """
    check_launch(evolution.launch)
    stages = plan(evolution)
    origins, asked = _origins(stages), []
    for stage in stages:
        with naming(stage.name):
            stage.receipt()
            run = _on_what_is_there(stage.run, origins)
            if stage.kind == PAIRS:
                find_files(run.documents)
                if run.model == stage.run.model:  # a model that is not there yet reads more than its origin
                    check_generation(run)
            if stage.kind == TRAIN:
                if not _is_apart(evolution, run) or (base and not evolution.launch):
                    check_model(run, run.config())
                if run.reference_model is not None:
                    run.load_tokenizer()  # the reference reads its ids
            talk = {"system": getattr(run, "system", None), "template_kwargs": run.template_kwargs}
            if (run.model, talk) not in asked:
                ChatFormat(run.load_tokenizer(), **talk)
                asked.append((run.model, talk))
            if stage.kind == EVALUATE and (_differs(stage, run, evolution) if stage.round else base):
                EvaluationPlan(run).check()
    return stages


def _check_apart(evolution: Evolution, stages: list[Stage], lock: Lock, progress: Progress) -> None:
    """The settings of trainings, in such processes as they will have, before other stages take hours. Raises ValueError."""
    to_do = [stage for stage in stages if not stage.receipt().done]
    apart = [stage for stage in to_do if stage.kind == TRAIN and _is_apart(evolution, stage.run)]
    if apart and to_do[0].kind != TRAIN:
        origins, folder = _origins(stages), Path(evolution.out) / BASE / "check.process"
        runs = {stage.name: to_plain(_on_what_is_there(stage.run, origins)) for stage in apart}
        told = "the settings of training"
        Apart(folder, evolution.launch).run({"check": runs}, lock, lambda *_: progress(told, 0.0, "in its processes"))
        progress(told, 1.0, "")


def _is_apart(evolution: Evolution, run: Run) -> bool:
    """Whether a stage has processes of its own."""
    if isinstance(run, TrainRun):
        return bool(evolution.launch) or (torch.accelerator.is_available() and not run.settings().get("use_cpu"))
    return run.engine != "server" and torch.accelerator.is_available()


def _origins(stages: list[Stage]) -> dict[str, str]:
    return {stage.model.path: stage.model.origin for stage in stages}


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


def _locked(out: Path) -> Lock:
    """The folder, for this process alone. Raises ValueError where it cannot be written, or another one is at work in it."""
    try:
        return Lock(out / BASE / "lock")
    except OSError as error:
        raise ValueError(f"out {out} cannot be written ({error.strerror}); expected a folder of your own") from None


def _work(evolution: Evolution, stage: Stage, lock: Lock, progress: Progress) -> None:
    def tell(fraction: float, note: str = "") -> None:
        progress(stage.name, fraction, note)

    receipt = stage.receipt()
    if receipt.done:
        return tell(1.0, "done before")
    tell(0.0)
    if _is_apart(evolution, stage.run):
        launch = evolution.launch if stage.kind == TRAIN else ()
        apart = Apart(stage.out.with_name(f"{stage.out.name}.process"), launch)
        with naming(stage.name), receipt.measured(apart.peaks):
            apart.run(to_plain(stage.run), lock, tell)
    else:
        with naming(stage.name), receipt.measured():
            perform(stage.run, tell)
    return tell(1.0)
