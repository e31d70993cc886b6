"""All stages of an evolution, in their order, known before the first one runs.

    base/evaluate, then for every round: pairs, untrained, train, evaluate

A round that starts from a measured model at its own theta has no stage `untrained`: it would measure the same again.

A stage is settings of a public piece (GenerateRun, TrainRun, EvaluateRun) and what they follow from: which model, by
which identity. A trained model's identity is a digest of its training's settings, those of its pairs and of the models
before it, so that a stage tells when anything before it has changed. Nothing is loaded but configs.

Tests: tests/evolve/test_run.py.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..evaluate import EvaluateRun
from ..generate import GenerateRun
from ..pretrained import NONE, read_config
from ..recipes import OFFICIAL, RECIPES
from ..train.run import ACCUMULATION, TrainRun
from .receipt import Receipt
from .settings import BASE, GENERATOR, LAST, Evolution, Round
from .work import MERGED, naming

PAIRS, UNTRAINED, TRAIN, EVALUATE = KINDS = ("pairs", "untrained", "train", "evaluate")
FREE = {  # settings that do not decide what comes out: they may change when a stage goes on, or after it
    *(
        "endpoints",
        "long_endpoints",
        "concurrency",
        "timeout",
        "patience",
        "key_variable",
        "engine_options",
        "trust_remote_code",
    ),
    *("memory", "fit", "workspace_bytes", "gradient_checkpointing", "save_strategy", "save_steps", "save_total_limit"),
    *("save_only_model", "logging_steps", "logging_strategy", "disable_tqdm", "report_to", "dataloader_num_workers"),
    *("sequence_parallel", "fsdp", "fsdp_config", "ddp_backend", "ddp_timeout"),
}


class Model(NamedTuple):
    """A model that is there or will be. identity: what decides its weights. positions: tokens it reads by itself.
    origin: the model that is there, from which the rounds made it.
    """

    path: str
    identity: str
    theta: float | None
    positions: int | None
    origin: str


@dataclass(frozen=True)
class Stage:
    """kind: one of KINDS. round: None for the base's evaluation. model: what the stage evaluates, trains or asks, and at
    which theta. settings: what decides its output."""

    kind: str
    round: Round | None
    out: Path
    run: GenerateRun | TrainRun | EvaluateRun
    model: Model
    theta: float | None
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.out.parent.name}/{self.kind}"

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:12]

    def receipt(self) -> Receipt:
        """Raises ValueError where the stage was begun with other settings."""
        return Receipt.open(self.out, self.settings)


def plan(evolution: Evolution) -> list[Stage]:
    """Raises ValueError, naming the round, for settings that a stage refuses and models that cannot be found."""
    trust = bool(evolution.evaluate.get("trust_remote_code"))
    base = read_model(evolution.model, trust)
    stages, models = [_evaluation(evolution, None, EVALUATE, base, base.theta)], {BASE: base, LAST: base}

    def find(name: str) -> Model:
        return models.get(name) or read_model(name, trust)

    for each in evolution.rounds:
        with naming(f"round {each.name!r}"):
            start, generator = find(each.start), find(each.generator)
            reference = generator if each.reference == GENERATOR else find(each.reference)
            theta = start.theta if each.rope_theta is None else float(each.rope_theta)
            pairs = _pairs(evolution, each, generator, theta)
            train = _training(evolution, each, start, reference, theta, pairs)
            merged = MERGED if train.run.lora_rank else ""
            path, identity = str(train.out / merged), f"{each.name} {train.digest}"
            after = Model(path, identity, theta, train.run.max_position_embeddings, start.origin)
            untrained = _evaluation(evolution, each, UNTRAINED, start, theta)
            new = [untrained] if all(untrained.settings != stage.settings for stage in stages) else []
            stages += [pairs, *new, train, _evaluation(evolution, each, EVALUATE, after, theta)]
        models |= {each.name: after, LAST: after}
    return stages


def read_model(name: str, trust_remote_code: bool = False) -> Model:
    """What a model's config says of it. Raises ValueError where there is none."""
    config = read_config(name, trust_remote_code)
    rope = getattr(config, "rope_parameters", None) or {}
    return Model(name, name, rope.get("rope_theta"), getattr(config, "max_position_embeddings", None), name)


