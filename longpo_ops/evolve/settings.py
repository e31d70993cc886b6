"""What an evolution is: a model, its rounds, how it is measured, and what it must not forget.

YAML --read--> Evolution(Round, ...; Bound, ...), checked before anything runs
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evaluate.shots import harness_names
from ..pretrained.template_kwargs import check_values
from ..recipes import DEFAULT, check_recipe
from ..runs.settings_file import read_yaml, settle
from ..runs.validate import check_kinds

LAST, BASE, GENERATOR = "last", "base", "generator"
ROLES = ("start", "generator", "reference")  # of models in a round
HARNESS = "harness:"
OWNED = {  # fields of a stage that follow from the round
    "generate": {"model": "generator", "documents": "documents", "length": "length", "out": "out"},
    "train": {"model": "start", "data": "the round's pairs", "output_dir": "out"}
    | {"reference_model": "reference", "rope_theta": "rope_theta", "max_position_embeddings": "length"},
    "evaluate": {"model": "the round", "out": "out", "rope": "rope_theta"},
}


@dataclass(frozen=True)
class Round:
    """One iteration.

    name: of its folder. length: tokens of the longest training sequence. documents: folders, files, globs.
    rope_theta: of the policy; None is that of the model it starts from.
    start: which model the policy starts from: "last" (promoted: the model of the round before, or the base), "base", the
    name of an earlier round, or a model's name or folder. generator: who makes the pairs: the same choices.
    reference: who the policy is compared with: the same, or "generator". It reads short inputs at its own RoPE.
    generate, train, evaluate: further fields of GenerateRun; of TrainRun and LongPOConfig; over Evolution.evaluate.

    Raises ValueError for values that make no sense.
    """

    name: str
    length: int
    documents: tuple[str, ...]
    rope_theta: float | None = None
    start: str = LAST
    generator: str = LAST
    reference: str = GENERATOR
    generate: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        what = f"round {self.name!r}"
        if not isinstance(self.name, str) or not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"{what}: expected a name of letters, digits, dots and dashes, as it names a folder")
        if self.name in (LAST, BASE, GENERATOR):
            raise ValueError(f"{what}: expected another name, as this one means a model")
        if type(self.length) is not int or self.length < 1:
            raise ValueError(f"{what}: length is {self.length!r}; expected a number of tokens")
        _set(self, "documents", _texts(f"{what}: documents", self.documents))
        if not self.documents:
            raise ValueError(f"{what}: no documents; expected folders, files or globs")
        theta = self.rope_theta
        if theta is not None and not (type(theta) in (int, float) and 0 < theta < math.inf):
            raise ValueError(f"{what}: rope_theta is {theta!r}; expected a number above 0, or none")
        for name in ROLES:
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{what}: {name} is {getattr(self, name)!r}; expected the name of a model")
            if name != "reference" and getattr(self, name) == GENERATOR:
                raise ValueError(f"{what}: {name} is {GENERATOR!r}, which a reference alone may be; name the model")
        for kind in OWNED:
            _set(self, kind, _further(what, kind, getattr(self, kind)))


@dataclass(frozen=True)
class Bound:
    """What a round may cost at short context, against the BASE model.

    measure: "accuracy" (mean over the tasks) or "perplexity", read at `length` (None: the shortest one evaluated), or
    "harness:TASK". within: accuracy and harness may be so much lower, perplexity higher by such a fraction.

    Raises ValueError for values that make no sense.
    """

    measure: str
    within: float
    length: int | None = None

    def __post_init__(self):
        if self.measure not in ("accuracy", "perplexity") and not str(self.measure).startswith(HARNESS):
            raise ValueError(f"retention: measure {self.measure!r}; expected accuracy, perplexity or {HARNESS}TASK")
        if not (type(self.within) in (int, float) and 0 <= self.within < math.inf):
            raise ValueError(f"retention, {self.measure}: within is {self.within!r}; expected a number from 0")
        if self.length is not None and (type(self.length) is not int or self.measure.startswith(HARNESS)):
            raise ValueError(f"retention, {self.measure}: length is {self.length!r}; expected tokens, or none")


@dataclass(frozen=True)
class Evolution:
    """model: the base, a name or a folder. out: folder of everything. evaluate: fields of EvaluateRun but model, out
    and rope. retention: all of these must hold after a round, or the loop stops. recipe: "default" or "official", of all
    pairs and trainings that name no other. launch: words of the launcher that starts the processes of a training, a list or
    a line as a shell reads it, such as "torchrun --nproc-per-node 8"; none: one process. template_kwargs: variables of the
    chat template, of all stages that name no others: models are asked, trained and measured in the same format.

    Raises ValueError for names nobody knows and for rounds that point forward.
    """

    model: str
    out: str
    rounds: tuple[Round, ...]
    evaluate: dict[str, Any]
    retention: tuple[Bound, ...] = ()
    recipe: str = DEFAULT
    launch: tuple[str, ...] = ()
    template_kwargs: dict[str, Any] | None = None

    def __post_init__(self):
        check_values(self.template_kwargs)
        check_recipe(self.recipe)
        _set(self, "launch", _words(self.launch))
        for name in ("model", "out"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected text")
        if not self.rounds:
            raise ValueError("rounds: none; expected one at least")
        _set(self, "evaluate", _further("the evolution", "evaluate", self.evaluate))
        names = [each.name for each in self.rounds]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"rounds: {', '.join(twice)} is there twice; expected a name for each")
        for number, each in enumerate(self.rounds):
            for role in ROLES:
                if (model := getattr(each, role)) in names[number:]:
                    when = "that round itself" if model == each.name else "a later round"
                    raise ValueError(
                        f"round {each.name!r}: {role} {model!r} is {when}, whose model is not there yet; expected "
                        f"{', '.join(['last', 'base', *names[:number]])}, or a model's name or folder"
                    )
            self._check_lengths(each)

    def evaluation(self, each: Round | None = None) -> dict[str, Any]:
        """Fields of EvaluateRun: of the base's evaluation, or of a round's."""
        return self.of_all | self.evaluate | (each.evaluate if each else {})

    @property
    def of_all(self) -> dict[str, Any]:
        """Fields of every stage's run."""
        return {"template_kwargs": self.template_kwargs} if self.template_kwargs else {}

    def _check_lengths(self, each: Round) -> None:
        """What is compared must be measured before and after."""
        for bound in self.retention:
            for who, evaluation in (("base", self.evaluation()), (f"round {each.name!r}", self.evaluation(each))):
                if bound.measure.startswith(HARNESS):
                    known, wanted = harness_names(evaluation), bound.measure.removeprefix(HARNESS)
                    if wanted not in known:
                        there = f"; there is {', '.join(known)}" if known else ""
                        raise ValueError(
                            f"retention: {bound.measure} is not evaluated for {who}; add {wanted!r} to evaluate: "
                            f"harness{there}"
                        )
                    continue
                known, wanted = lengths(evaluation, bound.measure), bound_length(bound, self.evaluation())
                if bound.measure == "perplexity" and not evaluation.get("perplexity"):
                    raise ValueError(
                        f"retention: perplexity without text for {who}; name files in evaluate: perplexity"
                    )
                if wanted not in known:
                    raise ValueError(
                        f"retention: {bound.measure} at {wanted} is not evaluated for {who}; expected one of "
                        f"{', '.join(map(str, known))}"
                    )

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Evolution:
        """Of plain names and values, as a YAML file gives them. Raises ValueError naming one that nobody knows."""
        given = dict(settings)
        for name, kind in (("rounds", Round), ("retention", Bound)):
            if name in given:
                if not isinstance(given[name], list | tuple):
                    raise ValueError(f"{name}: expected a list, got {type(given[name]).__name__}")
                given[name] = tuple(_build(kind, f"{name}[{i}]", values) for i, values in enumerate(given[name]))
        return _build(cls, "the evolution", given)

    @classmethod
    def from_file(cls, path: str | Path) -> Evolution:
        """Of a YAML file; paths in it are relative to the working folder. Raises ValueError for one that is none."""
        try:
            settings = read_yaml(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: expected names and values, got {type(settings).__name__}")
        return cls.from_settings(settings)


def lengths(evaluation: dict[str, Any], measure: str = "accuracy") -> tuple[int, ...]:
    """At which lengths tokens are evaluated."""
    of = evaluation.get("perplexity_lengths") if measure == "perplexity" else None
    return tuple(of or evaluation["lengths"])


def bound_length(bound: Bound, evaluation: dict[str, Any]) -> int:
    """Where a bound is read."""
    return min(lengths(evaluation, bound.measure)) if bound.length is None else bound.length


def _build(kind: type, what: str, values: Any) -> Any:
    if isinstance(values, kind):
        return values
    if not isinstance(values, dict):
        raise ValueError(f"{what}: expected names and values, got {type(values).__name__}")
    known = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(map(str, set(values) - set(known))):
        raise ValueError(f"{what}: {', '.join(unknown)} unknown; expected some of {', '.join(known)}")
    needed = [n for n, f in known.items() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"{what}: {', '.join(missing)} missing")
    own = settle({name: value for name, value in values.items() if name not in OWNED}, kind)  # _further has the others
    return kind(**values | own)


def _further(what: str, kind: str, values: Any) -> dict[str, Any]:
    """Fields of one kind of run, lists as the tuples they are there. Raises ValueError for unknown or owned ones."""
    if not isinstance(values, dict):
        raise ValueError(f"{what}, {kind}: expected names and values, got {type(values).__name__}")
    if owned := sorted(set(values) & set(OWNED[kind])):
        where = ", ".join(f"{name} is set by {OWNED[kind][name]}" for name in owned)
        raise ValueError(f"{what}, {kind}: {where}; leave it out there")
    if unknown := sorted(map(str, set(values) - _fields(kind))):
        raise ValueError(
            f"{what}, {kind}: {', '.join(unknown)} unknown; expected some of {', '.join(sorted(_fields(kind)))}"
        )
    if kind == "evaluate":
        if what == "the evolution" and not values.get("lengths"):
            raise ValueError("evaluate: lengths missing; expected those at which every model is measured")
        if values.get("engine") == "server":
            raise ValueError(
                "evaluate: engine 'server' has one model, but every row has another; use transformers or vllm"
            )
    for name in ("lengths", "perplexity_lengths"):
        numbers = values.get(name, ()) if kind == "evaluate" else ()
        if not isinstance(numbers, list | tuple) or not all(type(n) is int and n > 0 for n in numbers):
            raise ValueError(f"{what}, evaluate: {name} is {numbers!r}; expected a list of numbers of tokens")
    if "recipe" in values:
        try:
            check_recipe(values["recipe"])
        except ValueError as error:
            raise ValueError(f"{what}, {kind}: {error}") from None
    values = settle(values, *_owners(kind))
    if kind == "train":  # TrainRun checks the kinds of its values
        return values
    check_kinds(values, _run(kind), f"{what}, {kind}: ")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _run(kind: str) -> type:
    """The class of a stage's settings."""
    if kind == "generate":
        from ..generate import GenerateRun as run
    elif kind == "evaluate":
        from ..evaluate import EvaluateRun as run
    else:
        from ..train.run import TrainRun as run
    return run


def _owners(kind: str) -> tuple[type, ...]:
    """The classes whose fields a round may set for one of its stages."""
    if kind != "train":
        return (_run(kind),)
    from ..train.config import LongPOConfig

    return _run(kind), LongPOConfig


def _fields(kind: str) -> set[str]:
    """Names a round may set for one of its stages."""
    names = {f.name for owner in _owners(kind) for f in dataclasses.fields(owner) if f.init}
    return names - {"training"} - set(OWNED[kind])


def _texts(what: str, value: Any) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(isinstance(each, str) for each in values):
        raise ValueError(f"{what}: {value!r}; expected text, or a list of it")
    return tuple(values)


def _words(launch: Any) -> tuple[str, ...]:
    """Of a command line: a list of texts and numbers, or one text."""
    try:
        words = shlex.split(launch) if isinstance(launch, str) else launch
    except ValueError as error:
        raise ValueError(f"launch: {launch!r}: {error}") from None
    right = isinstance(words, list | tuple) and all(type(each) in (str, int) for each in words)
    if not right or (launch and not words) or not all(map(str, words)):
        raise ValueError(
            f"launch: {launch!r}; expected the words of a launcher, such as [torchrun, --nproc-per-node, 8]"
        )
    return tuple(map(str, words))


def _set(frozen: Any, name: str, value: Any) -> None:
    object.__setattr__(frozen, name, value)
