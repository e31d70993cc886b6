"""One training run from settings: load, tokenise, train or resume, save, report. What `longpo train` calls.

settings -> tokenizer, ChatFormat -> PairStore on disk -> LongPOTrainer -> checkpoint, training.png, README.md
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainerCallback, set_seed

from .. import launch, recipes
from ..data import ChatFormat, DataReport, tokenized_pairs
from ..data.chat import format_of
from ..data.context import TextFormat
from ..data.records import data_files
from ..data.tokenized import NLL_TOKENS
from ..memory.plan import Plan
from ..parallel.mesh import check_alike
from ..pretrained import (
    DTYPES,
    NONE,
    check_ids,
    check_scheme,
    check_trainable,
    check_weights,
    check_whole,
    load_model,
    load_tokenizer,
    read_whole_config,
    replace_rope,
    text_config,
)
from ..pretrained.template_kwargs import check_values
from ..runs.journal import write_text
from ..runs.settings_file import settle
from ..runs.validate import check_kinds
from .adapters import ALL_LINEAR, add_adapters
from .checkpoints import check_going_on, check_one_folder, clear_killed, last_checkpoint, one_run
from .checks import (
    agreed_memory,
    check_model,
    check_packs,
    check_pairs,
    check_positions,
    check_schedule,
    count_steps,
    needs_reference,
    packs_of,
    plan_memory,
    target_length,
    tell_anew,
)
from .config import LongPOConfig
from .identity import Identity, holds_run, tokenizer_digest
from .methods import Method, resolve_method
from .packed import DIGESTS, PairStore, rows_of, select
from .ranks import check_ranks, weights_digest
from .report import write_report
from .trainer import LongPOTrainer

log = logging.getLogger("longpo_ops.train")

OF_ADAPTERS = ("use_rslora", "quantization")
ACCUMULATION = "gradient_accumulation_steps"


@dataclass
class TrainRun:
    """What a run needs beside LongPOConfig (`training`).

    model, data, eval_data: a transformers causal LM (name or folder), files or folders of pairs.
    reference_model: another than `model`, with the RoPE settings it came with. `model` itself, the default, has its own where
        the method's reference reads short inputs alone, and those of the policy where it reads the long ones.
    rope_theta, max_position_embeddings: of the policy, for a longer context than the model's own.
    max_length, cut_document, system, template_kwargs, on_bad_record: as in data.ChatFormat and data.tokenized_pairs.
    recipe: "default", or "official", the published one: what is not given, here or in `training`, is the recipe's
        (recipes.py). What contradicts it stays as it was given, is told, and is named in `title`. A step of the official
        one has 8 sequences over all processes (WORLD_SIZE / sequence_parallel have sequences of their own); another
        objective than its own keeps its own options. Records of equal answers, which `default` refuses, are trained on.
    nll_tokens: which tokens the NLL term counts, "contents" or "all" (data.tokenized_pairs); None is the recipe's.
    text_only: of a model that also reads pictures or sound, train its text model and save that alone; others are text models.
    lora_rank: 0 for full fine-tuning. lora_alpha, lora_dropout, lora_target_modules, lora_target_parameters, use_rslora: as
        PEFT has them (adapters.add_adapters); the base is the reference.
    quantization: "none", or how the body's linear layers are stored while adapters train on them (QLoRA), "int8" or "nf4"
        (pretrained/quantised.py). A model that is stored quantised needs adapters, too, and no setting.
    dtype: "auto" is the model's own. What is saved at the end has it, whatever training kept (LongPOTrainer).

    A run goes on from the last whole checkpoint in output_dir. Raises ValueError for values of another kind.
    """

    model: str
    data: str
    output_dir: str
    eval_data: str | None = None
    reference_model: str | None = None
    rope_theta: float | None = None
    max_position_embeddings: int | None = None
    max_length: int | None = None
    cut_document: bool = False
    system: str | None = None
    template_kwargs: dict | None = None
    on_bad_record: str = "raise"
    recipe: str = recipes.DEFAULT
    nll_tokens: str | None = None
    text_only: bool = False
    lora_rank: int = 0
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_target_modules: str = ALL_LINEAR
    lora_target_parameters: str | None = None
    use_rslora: bool = False
    quantization: str = NONE
    dtype: str = "auto"
    trust_remote_code: bool = False
    training: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> TrainRun:
        """Flat settings, as a YAML file and command line give them. Raises ValueError naming one that nobody knows."""
        settings = settle(settings, cls, LongPOConfig)
        own = {f.name for f in dataclasses.fields(cls)} - {"training"}
        known = {f.name for f in dataclasses.fields(LongPOConfig) if f.init} - {"output_dir"}
        for name in sorted(map(str, set(settings) - own - known)):
            near = difflib.get_close_matches(name, own | known, 3)
            meant = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"setting {name!r} is none of TrainRun ({', '.join(sorted(own))}) or LongPOConfig{meant}")
        missing = [name for name in ("model", "data", "output_dir") if not settings.get(name)]
        if missing:
            raise ValueError(
                f"settings: {', '.join(missing)} missing; give them in the config file or on the command line"
            )
        training = {name: value for name, value in settings.items() if name in known}
        return cls(**{name: value for name, value in settings.items() if name in own}, training=training)

    def __post_init__(self):
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "training"}
        check_kinds(own, TrainRun)
        check_kinds(self.training, LongPOConfig)
        self.template_kwargs = check_values(self.template_kwargs) or None
        recipes.check_recipe(self.recipe)
        if self.nll_tokens not in (None, *NLL_TOKENS):
            raise ValueError(f"nll_tokens={self.nll_tokens!r}: expected one of {', '.join(NLL_TOKENS)}")
        for name, choices in (("on_bad_record", ("raise", "skip")), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(choices)}")
        if self.training.get("resume_from_checkpoint") is not None:
            raise ValueError(
                "resume_from_checkpoint: leave it out; a run goes on from the last checkpoint in output_dir"
            )
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank={self.lora_rank}: expected 0 for full fine-tuning, or a rank")
        check_scheme(self.quantization)
        for name in ("rope_theta", "max_position_embeddings", "max_length", "lora_alpha"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name}={value}: expected more than 0, or none")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout}: expected a number from 0 to 1")
        self._refuse_without_adapters()
        if Path(self.output_dir).is_file():
            raise ValueError(f"output_dir={self.output_dir} is a file: expected a folder, or a name that is free")
        for name in ("model", "reference_model"):
            folder = getattr(self, name)
            if folder and Path(folder).is_dir() and Path(folder).resolve() == Path(self.output_dir).resolve():
                raise ValueError(
                    f"output_dir={self.output_dir}: holds the {name}, which would be overwritten; give another"
                )
        given = self._given()
        recipes.warn(recipes.tell(self.recipe, "train", given, self._fill(given)[1]))

    def _refuse_without_adapters(self) -> None:
        """Raises ValueError for settings that adapters alone read."""
        names = [f for f in dataclasses.fields(self) if f.name.startswith("lora_") or f.name in OF_ADAPTERS]
        idle = [f"{f.name}={getattr(self, f.name)!r}" for f in names if getattr(self, f.name) != f.default]
        if idle and not self.lora_rank:
            raise ValueError(
                f"{', '.join(idle)}: of adapters, and lora_rank is 0; set lora_rank (16, say), or leave it out"
            )

    # -- settings ----------------------------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        """What run.json and the model card call the recipe: "official", or "official with changes (learning_rate)"."""
        return recipes.title(self.recipe, self._fill(self._given())[1])

    def settings(self) -> dict[str, Any]:
        """Of this run and of LongPOConfig, by name: the given ones over the recipe's. Nothing is kept, so that a copy of a
        run with other settings (dataclasses.replace) is filled in as one made with them."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "training"}
        return own | self.training | self._fill(self._given())[0]

    def _given(self) -> dict[str, Any]:
        """The given settings that a recipe may judge; packs a step as those of all processes."""
        own = {
            name: getattr(self, name) for name in ("nll_tokens", "lora_rank", "rope_theta", "cut_document", "system")
        }
        given = {name: value for name, value in (own | self.training).items() if value is not None}
        return given | {name: given[name] * self._data_ranks() for name in (ACCUMULATION,) if name in given}

    def _fill(self, given: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """-> given settings and the recipe's under them, and the names of those that contradict it."""
        settings, changed = recipes.fill(self.recipe, "train", given)
        if "objective" in changed:  # another method has other options
            settings["objective_options"] = given.get("objective_options")
            changed = tuple(name for name in changed if name != "objective_options")
        if ACCUMULATION in settings:
            settings[ACCUMULATION], rest = divmod(packs := settings[ACCUMULATION], self._data_ranks())
            if rest:
                raise ValueError(
                    f"recipe={self.recipe!r} has {packs} sequences a step, which {self._data_ranks()} processes (WORLD_SIZE / "
                    f"sequence_parallel) cannot share evenly; start as many as divide it, or give {ACCUMULATION}"
                )
        return settings, changed

    def _data_ranks(self) -> int:
        """Processes, or groups of them that share packs, which have packs of their own."""
        return launch.data_ranks(launch.sequence_parallel(self.training.get("sequence_parallel")))

    def config(self) -> LongPOConfig:
        """LongPOConfig of the run. Raises ValueError for values it refuses."""
        own = {f.name for f in dataclasses.fields(self)}
        given = {name: value for name, value in self.settings().items() if name not in own}
        return LongPOConfig(output_dir=self.output_dir, **given)

    @property
    def method(self) -> Method:
        """Of the run. Asks for no process group, as a LongPOConfig does behind a launcher."""
        return resolve_method(self.settings().get("objective", LongPOConfig.objective))

    def read_config(self, name: str):
        """The transformers config of a model of the run (pretrained.read_config). Raises ValueError for a policy that also
        reads pictures or sound, unless its text model alone is wanted."""
        whole = read_whole_config(name, self.trust_remote_code)
        if name == self.model:
            check_whole(whole, self.text_only, self.lora_rank)
        return text_config(whole)

    def all_settings(self) -> dict[str, Any]:
        """As they will be used: those of this run, LongPOConfig's own, and others that were set. The recipe by its title."""
        config, ours, settings = self.config(), LongPOConfig.__annotations__, self.settings()
        own = {f.name for f in dataclasses.fields(self)}
        used = {name: getattr(config, name) for name in [*ours, *(name for name in settings if name not in own)]}
        return {name: value for name, value in settings.items() if name in own} | used | {"recipe": self.title}

    # -- pieces ------------------------------------------------------------------------------------------------------

    def load_tokenizer(self):
        """The policy's. Raises ValueError if it loses text, or writes ids that policy or reference have no row for."""
        tokenizer = load_tokenizer(self.model, self.trust_remote_code, self.read_config(self.model).vocab_size)
        if self.reference_model is not None:
            check_ids(self.reference_model, tokenizer, self.read_config(self.reference_model).vocab_size)
        return tokenizer

    def chat_format(self, tokenizer) -> ChatFormat | TextFormat:
        """How texts become tokens of this run. Raises ValueError for a template that cannot be used."""
        given = {name: getattr(self, name) for name in ("system", "max_length", "cut_document", "template_kwargs")}
        return format_of(tokenizer, **given)

    def load_pairs(self, path: str, tokenizer, vocab_size: int) -> PairStore:
        """Tokenised pairs of `path`, from output_dir/data if they were made of the same files and settings before."""
        chat = self.chat_format(tokenizer)
        files = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in data_files(path)]
        key = [files, tokenizer_digest(tokenizer), vocab_size, tokenizer.chat_template, self.system, self.max_length]
        nll_tokens = self.settings()["nll_tokens"]
        key += [self.cut_document, self.on_bad_record, self.allows_equal(), nll_tokens]
        key += [self.template_kwargs] if self.template_kwargs else []
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        file = Path(self.output_dir) / "data" / f"pairs-{digest}.parquet"
        told = file.with_suffix(".txt")
        if not all(each.exists() for each in (file, told, file.with_suffix(DIGESTS))):
            report = DataReport()
            pairs = tokenized_pairs(
                path, chat, vocab_size, self.on_bad_record, report, self.allows_equal(), nll_tokens=nll_tokens
            )
            PairStore.write(pairs, file, chat.fingerprint)
            write_text(told, f"{report}\n")
        log.info("%s: %s", path, told.read_text(encoding="utf-8").rstrip())
        return PairStore(file)

    def allows_equal(self) -> bool:
        """Whether chosen and rejected answers may be equal: where the method reads one of them only, and as published."""
        return self.method.objective is None or self.recipe == recipes.OFFICIAL

    def load_model(self, name: str, policy: bool):
        """A causal LM from safetensors; the policy with the run's RoPE settings, quantisation and adapters."""
        model = load_model(name, *self._how(name, policy))
        return self._with_adapters(model) if policy and self.lora_rank else model

    def empty_model(self, name: str, policy: bool):
        """The same on the meta device in full precision; of its weights no more than names and shapes are read."""
        model = check_weights(name, *self._how(name, policy))
        return self._with_adapters(model) if policy and self.lora_rank else model

    def is_quantised(self, name: str) -> bool:
        """Whether the weights of a policy of this name are, stored so or made so."""
        return self.quantization != NONE or getattr(self.read_config(name), "quantization_config", None) is not None

    def _how(self, name: str, policy: bool) -> tuple:
        """What load_model and check_weights are given. Raises ValueError for a quantised policy that cannot be trained."""
        config = self.model_config(name, policy)
        if policy and getattr(config, "quantization_config", None) is not None:
            if not self.lora_rank:
                raise ValueError(
                    f"model {name!r}: its weights are quantised, which steps of full fine-tuning cannot move; set lora_rank "
                    "(16, say) to train adapters on them, or give the model in full precision"
                )
            check_trainable(name, config)
        return config, self.dtype, self.trust_remote_code, self.quantization if policy else NONE

    def model_config(self, name: str, policy: bool):
        config = self.read_config(name)
        if not policy and not self.reference_is_policy():
            return config
        theta = self.settings()["rope_theta"]
        if theta is not None:
            replace_rope(config, {"rope_theta": float(theta)}, None)
        if self.max_position_embeddings is not None:
            config.max_position_embeddings = self.max_position_embeddings
        return config

    def reference_is_policy(self) -> bool:
        """Whether the reference is the policy as it begins, its RoPE included: what reads the long input must be able to."""
        return self.reference_model is None and self.method.reference in ("long", "both")

    def _with_adapters(self, model):
        return add_adapters(
            model,
            self.lora_rank,
            self.lora_alpha,
            self.lora_dropout,
            self.lora_target_modules,
            self.lora_target_parameters,
            self.use_rslora,
        )