def _pairs(evolution: Evolution, each: Round, generator: Model, theta: float | None) -> Stage:
    """A generator that reads too few tokens reads the documents at the policy's theta, and chunks at its own."""
    out, given = (
        Path(evolution.out) / each.name / PAIRS,
        {"recipe": evolution.recipe} | evolution.of_all | each.generate,
    )
    run = GenerateRun(model=generator.path, documents=each.documents, length=each.length, out=str(out), **given)
    too_long = run.sequence_length > (generator.positions or run.sequence_length)
    if run.engine != "server" and "rope" not in given and too_long:
        given |= {"rope": _rope(generator, theta)}
        run = replace(run, rope=given["rope"])
    identity = dict(model=generator.identity, documents=each.documents, length=each.length)
    return Stage(PAIRS, each, out, run, generator, theta, _decided(run, vars(run), given, **identity))


def _training(evolution: Evolution, each: Round, start: Model, reference: Model, theta, pairs: Stage) -> Stage:
    out = Path(evolution.out) / each.name / TRAIN
    longest, given = pairs.run.sequence_length, {"recipe": evolution.recipe} | evolution.of_all | each.train
    context = {"rope_theta": theta, "max_position_embeddings": max(longest, start.positions or 0)}
    paths = {"model": start.path, "data": str(pairs.out), "output_dir": str(out)}
    paths["reference_model"] = None if reference == start else reference.path
    identity = dict(model=start.identity, reference_model=reference.identity, data=pairs.digest)
    run = TrainRun.from_settings(given | context | paths)
    if evolution.launch and run.recipe == OFFICIAL and ACCUMULATION in given:
        raise ValueError(
            f"train: {ACCUMULATION} beside launch: how many sequences a step would have is known to the launcher alone; leave "
            "it out, and the official recipe's 8 are shared by its processes"
        )
    if run.quantization != NONE or (start.path == start.identity and run.is_quantised(start.path)):
        raise ValueError(
            "train: adapters on quantised weights are not merged into a model that the next round could load; give the model "
            "in full precision, and leave quantization out"
        )
    return Stage(TRAIN, each, out, run, start, theta, _decided(run, run.settings(), given, **context, **identity))


def _evaluation(evolution: Evolution, each: Round | None, kind: str, model: Model, theta: float | None) -> Stage:
    out, given = Path(evolution.out) / (each.name if each else BASE) / kind, evolution.evaluation(each)
    run = EvaluateRun(model=model.path, out=str(out), **given)
    fits = theta == model.theta and run.reads <= (model.positions or run.reads)
    rope = None if fits else _rope(model, theta)
    told = given | ({"judge": run.judge_shown} if run.judge else {})
    return Stage(
        kind, each, out, replace(run, rope=rope), model, theta, _identity(told, model=model.identity, rope=rope)
    )


def _rope(model: Model, theta: float | None) -> dict[str, float]:
    """Entries to replace, for an engine that is to read more tokens than the model's config allows, or at another theta."""
    if theta is None:
        raise ValueError(
            f"{model.path} reads {model.positions} tokens and its config has no single rope_theta; set the round's, or "
            "expect no longer inputs"
        )
    return {"rope_theta": theta}


def _decided(
    run: GenerateRun | TrainRun, settings: dict[str, Any], given: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """What decides the output of a stage that follows a recipe: the settings given, those of the recipe, its title."""
    stage = "generate" if isinstance(run, GenerateRun) else "train"
    names = dict.fromkeys([*given, *RECIPES[run.recipe][stage]])
    return _identity({name: settings[name] for name in names}, **more, recipe=run.title)


def _identity(given: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What decides a stage's output, as JSON has it."""
    return json.loads(json.dumps({name: value for name, value in given.items() if name not in FREE} | more))
