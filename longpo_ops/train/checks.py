"""What can be known to fail before a run trains: the run, its dry run and the trainer ask the same functions.

check_model        before anything is tokenised: the family, the head, adapters, the reference, weights (headers only)
check_shared_rows  likewise, and in the trainer: heads, RoPE and auxiliary loss of a model whose packs several processes share
check_not_empty    in the trainer: that each process holds the models' weights, and not zeros in their place
check_pairs        before weights are read: what the method reads of every record, and that it fits
check_packs        before weights are read: RoPE that depends on the longest sequence of a pack
check_schedule     before the reference is loaded: that a step has a rate above 0
plan_memory        what `fit: auto` will choose for the longest pack on this machine, or on all of the run's
agreed_memory      or what it chose when the run that goes on began
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import get_scheduler

from ..attention import check_ranks, check_rope, rope_depends_on_length, rotary_modules, use_shared_prefix
from ..data import TokenizedPair, packed_length
from ..memory import plan, search
from ..memory.adapters import Adapters, scheme_of
from ..memory.mesh import ONE_CARD, Mesh
from ..memory.optimizer import check_optim
from ..memory.settings import Memory, machine_here
from ..memory.tiers import processes_here
from ..ops.head import attach
from ..ops.head_weight import read_head
from ..ops.sweep import default_workspace
from ..parallel.mesh import check_alike
from ..pretrained import NONE, explain_zeros, trying
from .arithmetic import AUTOCAST, base_model
from .checkpoints import last_checkpoint
from .config import LongPOConfig
from .packed import PackedPairs, select
from .reference import DataReference, readings

if TYPE_CHECKING:
    from .run import TrainRun


def prepare_model(model: nn.Module) -> nn.Module:
    """Shared-prefix attention, and a forward that stops at the hidden states. Raises ValueError for a model that cannot."""
    with trying(base_model(model).config.name_or_path, "it cannot be trained"):
        use_shared_prefix(base_model(model))
        return attach(model)


def check_model(run: TrainRun, config: LongPOConfig) -> nn.Module:
    """-> the policy on the meta device, as it will be trained. Raises ValueError for what its run would refuse of it, of
    the reference and of their weights, which are not read."""
    policy = run.empty_model(run.model, policy=True)
    refuse_unplanned(policy, config)
    refuse_sharing(run.is_quantised(run.model), config)
    if run.settings()["rope_theta"] is not None and not rotary_modules(policy):
        raise ValueError(
            f"rope_theta: {type(base_model(policy)).__name__} has no RoPE that it would change; leave it out"
        )
    check_shared_rows(policy, config)
    prepare_model(policy)
    read_head(policy.get_output_embeddings(), merge_lora=False)  # attach waits for weights with it
    if needs_reference(config) and run.reference_model is not None:
        prepare_model(run.empty_model(run.reference_model, policy=False))
    return policy


def refuse_sharing(quantised: bool, config: LongPOConfig) -> None:
    """Raises ValueError for a quantised policy of several processes, which would be sharded, or sent, as if it had plain
    weights."""
    if quantised and (config.world_size > 1 or config.is_sharded or config.deepspeed):
        raise ValueError(
            "the model's weights are quantised, which one process alone holds whole: start one, without fsdp, deepspeed and "
            "sequence_parallel, or give the model in full precision"
        )


def check_shared_rows(model: nn.Module, config: LongPOConfig) -> None:
    """Raises ValueError for a model that cannot compute on rows that several processes share."""
    if (ranks := config.sequence_parallel) > 1:
        check_ranks(base_model(model), ranks)
        if getattr(base_model(model).config.get_text_config(), "output_router_logits", False):
            raise ValueError(
                f"sequence_parallel={ranks}: {type(base_model(model)).__name__} adds a loss of its experts' load, which is no "
                "sum over rows; set output_router_logits to false in its config, or sequence_parallel to 1"
            )


def check_not_empty(models: dict[str, nn.Module | None], config: LongPOConfig) -> None:
    """A collective of all processes. Raises ValueError, on all of them, where one holds a model of zeros: loaded by others
    than load_model, under a setting that loads the weights in one process of a machine alone."""
    told = [
        f"process {config.process_index}: {name}: {why}"
        for name, model in models.items()
        if model is not None and (why := explain_zeros(model))
    ]
    if told := gather_object(told):
        raise ValueError(
            f"{'; '.join(told)}: expected its weights; where FSDP_CPU_RAM_EFFICIENT_LOADING is on "
            "(fsdp_cpu_ram_efficient_loading), switch it off before models are loaded"
        )


def needs_reference(config: LongPOConfig) -> bool:
    """Whether the method asks a model for its reference."""
    return config.method.reference is not None and config.reference != "data"


def target_length(model: nn.Module, config: LongPOConfig) -> int | None:
    """Over how many positions those of a pair are spread."""
    if config.target_length is None and config.method.spread:
        return base_model(model).config.max_position_embeddings
    return config.target_length


def check_pairs(pairs: Sequence[TokenizedPair], config: LongPOConfig, target: int | None) -> int:
    """-> tokens of the longest sequence. Raises ValueError for a record that lacks what the method reads of it, or does not
    fit the target length."""
    return max((_check_pair(pair, config, target) for pair in pairs), default=0)


def _check_pair(pair: TokenizedPair, config: LongPOConfig, target: int | None) -> int:
    selected, method = select(pair, config.method), config.method
    if target and selected.length > target:
        raise ValueError(
            f"record {pair.id!r}: {selected.length} tokens, target_length is {target}; raise it (or "
            "max_position_embeddings, its default for logo), or set it to 0 to leave positions as they are"
        )
    if (tokens := packed_length(selected)) < config.sequence_parallel:
        raise ValueError(
            f"record {pair.id!r}: {tokens} tokens in its pack, fewer than the {config.sequence_parallel} processes that share "
            "it; lower sequence_parallel, or leave the record out"
        )
    if method.reference is not None:
        DataReference().logps(pair) if config.reference == "data" else readings(pair, method.reference)
    return selected.length


def packs_of(pairs: Sequence[TokenizedPair], config: LongPOConfig, target: int | None) -> PackedPairs:
    """The packs that a run of this config trains on."""
    return PackedPairs(pairs, config.method, pack_tokens=config.pack_tokens, target_length=target, seed=config.seed)


def check_packs(model: nn.Module, packs: Iterable[PackedPairs]) -> None:
    """Raises ValueError for a pack of sequences that alone would get other RoPE frequencies."""
    if rope_depends_on_length(base_model(model)):
        for pack in (pack for each in packs for pack in each):
            check_rope(base_model(model), pack.batch.position_ids, pack.batch.layout)


def count_steps(num_packs: int, config: LongPOConfig) -> int:
    """Optimizer steps of a run on num_packs packs, as Trainer counts them."""
    if config.max_steps > 0:
        return config.max_steps
    of_process = num_packs / config.data_ranks
    of_process = math.floor(of_process) if config.dataloader_drop_last else math.ceil(of_process)
    return math.ceil(config.num_train_epochs * max(1, math.ceil(of_process / config.gradient_accumulation_steps)))


def check_schedule(steps: int, config: LongPOConfig) -> None:
    """Raises ValueError where every step of a run of so many has a rate of 0. A DeepSpeed file may hold a schedule
    of its own, which is not looked at."""
    if config.deepspeed is None:
        nothing = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.SGD([nothing], lr=config.learning_rate)
        warmup, options = config.get_warmup_steps(steps), config.lr_scheduler_kwargs
        check_rates(get_scheduler(config.lr_scheduler_type, optimizer, warmup, steps, options), steps, config)


def check_rates(scheduler, steps: int, config: LongPOConfig) -> None:
    """Raises ValueError where a schedule gives each of its steps a rate of 0."""
    factors = getattr(scheduler, "lr_lambdas", None)  # other schedulers do not know what will come
    if factors and not any(factor(step) for step in range(steps) for factor in factors):
        raise ValueError(
            f"lr_scheduler_type={config.lr_scheduler_type.value} with warmup_steps={config.get_warmup_steps(steps)} gives "
            f"each of the run's {steps} steps a rate of 0, so nothing would be trained; expected fewer warm-up steps or more "
            "steps (max_steps, num_train_epochs, or fewer gradient_accumulation_steps)"
        )


def refuse_unplanned(model: nn.Module, config: LongPOConfig) -> None:
    """Raises ValueError where `fit: auto` has no plan for a run."""
    if config.fit != "auto":
        return
    if hasattr(model, "get_base_model") and config.world_size > 1:
        raise ValueError("fit='auto' plans adapters on one process: set memory by hand, and fit to 'off'")
    if config.world_size > 1 and config.fsdp_version != 2:
        held = f"with FSDP{config.fsdp_version}" if config.fsdp_version else "without it"
        raise ValueError(
            f"fit='auto' plans one process, or several that shard the weights by FSDP2; {config.world_size} came {held}: set "
            "sequence_parallel or fsdp, or memory by hand and fit to 'off'"
        )


def memory_file(config: LongPOConfig) -> Path:
    """Where a run keeps what `fit: auto` chose."""
    return Path(config.output_dir) / "memory.json"


def kept_memory(config: LongPOConfig) -> Memory | None:
    """What `fit: auto` chose for the checkpoint that a run goes on from; None where nothing was trained with it, so that a
    plan is made anew. Raises ValueError where it is damaged, or lossier than allow_lossy permits."""
    file = memory_file(config)
    if last_checkpoint(config.output_dir) is None or not file.exists():
        return None
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(kept, dict) or "states" not in kept:
            raise ValueError(f"{kept!r:.80}: expected the settings of a plan")
        memory = Memory.from_settings(kept)
    except ValueError as error:
        raise ValueError(
            f"{file} is damaged ({error}); remove it, and fit='auto' plans anew for the steps that are left"
        ) from None
    needed = "all" if memory.store != "exact" else "states" if memory.states == "8bit" else "nothing"
    levels = list(search.LOSSY)
    if levels.index(needed) > levels.index(config.allow_lossy):
        raise ValueError(
            f"{file}: the run began with states={memory.states!r} and store={memory.store!r}, which "
            f"allow_lossy={config.allow_lossy!r} does not permit; set it to {needed!r}, or give another output_dir"
        )
    return memory


def agreed_memory(config: LongPOConfig) -> Memory | None:
    """What kept_memory says. A collective of all ranks. Raises ValueError, on all of them, where they do not find the same."""
    kept, error = None, None
    try:
        kept = kept_memory(config)
    except ValueError as damaged:
        error = damaged
    check_alike({memory_file(config).name: str(error or kept)})
    if error is not None:
        raise error
    return kept


def plan_memory(
    model: nn.Module,
    config: LongPOConfig,
    datasets: Sequence[Sequence[TokenizedPair]],
    reference: nn.Module | None,
    quantization: str = NONE,
) -> plan.Plan:
    """What the planner chooses for the longest pack, trained on or evaluated, beside an online reference. A collective of all
    ranks, which choose alike. quantization: of an empty policy, which does not say it itself. Raises ValueError where nothing
    fits, and for a policy that trains other weights than all of them, or than adapters of one rank."""
    refuse_unplanned(model, config)
    longest = max(packed_length(select(pair, config.method)) for pairs in datasets for pair in pairs)
    online = reference is not None and config.reference == "online"
    adapters, dtype = _adapters(model, quantization), base_model(model).dtype
    work = plan.Work(
        base_model(model).config,
        max(longest, config.pack_tokens or 0),
        accumulation=config.gradient_accumulation_steps,
        max_grad_norm=config.max_grad_norm,
        dtype=dtype if config.world_size == 1 else AUTOCAST[config.mixed_precision] or dtype,
        workspace_bytes=config.workspace_bytes or default_workspace(config.device),
        reference_bytes=sum(p.nbytes for p in reference.parameters()) if online else 0,
        optim=check_optim(config.optim),
        mesh=_mesh(config),
        adapters=adapters,
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if adapters is not None and trained != (planned := work.weights.trained):
        raise ValueError(
            f"fit='auto' plans LoRA of rank {adapters.rank}, {planned} numbers, and the policy trains {trained}: set memory by "
            "hand, and fit to 'off'"
        )
    return search.fit(work, _least_machine(config), config.allow_lossy)


def _adapters(model: nn.Module, quantization: str) -> Adapters | None:
    if not hasattr(model, "get_base_model"):
        return None
    return Adapters.of(model, scheme_of(base_model(model).config) if quantization == NONE else quantization)


def _mesh(config: LongPOConfig) -> Mesh:
    if config.world_size == 1:
        return ONE_CARD
    return Mesh(config.world_size, config.sequence_parallel, processes_here(), config.mixed_precision)


def _least_machine(config: LongPOConfig) -> plan.Machine:
    """Rank 0's, with no more memory than the rank that has the least: all ranks plan for the same."""
    here = machine_here(config.device, host_bytes=config.host_bytes)
    machines = gather_object([here]) if config.world_size > 1 else [here]
    memory = ("device_bytes", "host_bytes", "disk_bytes")
    return replace(machines[0], **{name: min(getattr(each, name) for each in machines) for name in memory})
