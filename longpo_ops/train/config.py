"""The settings that are ours, beside those of transformers.TrainingArguments.

Tests: tests/train/test_trainer.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from transformers import TrainingArguments

from ..memory.optimizer import refuse_step_in_backward
from ..memory.search import check_lossy
from ..memory.settings import Memory
from .methods import Method, resolve_method

REFERENCES = ("precompute", "online", "data")


@dataclass
class LongPOConfig(TrainingArguments):
    """TrainingArguments with the paper's defaults (5e-7, cosine, 10 % warm-up, 8 sequences a step) and these fields.

    objective: a method of train/methods.py. objective_options: fields of its objective (beta, preference_weight, ...).
    reference: "precompute" computes the reference's log-probs once and keeps them on disk, so that no reference sits in
        memory while training; "online" keeps one beside the policy (with PEFT: the base model); "data" reads them from
        the data set's own columns, which are of the short inputs.
    reference_cache: folder of what "precompute" keeps; default output_dir/reference.
    pack_tokens: budget of a pack; pairs that fit together share one. Default: one pair per pack.
    target_length: spread position ids over this many positions (LOGO's synthesis), 0 for none. Default: the policy's
        max_position_embeddings for logo, none for the others.
    constraint_weight: weight of the KL term of sft_constraint (default 0.1) and sft_constraint_official (0.01).
    workspace_bytes: scratch of the loss (fused_preference_loss).
    memory: tiling, offload and optimizer, the fields of memory.settings.Memory. Default: none of them, transformers' optimizer.
        With states, and with fit, `optim` is one of memory.optimizer.OPTIMS: AdamW or RMSprop with an exact float32 master.
    fit: "auto" lets the planner choose them for the longest pack and this machine; output_dir/memory.json keeps what it chose
        for the run's checkpoints.
    host_bytes: the host's memory, for fit="auto". Default: what is available now; say it where a guest's memory grows as it is
        used.
    allow_lossy: what fit="auto" may store in 8 bits: "nothing", optimizer "states", or "all", layer inputs as well.

    warmup_steps: a number of steps, or below 1 the part of all steps, rounded up as transformers has it, but 0 where it comes
        to less than one step: a warm-up begins with a step at rate 0, which may not be all of a short run.

    A pack is a batch: per_device_train_batch_size stays 1. Raises ValueError for values that make no sense.
    """

    learning_rate: float = field(default=5e-7)
    lr_scheduler_type: str = field(default="cosine")
    warmup_steps: float = field(default=0.1)
    per_device_train_batch_size: int = field(default=1)
    per_device_eval_batch_size: int = field(default=1)
    gradient_accumulation_steps: int = field(default=8)
    gradient_checkpointing: bool = field(default=True)
    logging_steps: float = field(default=1)
    logging_nan_inf_filter: bool = field(default=False)  # it logs a loss that is not finite as 0
    num_train_epochs: float = field(default=1.0)
    remove_unused_columns: bool = field(default=False)
    dataloader_pin_memory: bool = field(default=False)  # a pack stays on the host until the loss has planned it
    report_to: str | list[str] | None = field(default="none")

    objective: str = field(default="longpo", metadata={"help": "training method: longpo, dpo, simpo, sft_chosen, ..."})
    objective_options: dict | None = field(default=None, metadata={"help": "fields of the objective, as JSON"})
    reference: str = field(default="precompute", metadata={"help": "precompute | online | data"})
    reference_cache: str | None = field(default=None, metadata={"help": "folder of precomputed reference log-probs"})
    pack_tokens: int | None = field(default=None, metadata={"help": "token budget of a pack"})
    target_length: int | None = field(default=None, metadata={"help": "spread positions over this length (LOGO)"})
    constraint_weight: float | None = field(default=None, metadata={"help": "weight of the KL term of a constraint"})
    workspace_bytes: int | None = field(default=None, metadata={"help": "scratch bytes of the loss"})
    memory: dict | None = field(default=None, metadata={"help": "settings of memory/settings.py, as JSON"})
    fit: str = field(default="off", metadata={"help": "auto: choose memory settings that fit this machine"})

    host_bytes: int | None = field(default=None, metadata={"help": "of fit: memory of the host, which may still grow"})
    allow_lossy: str = field(default="nothing", metadata={"help": "of fit: nothing | states | all"})

    def __post_init__(self):
        self.method.make_objective(self.objective_options or {})
        if self.reference not in REFERENCES:
            raise ValueError(f"reference={self.reference!r}: expected one of {', '.join(REFERENCES)}")
        if self.reference == "data" and (self.method.constraint or self.method.reference == "long"):
            lacks = "hidden states" if self.method.constraint else "log-probs of the long inputs"
            raise ValueError(
                f"reference='data': {self.objective} needs {lacks}, which data do not hold; "
                "expected 'precompute' or 'online'"
            )
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            if getattr(self, name) != 1:
                raise ValueError(
                    f"{name}={getattr(self, name)}: expected 1, as a pack is a batch; use pack_tokens to put "
                    "several pairs in one and gradient_accumulation_steps for larger steps"
                )
        leasts = {"pack_tokens": 1, "target_length": 0, "workspace_bytes": 1, "host_bytes": 1}
        leasts["gradient_accumulation_steps"] = 1
        for name, least in leasts.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}, or none")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate}: expected a finite number above 0")
        if self.max_steps == 0:
            raise ValueError("max_steps=0: expected a number of steps, or -1 for whole epochs")
        if self.constraint_weight is None:
            self.constraint_weight = self.method.constraint_weight
        if self.constraint_weight <= 0:
            raise ValueError(f"constraint_weight={self.constraint_weight}: expected > 0")
        if self.fit not in ("off", "auto"):
            raise ValueError(f"fit={self.fit!r}: expected 'off' or 'auto'")
        check_lossy(self.allow_lossy)
        if self.allow_lossy != "nothing" and self.fit != "auto":
            raise ValueError(
                f"allow_lossy={self.allow_lossy!r} is of fit='auto'; by hand, name states and store in memory"
            )
        if self.host_bytes is not None and self.fit != "auto":
            raise ValueError(
                f"host_bytes={self.host_bytes} is of fit='auto'; by hand, give the host_bytes of memory for layer inputs"
            )
        if self.fit == "auto" and self.memory:
            raise ValueError("fit='auto' chooses what memory names: expected one of the two")
        memory = Memory.from_settings(self.memory)
        for name in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}=True: expected False, as evaluation computes as training and the reference do"
                )
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True: expected False, as a pack has no columns")
        super().__post_init__()
        if memory.states is not None or self.fit == "auto":
            replace(memory, states=memory.states or "float32").check_optimizer(self)
        if memory.step_in_backward:
            settings = self.gradient_accumulation_steps, self.max_grad_norm, self.world_size, self.mixed_precision
            refuse_step_in_backward(*settings)

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Trainer's, and none where a ratio comes to less than a step."""
        return super().get_warmup_steps(num_training_steps) if self.warmup_steps * num_training_steps >= 1 else 0

    @property
    def device(self) -> torch.device:
        """Trainer's. Of several processes on a CPU it is "cpu:0", "cpu:1", ..., for which torch.load knows no place."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def method(self) -> Method:
        return resolve_method(self.objective)
