"""Every part of the library is asked whether it takes a model, and the run itself whether it would start.

    settings of `longpo train` -> TrainRun on a pair made here -> prepare(run)                the verdict: that of its dry run
                                                               -> a question for each part    what it found, or why not

The verdict is what train.run.prepare says, which begins every run and every dry run: no part adds to it or takes from it. The
parts say why, by the library's own functions, on a model on the meta device; one that refuses hides no other. With a length
the planner is asked too, and where it plans this kind of model and run, the verdict is that of `fit: auto`.

Of weights no more is read than headers. Not covered, as in a dry run: what only numbers tell (NaN, weights of zeros).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import shlex
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..attention import explain_attention, use_shared_prefix
from ..data import ChatFormat, Pair, TokenizedPair
from ..memory.host_memory import available_host_bytes, gib
from ..memory.offload import offload_activations
from ..memory.plan import Plan
from ..memory.plan_report import describe_settings
from ..memory.search import NothingFits
from ..memory.tiling import tile_layers
from ..ops.dispatch import explain_backend
from ..ops.head import attach, detach
from ..ops.head_weight import read_head
from ..pretrained import check_stored_head
from ..pretrained.loading import explain
from ..pretrained.tokenizer import check_round_trip
from ..runs.journal import write_text
from ..train.arithmetic import base_model
from ..train.checks import check_separate, plan_memory, target_length
from ..train.packed import batch_of, select
from ..train.run import TrainRun, prepare
from .pair import make_record, sized_record

FIXED = ("data", "eval_data", "output_dir")  # of a run: made here, for as long as it is looked at


@dataclass(frozen=True)
class Part:
    """What was asked. takes: None where nobody could say, as another part refused. told: what was found, or why not."""

    name: str
    takes: bool | None
    told: str


@dataclass(frozen=True)
class Examination:
    """starts: whether training would. command: the one to run next, None where it would not. plan: of the length asked for."""

    model: str
    starts: bool
    parts: tuple[Part, ...]
    plan: Plan | None
    command: str | None


def examine(settings: dict[str, Any], length: int | None = None) -> Examination:
    """settings: those of a training run but for data and output_dir, `model` among them. length: tokens of a pair's pack, for
    the plan; None asks for none, with a short pair.

    Raises ValueError for settings that make no run. What is refused of the model is a part of the answer.
    """
    if given := [name for name in FIXED if name in settings]:
        raise ValueError(
            f"settings: {', '.join(given)} came; expected none of {', '.join(FIXED)}, as a pair is made here: "
            "`longpo train --dry-run` checks data of your own"
        )
    if length is not None and length < 1:
        raise ValueError(f"length={length}: expected a number of tokens from 1")
    with tempfile.TemporaryDirectory() as folder:
        made = {"data": f"{folder}/pairs.jsonl", "output_dir": f"{folder}/run"}
        return _Examiner(TrainRun.from_settings(settings | made), length).examine(settings)


class _Examiner:
    def __init__(self, run: TrainRun, length: int | None):
        self.run, self.length, self.config = run, length, run.config()
        self.parts: list[Part] = []
        self.known: dict[str, Any] = {}

    def ask(self, name: str, question: Callable[..., tuple[Any, str]], *needs: str) -> None:
        """question: takes what the parts it needs found -> what it found, and how to tell it."""
        if lacking := [need for need in needs if need not in self.known]:
            self.parts.append(Part(name, None, f"not known without {', '.join(lacking)}"))
            return
        try:
            found, told = question(*(self.known[need] for need in needs))
        except Exception as error:  # whatever it is, the other parts are asked
            self.parts.append(Part(name, False, explain(error)))
            return
        self.known[name] = found
        self.parts.append(Part(name, True, told))

    def examine(self, settings: dict[str, Any]) -> Examination:
        self.ask("config", self._config)
        self.ask("weights", self._weights, "config")
        self.ask("head", self._head, "weights")
        self.ask("shared prefix", self._shared_prefix, "weights")
        self.ask("separate sequences", self._separate, "weights", "head")
        self.ask("tiles", self._tiles, "weights")
        self.ask("offload", self._offload, "weights")
        self.ask("tokenizer", self._tokenizer, "config")
        self.ask("chat template", self._template, "tokenizer")
        self.ask("pair", self._pair, "chat template")
        self.ask("back-end", self._backend, "weights")
        self.ask("attention kernels", self._kernels, "weights", "shared prefix", "pair")
        self.ask("machine", self._machine)
        if self.length is not None and self.config.fit == "off" and not self.config.memory:
            self.ask("planner", self._plan, "weights", "pair")
        if "pair" not in self.known:
            self._write(make_record())
        self.ask("training", self._training)
        starts = "training" in self.known
        plan = self.known["training"].plan if starts else None
        return Examination(self.run.model, starts, tuple(self.parts), plan, self._command(settings) if starts else None)

    # -- the model ---------------------------------------------------------------------------------------------------

    def _config(self) -> tuple[Any, str]:
        config = self.run.read_config(self.run.model)
        names = {"num_hidden_layers": "layers", "hidden_size": "wide", "num_attention_heads": "heads"}
        names |= {"num_key_value_heads": "kv heads", "vocab_size": "rows of vocabulary"}
        names |= {"max_position_embeddings": "positions"}
        sizes = [f"{getattr(config, name):,} {word}" for name, word in names.items() if getattr(config, name, None)]
        return config, f"{config.model_type}: {', '.join(sizes)}"

    def _weights(self, config) -> tuple[nn.Module, str]:
        model = self.run.empty_model(self.run.model, policy=True)
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        told = f"{sum(n for n, _ in sizes):,} as the config has them, {_dtype(base_model(model))}"
        stored = getattr(config, "quantization_config", None)
        told += "; stored quantised, compared as they are loaded" if stored else ""
        trained = sum(n for n, trains in sizes if trains)
        return model, told + (f"; {trained:,} in adapters train" if self.run.lora_rank else "")

    def _head(self, model: nn.Module) -> tuple[bool, str]:
        attach(model)
        detach(model)
        weight, _ = read_head(model.get_output_embeddings(), merge_lora=False)
        check_stored_head(self.run.model, base_model(model))
        return True, f"the loss takes its {weight.shape[0]:,} x {weight.shape[1]:,} and makes no logits"

    def _shared_prefix(self, model: nn.Module) -> tuple[bool, str]:
        with use_shared_prefix(base_model(model)):
            return True, "a pair is one sequence, its document computed once"

    def _separate(self, model: nn.Module, head: bool) -> tuple[bool, str]:
        check_separate(model, self.config, target_length(model, self.config))
        return True, "one by one by the model's own attention, with separate"

    def _tiles(self, model: nn.Module) -> tuple[bool, str]:
        with tile_layers(model):
            return True, "layers work by tiles of rows"

    def _offload(self, model: nn.Module) -> tuple[bool, str]:
        with offload_activations(model, host_bytes=0):
            return True, "what layers keep for the backward may wait in host memory or on disk"

    # -- its texts ---------------------------------------------------------------------------------------------------

    def _tokenizer(self, config) -> tuple[Any, str]:
        tokenizer = self.run.load_tokenizer()
        lost = check_round_trip(self.run.model, tokenizer)
        told = f"{len(tokenizer):,} tokens for {config.vocab_size:,} rows of the embedding; texts come back "
        return tokenizer, told + (f"but for {'; '.join(lost)}" if lost else "as they were")

    def _template(self, tokenizer) -> tuple[ChatFormat, str]:
        """The made pair formatted; told is its short input, with what is trained in brackets."""
        chat = self.run.chat_format(tokenizer)
        sequence = chat.tokenize(Pair.from_record(make_record())).ref_chosen[0]
        parts, is_answer = [], sequence.labels != -100
        edges = [0, *(i for i in range(1, len(sequence)) if is_answer[i] != is_answer[i - 1]), len(sequence)]
        for first, last in itertools.pairwise(edges):
            text = tokenizer.decode(sequence.ids[first:last], clean_up_tokenization_spaces=False)
            parts.append(f"[[{text}]]" if is_answer[first] else text)
        return chat, f"an answer in brackets: {''.join(parts)!r}"

    def _pair(self, chat: ChatFormat) -> tuple[TokenizedPair, str]:
        record = sized_record(chat, self.length)
        self._write(record)
        pair = chat.tokenize(Pair.from_record(record))
        long, short = len(pair.chosen), len(pair.ref_chosen[0])
        batch = batch_of(self.config.method, [select(pair, self.config.method)])
        return (
            pair,
            f"made here: {batch.layout.length:,} tokens packed; chosen {long:,}, read by the reference {short:,}",
        )

    def _write(self, record: dict) -> None:
        write_text(Path(self.run.data), json.dumps(record) + "\n")

    # -- the machine -------------------------------------------------------------------------------------------------

    def _backend(self, model: nn.Module) -> tuple[bool, str]:
        return True, explain_backend(self.config.device, base_model(model).dtype)

    def _kernels(self, model: nn.Module, shared: bool, pair: TokenizedPair) -> tuple[bool, str]:
        layout = batch_of(self.config.method, [select(pair, self.config.method)]).layout
        return True, explain_attention(base_model(model), layout, self.config.device)

    def _machine(self) -> tuple[bool, str]:
        cards = []
        if torch.cuda.is_available():
            for number in range(torch.cuda.device_count()):
                free, total = torch.cuda.mem_get_info(number)
                cards.append(f"{torch.cuda.get_device_name(number)}, {gib(free)} free of {gib(total)}")
        host = f"{os.cpu_count()} CPU cores, {gib(available_host_bytes())} of host memory available"
        told = f"{'; '.join(cards) or 'no GPU'}; {host}; Python {platform.python_version()}, torch {torch.__version__}"
        return True, told

    # -- the run -----------------------------------------------------------------------------------------------------

    def _plan(self, model: nn.Module, pair: TokenizedPair) -> tuple[Plan | None, str]:
        """Whether a run like this is planned at all. That it does not fit is told by the run itself."""
        planned = dataclasses.replace(self.run, training=self.run.training | {"fit": "auto"})
        config = planned.config()
        with suppress(NothingFits):
            plan_memory(model, config, [[pair]], None, "shared prefix" not in self.known or config.separate)
        self.run = planned
        return None, "plans this model and run: the verdict is that of fit auto"

    def _training(self) -> tuple[Any, str]:
        prepared = prepare(self.run)
        told = "would start"
        if prepared.separate is not None:
            told += f", with separate sequences: {prepared.separate}"
        return prepared, told + (f"; {_planned(prepared.plan)}" if prepared.plan is not None else "")

    def _command(self, settings: dict[str, Any]) -> str:
        words = ["longpo", "train", "--model", self.run.model, "--data", "pairs.jsonl", "--output-dir", "run"]
        auto = {"fit": "auto"} if self.run.training.get("fit") == "auto" else {}
        for name, value in (settings | auto).items():
            if name in ("lora_rank", "fit"):
                words += [f"--{name.replace('_', '-')}", str(value)]
            elif name != "model":
                words += ["--set", f"{name}={json.dumps(value)}"]
        return shlex.join(words)


def _planned(plan: Plan) -> str:
    held = f"{gib(plan.peak.total)} of {gib(plan.machine.device_bytes)} on the device at its peak ({plan.peak.name})"
    host = f", {gib(sum(plan.host.values()))} on the host" if plan.host else ""
    return (
        f"a pack of {plan.work.length:,} tokens takes {held}{host}: {describe_settings(plan)} (derived, not measured)"
    )


def _dtype(model: nn.Module) -> str:
    return str(model.dtype).removeprefix("torch.")
