"""The settings that are ours, beside those of transformers.TrainingArguments.

Tests: tests/train/test_trainer.py, tests/train/test_config.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from typing import get_args, get_type_hints

import numpy as np
import torch
from accelerate import ParallelismConfig
from transformers import SchedulerType, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from .. import launch
from ..memory.optimizer import refuse_step_in_backward
from ..memory.search import check_lossy
from ..memory.settings import Memory
from ..runs.validate import check_kinds
from ..text import read_text
from .methods import Method, resolve_method

REFERENCES = ("precompute", "online", "data")
SHARDED = ("SHARDED_STATE_DICT", "3")  # of fsdp_state_dict_type, by name and by number
FSDP2 = {  # layer classes are those that the model itself names
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "cpu_ram_efficient_loading": False,  # a reference would be zeros on all ranks but one
    "state_dict_type": "SHARDED_STATE_DICT",
}


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
    separate: the sequences of a pair one by one through the model's own attention, each paying for the prefix itself, instead
        of packed: same loss and metrics. So is trained, whatever is set, what shared-prefix attention does not take.
    constraint_weight: weight of the KL term of sft_constraint (default 0.1) and sft_constraint_official (0.01).
    workspace_bytes, sparse_hidden_gradient: scratch of the loss; its hidden gradient from the columns that matter
        (fused_preference_loss).
    memory: tiling, offload and optimizer, the fields of memory.settings.Memory. Default: none of them, transformers' optimizer.
        With states, and with fit, `optim` is one of memory.optimizer.OPTIMS: AdamW or RMSprop with an exact float32 master.
    fit: "auto" lets the planner choose them for the longest pack and this machine; output_dir/memory.json keeps what it chose
        for the run's checkpoints.
    host_bytes: the host's memory, for fit="auto". Default: what is available now; say it where a guest's memory grows as it is
        used.
    allow_lossy: what fit="auto" may store in 8 bits: "nothing", optimizer "states", or "all", layer inputs as well.
    sequence_parallel: processes that share the rows of every pack; the weights are sharded over all processes (FSDP2) then.
        Default: what the launcher's file says (parallelism_config_cp_size), or 1. Numbers stay those of one process.

    warmup_steps: a number of steps, or below 1 the part of all steps, rounded up as transformers has it, but 0 where it comes
        to less than one step: a warm-up begins with a step at rate 0, which may not be all of a short run.

    A pack is a batch: per_device_train_batch_size stays 1. Raises ValueError for values that make no sense.
    """

    learning_rate: float = field(default=5e-7)
    lr_scheduler_type: SchedulerType | str = field(default="cosine")
    warmup_steps: float = field(default=0.1)
    per_device_train_batch_size: int = field(default=1)
    per_device_eval_batch_size: int = field(default=1)
    gradient_accumulation_steps: int = field(default=8)
    gradient_checkpointing: bool = field(default=True)
    logging_steps: float = field(default=1)
    logging_nan_inf_filter: bool = field(default=False)  # it logs a loss that is not finite as 0
    num_train_epochs: float = field(default=1.0)
    remove_unused_columns: bool = field(default=False)
    ddp_timeout: int = field(default=10800)  # seconds that processes wait for the first one to tokenise the pairs
    dataloader_pin_memory: bool = field(default=False)  # a pack stays on the host until the loss has planned it
    report_to: str | list[str] | None = field(default="none")

    fsdp: bool | str | None = field(default=None, metadata={"help": "true: shard weights over processes (FSDP2)"})
    objective: str = field(default="longpo", metadata={"help": "training method: longpo, dpo, simpo, sft_chosen, ..."})
    objective_options: dict | None = field(default=None, metadata={"help": "fields of the objective, as JSON"})
    reference: str = field(default="precompute", metadata={"help": "precompute | online | data"})
    reference_cache: str | None = field(default=None, metadata={"help": "folder of precomputed reference log-probs"})
    pack_tokens: int | None = field(default=None, metadata={"help": "token budget of a pack"})
    target_length: int | None = field(default=None, metadata={"help": "spread positions over this length (LOGO)"})
    separate: bool = field(default=False, metadata={"help": "sequences one by one, by the model's own attention"})
    constraint_weight: float | None = field(default=None, metadata={"help": "weight of the KL term of a constraint"})
    workspace_bytes: int | None = field(default=None, metadata={"help": "scratch bytes of the loss"})
    sparse_hidden_gradient: bool = field(default=False, metadata={"help": "the loss skips columns that hardly matter"})
    memory: dict | None = field(default=None, metadata={"help": "settings of memory/settings.py, as JSON"})
    fit: str = field(default="off", metadata={"help": "auto: choose memory settings that fit this machine"})

    host_bytes: int | None = field(default=None, metadata={"help": "of fit: memory of the host, which may still grow"})
    allow_lossy: str = field(default="nothing", metadata={"help": "of fit: nothing | states | all"})
    sequence_parallel: int | None = field(default=None, metadata={"help": "processes that share a pack's rows"})

    def __post_init__(self):
        self._make_plain()
        self.method.make_objective(self.objective_options or {})
        if self.reference not in REFERENCES:
            raise ValueError(f"reference={self.reference!r}: expected one of {', '.join(REFERENCES)}")
        if self.reference == "data" and (self.method.constraint or self.method.reference in ("long", "both")):
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
        leasts = {"pack_tokens": 1, "target_length": 0, "workspace_bytes": 1, "host_bytes": 1, "sequence_parallel": 1}
        leasts["gradient_accumulation_steps"] = 1
        for name, least in leasts.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}, or none")
        self._check_numbers()
        if self.target_length and self.method.sequence == "triples":
            raise ValueError(
                f"target_length={self.target_length}: {self.objective} compares an answer on the short input with that on the "
                "long one at their own positions; expected none"
            )
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate}: expected a finite number above 0")
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
        self._share_rows()
        super().__post_init__()
        unset_hf_deepspeed_config()  # else transformers parts every model over the ranks as it is made, a reference, too
        self._check_processes()
        if memory.states is not None or self.fit == "auto":
            replace(memory, states=memory.states or "float32").check_optimizer(self)
        if memory.step_in_backward:
            settings = self.gradient_accumulation_steps, self.max_grad_norm, self.world_size, self.mixed_precision
            refuse_step_in_backward(*settings)

    def _make_plain(self) -> None:
        """Python's own numbers for numpy's, and flags for 0 and 1."""
        kinds = get_type_hints(type(self))
        for name in (f.name for f in fields(self) if f.init):
            value = getattr(self, name)
            if isinstance(value, np.generic):
                value = value.item()
            choices = {kinds[name], *get_args(kinds[name])}
            if bool in choices and not choices & {int, float} and type(value) is int and value in (0, 1):
                value = bool(value)
            setattr(self, name, value)

    def _check_numbers(self) -> None:
        """Raises ValueError for values of another kind, and for a run of no step."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        if not isinstance(self.accelerator_config, dict | str | None):  # accelerate's own object will do
            del given["accelerator_config"]
        check_kinds(given, type(self))
        if self.max_steps < -1 or self.max_steps == 0:
            raise ValueError(f"max_steps={self.max_steps}: expected a number of steps, or -1 for whole epochs")
        if self.max_steps == -1 and self.num_train_epochs <= 0:
            raise ValueError(
                f"num_train_epochs={self.num_train_epochs}: expected more than 0, or a number of max_steps"
            )
        for name in ("max_grad_norm", "weight_decay", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number from 0")

    def _share_rows(self) -> None:
        """sequence_parallel as a number, and accelerate's mesh and FSDP2 for it unless a launcher's file has them."""
        given = self.parallelism_config
        if given is not None:
            launch.refuse_others(given.tp_size, given.sp_size)
            if self.sequence_parallel not in (None, given.cp_size):
                raise ValueError(
                    f"sequence_parallel={self.sequence_parallel}, and parallelism_config has cp_size={given.cp_size}: expected "
                    "one of the two"
                )
        asked = self.sequence_parallel if given is None else given.cp_size
        self.sequence_parallel = shared = launch.sequence_parallel(asked)
        launch.check_processes(shared)
        if (self.fsdp or shared > 1) and launch.launched_fsdp() is None:
            theirs = self.fsdp_config or {}
            if isinstance(theirs, str):
                theirs = json.loads(read_text(theirs))
            named = {name.removeprefix("fsdp_"): value for name, value in theirs.items()}
            self.fsdp, self.fsdp_config = self.fsdp or True, FSDP2 | named
        if shared > 1:
            refuse_unshared(self)
            if launch.launched("cp") is None and given is None:
                self.parallelism_config = ParallelismConfig(cp_size=shared, dp_shard_size=launch.data_ranks(shared))
        if self.is_sharded:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False} | (self.gradient_checkpointing_kwargs or {})

    def _check_processes(self) -> None:
        launch.check_group(self.world_size)
        if self.is_sharded:
            refuse_sharding(self)
        if self.is_sharded and self.method.reference is not None and self.reference == "online":
            raise ValueError(
                "reference='online': its forward passes do not fit the policy's, which FSDP shards over all ranks; expected "
                "'precompute', which is done before weights are sharded, or 'data' for references that one card cannot hold"
            )
        if self.is_sharded and self.accelerator_config.even_batches is False:
            raise ValueError(
                "accelerator_config: even_batches=False with FSDP: ranks with fewer packs would leave the others waiting; "
                "expected true, its default"
            )
        if self.is_sharded and self.gradient_checkpointing_kwargs["use_reentrant"]:
            raise ValueError(
                "gradient_checkpointing_kwargs: use_reentrant=True with FSDP, whose layers are gathered for what is recomputed "
                "only without it; expected false, its default"
            )

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP shards the weights over ranks."""
        return bool(self.fsdp) or launch.is_sharded()

    @property
    def fsdp_version(self) -> int | None:
        """Of FSDP, as the launcher's file or fsdp_config says; None where the weights are whole."""
        if not self.is_sharded:
            return None
        return launch.launched_fsdp() or int((self.fsdp_config or {}).get("version", 2))

    @property
    def data_ranks(self) -> int:
        """Ranks, or groups of them, that hold different packs."""
        return self.world_size // self.sequence_parallel

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


