"""One training run from settings: load, tokenise, train or resume, save, report. What `longpo train` calls.

settings -> tokenizer, ChatFormat -> PairStore on disk -> LongPOTrainer -> checkpoint, training.png, README.md
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data import ChatFormat, DataReport, packed_length, tokenized_pairs
from ..data.records import data_files
from .config import LongPOConfig
from .report import write_report
from .rows import PairStore, select
from .trainer import LongPOTrainer, last_checkpoint

log = logging.getLogger("longpo_ops.train")

SMALL_STEP = 1e-5  # below this, rounding to bfloat16 keeps 99 % of the weights where they are


@dataclass
class TrainRun:
    """What a run needs beside LongPOConfig (`training`).

    model, data, eval_data: a transformers causal LM (name or folder), files or folders of pairs.
    reference_model: default `model` itself, with the RoPE settings it came with.
    rope_theta, max_position_embeddings: of the policy, for a longer context than the model's own.
    max_length, cut_document, system, on_bad_record: as in data.ChatFormat and data.tokenized_pairs.
    lora_rank: 0 for full fine-tuning. lora_targets: module names, or "all-linear" (never the head).
    dtype: "auto" is the model's own; full fine-tuning below 1e-5 keeps float32 weights and computes in bfloat16.
    resume: go on from the last whole checkpoint in output_dir.
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
    on_bad_record: str = "raise"
    lora_rank: int = 0
    lora_alpha: float | None = None
    lora_targets: str = "all-linear"
    dtype: str = "auto"
    trust_remote_code: bool = False
    resume: bool = True
    training: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> TrainRun:
        """Flat settings, as a YAML file and command line give them. Raises ValueError naming one that nobody knows."""
        own = {f.name for f in dataclasses.fields(cls)} - {"training"}
        known = {f.name for f in dataclasses.fields(LongPOConfig) if f.init} - {"output_dir"}
        unknown = sorted(set(settings) - own - known)
        if unknown:
            raise ValueError(
                f"settings {unknown}: expected names of TrainRun ({', '.join(sorted(own))}) or LongPOConfig"
            )
        missing = [name for name in ("model", "data", "output_dir") if not settings.get(name)]
        if missing:
            raise ValueError(
                f"settings: {', '.join(missing)} missing; give them in the config file or on the command line"
            )
        training = {name: value for name, value in settings.items() if name in known}
        return cls(**{name: value for name, value in settings.items() if name in own}, training=training)

    def config(self) -> LongPOConfig:
        """LongPOConfig of the run. Raises ValueError for values it refuses."""
        training = dict(self.training)
        if self.keeps_master():
            training.setdefault("bf16", True)
        return LongPOConfig(output_dir=self.output_dir, **training)

    def keeps_master(self) -> bool:
        """Whether weights stay in float32 while the body computes in bfloat16: small steps would be rounded away."""
        rate = float(self.training.get("learning_rate", LongPOConfig.learning_rate))
        return not self.lora_rank and rate < SMALL_STEP and self._model_dtype() == torch.bfloat16

    def _model_dtype(self) -> torch.dtype:
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        return self._auto_config(self.model).dtype or torch.float32

    def _auto_config(self, name: str):
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(name, trust_remote_code=self.trust_remote_code)

    # -- pieces ------------------------------------------------------------------------------------------------------

    def load_tokenizer(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model, trust_remote_code=self.trust_remote_code)

    def load_pairs(self, path: str, tokenizer, vocab_size: int) -> tuple[PairStore, DataReport | None]:
        """Tokenised pairs of `path`, from output_dir/data if they were made of the same files and settings before."""
        chat = ChatFormat(tokenizer, system=self.system, max_length=self.max_length, cut_document=self.cut_document)
        files = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in data_files(path)]
        key = [files, chat.fingerprint, tokenizer.chat_template, self.system, self.max_length, self.cut_document]
        key += [self.on_bad_record, self.supervised()]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        file = Path(self.output_dir) / "data" / f"pairs-{digest}.parquet"
        if file.exists():
            return PairStore(file), None
        report = DataReport()
        pairs = tokenized_pairs(path, chat, vocab_size, self.on_bad_record, report, allow_equal=self.supervised())
        return PairStore.write(pairs, file, chat.fingerprint), report

    def supervised(self) -> bool:
        """Whether the method reads one answer only, so that equal answers do no harm."""
        return self.training.get("objective", LongPOConfig.objective).startswith("sft_")

    def load_model(self, name: str, policy: bool):
        """A causal LM from safetensors; the policy with its RoPE settings, adapters and float32 weights where needed."""
        from transformers import AutoModelForCausalLM

        config = self._auto_config(name)
        dtype = "auto" if self.dtype == "auto" else getattr(torch, self.dtype)
        if policy:
            if self.rope_theta is not None:
                config.rope_parameters = {**config.rope_parameters, "rope_theta": float(self.rope_theta)}
            if self.max_position_embeddings is not None:
                config.max_position_embeddings = self.max_position_embeddings
            if self.keeps_master():
                dtype = torch.float32
        model = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=self.trust_remote_code
        )
        return self._with_adapters(model) if policy and self.lora_rank else model

    def _with_adapters(self, model):
        from peft import LoraConfig, get_peft_model

        alpha = 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        targets = self.lora_targets if self.lora_targets == "all-linear" else self.lora_targets.split(",")
        model.enable_input_require_grads()
        return get_peft_model(
            model, LoraConfig(r=self.lora_rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
        )


def describe(pairs: PairStore, config: LongPOConfig) -> dict[str, Any]:
    """Counts and lengths of what a run would read."""
    lengths, rows = [], []
    for pair in pairs:
        selected = select(pair, config.method)
        lengths.append(selected.length)
        rows.append(packed_length(selected))
    ordered = sorted(lengths)
    return {
        "pairs": len(lengths),
        "longest sequence": ordered[-1],
        "median sequence": ordered[len(ordered) // 2],
        "tokens of separate sequences": sum(
            len(s) for p in pairs for s in (select(p, config.method).chosen, *select(p, config.method).rejected)
        ),
        "tokens of packed rows": sum(rows),
    }


def prepare(run: TrainRun) -> tuple[LongPOConfig, Any, PairStore, PairStore | None]:
    """-> config, tokenizer, training pairs and evaluation pairs; every record has been checked."""
    config = run.config()
    tokenizer = run.load_tokenizer()
    vocab_size = run._auto_config(run.model).vocab_size
    stores = []
    for path in (run.data, run.eval_data):
        store, report = run.load_pairs(path, tokenizer, vocab_size) if path else (None, None)
        if report is not None:
            log.info("%s: %s", path, report)
        stores.append(store)
    return config, tokenizer, *stores


def train(run: TrainRun) -> LongPOTrainer:
    """Trains or resumes a run to its end; the model, figure and card are in output_dir."""
    config, tokenizer, pairs, evaluation = prepare(run)
    policy = run.load_model(run.model, policy=True)
    reference = None
    needs_model = config.method.reference is not None and config.reference != "data"
    if needs_model and (run.reference_model is not None or not run.lora_rank):
        reference = run.load_model(run.reference_model or run.model, policy=False).to(config.device)
    trainer = LongPOTrainer(
        policy,
        config,
        pairs,
        evaluation,
        reference_model=reference,
        reference_config=run._auto_config(run.model) if run.lora_rank else None,
        processing_class=tokenizer,
    )
    del reference
    checkpoint = last_checkpoint(run.output_dir) if run.resume else None
    if checkpoint is not None:
        log.info("going on from %s", checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        write_report(trainer, run.model)
    return trainer