@dataclass(frozen=True)
class Prepared:
    """A run that may begin. steps: of its whole length. plan: what `fit: auto` chooses for it; None for a run with memory
    settings of its own, or that goes on with those it keeps. separate: why its sequences are, None where they are packed."""

    config: LongPOConfig
    tokenizer: PreTrainedTokenizerBase
    pairs: PairStore
    evaluation: PairStore | None
    steps: int
    plan: Plan | None
    separate: str | None

    def describe(self) -> dict[str, int]:
        """Counts and lengths of what the run would read; tokens are those of an epoch."""
        method = self.config.method
        selected = [select(pair, method) for pair in self.pairs]
        lengths = sorted(pair.length for pair in selected)
        packed = {} if self.separate else {"tokens of packs": sum(rows_of(method, pair) for pair in selected)}
        return {
            "pairs": len(lengths),
            "shortest sequence": lengths[0],
            "median sequence": lengths[len(lengths) // 2],
            "longest sequence": lengths[-1],
            **packed,
            "tokens of separate sequences": sum(rows_of(method, pair, separate=True) for pair in selected),
            "optimizer steps": self.steps,
        }


def prepare(run: TrainRun) -> Prepared:
    """Raises ValueError for whatever the run would refuse: of the model and its tokenizer before anything is tokenised, of
    every record before weights are read; of what several processes must have alike, first of all. What a run tells once is
    told anew."""
    tell_anew()
    config = run.config()
    check_ranks(config, {})
    check_one_folder(config)
    vocab_size = run.read_config(run.model).vocab_size
    (policy, separate), tokenizer = check_model(run, config), run.load_tokenizer()
    with config.main_process_first(local=False):
        pairs = run.load_pairs(run.data, tokenizer, vocab_size)
        evaluation = run.load_pairs(run.eval_data, tokenizer, vocab_size) if run.eval_data else None
    datasets, target = [pairs, evaluation] if evaluation else [pairs], target_length(policy, config)
    check_positions(policy, max(check_pairs(each, config, target, separate is not None) for each in datasets))
    packs = [packs_of(each, config, target, separate is not None) for each in datasets]
    check_packs(policy, packs)
    steps = count_steps(len(packs[0]), config)
    check_schedule(steps, config)
    plan = _plan(run, config, datasets, separate is not None)
    return Prepared(config, tokenizer, pairs, evaluation, steps, plan, separate)


def _plan(run: TrainRun, config: LongPOConfig, datasets: list[PairStore], separate: bool) -> Plan | None:
    if config.fit != "auto" or agreed_memory(config) is not None:
        return None
    beside = config.method.reference is not None and config.reference == "online"
    beside = beside and (run.reference_model is not None or not run.lora_rank)  # of adapters it is the base
    reference = run.empty_model(run.reference_model or run.model, policy=False) if beside else None
    policy = run.empty_model(run.model, policy=True)
    return plan_memory(policy, config, datasets, reference, separate, run.quantization)


def check_output(run: TrainRun, prepared: Prepared) -> None:
    """Raises ValueError where train() would: output_dir holds another run, or a checkpoint that is not whole. Of run.json
    and the checkpoints nothing is written."""
    checkpoint = last_checkpoint(run.output_dir)
    if checkpoint is None and not holds_run(run.output_dir):
        return  # and no weights are read for their digest
    ended = Identity.of(run, prepared).begin(checkpoint)
    if ended is None and checkpoint is not None:
        check_going_on(checkpoint, prepared.steps, prepared.config)


def train(run: TrainRun, progress: TrainerCallback | None = None) -> LongPOTrainer:
    """Trains or resumes a run to its end; the model, figure and card are in output_dir. progress: instead of a bar.

    A run that is finished stays as it is, and its trainer comes back with the model it left. Raises ValueError where
    output_dir holds another run or a checkpoint that is not whole, where another process is at work in it, and where nothing
    was trained; OSError, with a path and the system's reason, for what cannot be written: mend it and run the same again.
    """
    config = run.config()
    for name in filter(None, (run.model, run.reference_model)):
        run.read_config(name)  # where one is refused, output_dir is not made
    for path in filter(None, (run.data, run.eval_data)):
        data_files(path)
    with one_run(config):
        return _train(run, progress)


def _train(run: TrainRun, progress: TrainerCallback | None) -> LongPOTrainer:
    prepared = prepare(run)
    set_seed(prepared.config.seed)  # adapters are drawn before Trainer sets it
    checkpoint = last_checkpoint(run.output_dir)
    with prepared.config.main_process_first(local=False):
        identity = Identity.of(run, prepared)
        ended = identity.begin(checkpoint)
    check_alike(
        {name: str(value) for name, value in identity.values.items()} | {"last checkpoint": f"{checkpoint}, {ended}"}
    )
    if ended is not None:
        log.info("%s holds this run, which ended at step %d: nothing is left to do", run.output_dir, ended)
    elif checkpoint is not None:
        check_going_on(checkpoint, prepared.steps, prepared.config)
        log.info("going on from %s", checkpoint)
    clear_killed(prepared.config, checkpoint is not None or holds_run(run.output_dir))
    policy = run.load_model(run.model, policy=True)
    dtype, untrained = policy.dtype, weights_digest(policy)  # training may hold it in another
    trainer = _make_trainer(run, policy, prepared)
    if progress is not None:
        for shown in (ProgressCallback, PrinterCallback):
            trainer.pop_callback(shown)
        trainer.add_callback(progress)
    if ended is not None:
        trainer.restore(run.output_dir)
        return trainer
    identity.keep_memory(trainer.memory)
    trainer.add_callback(_UnderWay(identity))
    trainer.train(resume_from_checkpoint=checkpoint)
    if not run.lora_rank:
        trainer.model.to(dtype)
        trainer.check_moved(untrained, f"they are lost in rounding to {dtype}, in which the model is saved")
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_report(trainer, run.model, run.title)
        identity.end(trainer.state.global_step)
    return trainer


class _UnderWay(TrainerCallback):
    """Puts down what began once nothing can refuse it any more: a start that is refused leaves run.json as it was."""

    def __init__(self, identity: Identity):
        self._identity = identity

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            self._identity.under_way()


def _make_trainer(run: TrainRun, policy, prepared: Prepared) -> LongPOTrainer:
    config, reference = prepared.config, None
    if needs_reference(config) and (run.reference_model is not None or not run.lora_rank):
        reference = run.load_model(run.reference_model or run.model, policy=False).to(config.device)
    return LongPOTrainer(
        policy,
        config,
        prepared.pairs,
        prepared.evaluation,
        reference_model=reference,
        reference_config=run.model_config(run.model, policy=False) if run.lora_rank else None,
        processing_class=prepared.tokenizer,
    )