def refuse_unshared(config: LongPOConfig) -> None:
    """Raises ValueError for what is wrong, silently or not, where the rows of a pack lie on several processes."""
    deepspeed = config.deepspeed or ("of the launcher's file" if launch.is_deepspeed() else None)
    reasons = {
        "deepspeed": (deepspeed, "weights are sharded by FSDP2 there; use DeepSpeed with sequence_parallel=1"),
        "neftune_noise_alpha": (config.neftune_noise_alpha, "its noise depends on the rows that a process holds"),
    }
    for name, (value, why) in reasons.items():
        if value is not None:
            raise ValueError(f"{name}={value!r} with sequence_parallel={config.sequence_parallel}: {why}")


def refuse_sharding(config: LongPOConfig) -> None:
    """Raises ValueError for settings of FSDP whose checkpoints a run could not go on from, or that no test has seen."""
    given = config.fsdp_config if config.fsdp else {}
    version = given.get("version", launch.launched_fsdp() or 2)
    if version != 2:
        raise ValueError(f"fsdp_version={version}: expected 2 (fully_shard)")
    kind = str(given.get("state_dict_type", launch.launched_state_dict() or SHARDED[0]))
    if kind not in SHARDED:
        raise ValueError(
            f"fsdp_state_dict_type={kind}: expected {SHARDED[0]}, whose checkpoints other numbers of processes go on from; the "
            "model at the end of a run is whole with either"
        )
    if config.save_only_model:
        raise ValueError(
            "save_only_model=True with FSDP, whose checkpoints are shards that from_pretrained does not read: expected False; "
            "the model at the end of a run is whole"
        )
