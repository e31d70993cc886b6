"""What can be known to fail before a run trains: the run, its dry run and the trainer ask the same functions.

check_model        before anything is tokenised: the family, the head, adapters, the reference, weights (headers only)
check_shared_rows  likewise, and in the trainer: heads, RoPE and auxiliary loss of a model whose packs several processes share
check_not_empty    in the trainer: that each process holds the models' weights, and not zeros in their place
check_pairs        before weights are read: what the method reads of every record, and that it fits
check_positions    likewise: that no sequence is longer than a table of positions
check_packs        before weights are read: RoPE that depends on the longest sequence of a pack
check_separate     of a model whose sequences are separate: settings that need packs, or one forward for each backward
check_schedule     before the reference is loaded: that a step has a rate above 0
plan_memory        what `fit: auto` will choose for the longest pack on this machine, or on all of the run's
agreed_memory      or what it chose when the run that goes on began
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import get_scheduler

from ..attention import (
    PrefixNotShared,
    check_ranks,
    check_rope,
    rope_depends_on_length,
    rotary_modules,
    use_shared_prefix,
)
from ..attention.rope import forget_lengths
from ..data import TokenizedPair, packed_length
from ..memory import plan, search
from ..memory.adapters import Adapters, scheme_of
from ..memory.host_memory import processes_here
from ..memory.mesh import ONE_CARD, Mesh
from ..memory.optimizer import check_optim
from ..memory.sequences import Sequences
from ..memory.settings import Memory, machine_here
from ..ops.head import attach
from ..ops.head_weight import read_head
from ..ops.sweep import default_workspace
from ..parallel.mesh import check_alike
from ..pretrained import NONE, check_stored_head, explain_zeros, trying, use_right_attention
from .arithmetic import AUTOCAST, base_model
from .checkpoints import last_checkpoint
from .config import LongPOConfig
from .forward import shares_prefix
from .packed import PackedPairs, parts_of, rows_of, select
from .reference import DataReference, readings

if TYPE_CHECKING:
    from .run import TrainRun

log = logging.getLogger("longpo_ops.train")


def prepare_model(model: nn.Module, separate: bool = False) -> str | None:
    """Shared-prefix attention unless `separate`, and a forward that stops at the hidden states. -> why the model's
    sequences are separate, which is told once, or None. Raises ValueError for a model that can be trained neither way."""
    causal, why = base_model(model), "separate=True" if separate else None
    with trying(causal.config.name_or_path, "it cannot be trained"):
        try:
            if why is None:
                use_shared_prefix(causal)
        except PrefixNotShared as error:
            why = str(error)
        if why is not None:
            use_right_attention(causal)
        attach(model)
    if why is not None:
        forget_lengths(causal)
        told = f"{type(causal).__name__} is given separate sequences, one by one, by its own attention: {why}"
        _tell_once(logging.INFO, told)
    return why


@functools.cache
def _tell_once(level: int, text: str) -> None:
    log.log(level, "%s", text)


def tell_anew() -> None:
    """A run begins, or a trainer is made: what was told before is told again."""
    _tell_once.cache_clear()


def check_separate(model: nn.Module, config: LongPOConfig, target: int | None) -> None:
    """Raises ValueError for settings that do not go with separate sequences: positions with gaps, which transformers takes for
    several texts, and checkpointing that runs a backward of its own for each forward."""
    name = type(base_model(model)).__name__
    if target:
        raise ValueError(
            f"target_length={target}: {name} is given separate sequences, by its own attention, which takes positions with "
            "gaps for several texts; set target_length to 0, or train a model that shares prefixes (separate=False)"
        )
    if config.gradient_checkpointing and (config.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ValueError(
            f"gradient_checkpointing_kwargs: use_reentrant=True, and {name} is given separate sequences, several forwards for "
            "each backward, whose gradients would be complete several times; expected false, its default"
        )


def check_model(run: TrainRun, config: LongPOConfig) -> tuple[nn.Module, str | None]:
    """-> the policy on the meta device, as it will be trained, and why its sequences are separate, or None. Raises ValueError
    for what its run would refuse of it, of the reference and of their weights, which are not read."""
    policy = run.empty_model(run.model, policy=True)
    refuse_unplanned(policy, config)
    refuse_sharing(run.is_quantised(run.model), config)
    if run.settings()["rope_theta"] is not None and not rotary_modules(policy):
        raise ValueError(
            f"rope_theta: {type(base_model(policy)).__name__} has no RoPE that it would change; leave it out"
        )
    check_shared_rows(policy, config)
    why = prepare_model(policy, config.separate)
    check_trained(policy, config, why is not None)
    read_head(policy.get_output_embeddings(), merge_lora=False)  # attach waits for weights with it
    check_stored_head(run.model, base_model(policy))
    if needs_reference(config) and run.reference_model is not None:
        reference = run.empty_model(run.reference_model, policy=False)
        prepare_model(reference, config.separate)
        check_stored_head(run.reference_model, reference)
    return policy, why


def check_trained(model: nn.Module, config: LongPOConfig, separate: bool) -> None:
    """Raises ValueError for settings that the policy, prepared as it is, does not go with. Dropout is told."""
    causal = base_model(model)
    if separate:
        check_separate(model, config, target_length(model, config))
    if config.gradient_checkpointing and not causal.supports_gradient_checkpointing:
        raise ValueError(
            f"gradient_checkpointing=True: {type(causal).__name__} has none; set gradient_checkpointing to false"
        )
    balance_weight(causal)
    if rates := dropout_rates(causal):
        told = ", ".join(f"{name}={rate:g}" for name, rate in rates.items())
        _tell_once(
            logging.WARNING,
            f"{type(causal).__name__} drops out ({told}), a reference does not: rewards do not begin at 0",
        )


def dropout_rates(causal: nn.Module) -> dict[str, float]:
    """Those above 0, by the names that modules have them under."""
    rates = {}
    for module in causal.modules():
        values = [(name, v) for name, v in vars(module).items() if "drop" in name]
        values += [(name, child.p) for name, child in module.named_children() if isinstance(child, nn.Dropout)]
        rates |= {name: rate for name, rate in values if isinstance(rate, float) and rate > 0}
    return rates


def balance_weight(causal: nn.Module) -> float | None:
    """What a mixture of experts weighs its auxiliary loss by; None where it has none. Raises ValueError where it does not
    say it."""
    config = causal.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return None
    for name in ("router_aux_loss_coef", "aux_loss_coef"):
        if (weight := getattr(config, name, None)) is not None:
            return weight
    raise ValueError(
        f"output_router_logits=True: the config of {type(causal).__name__} has no router_aux_loss_coef to weigh its auxiliary "
        "loss by; set output_router_logits to false in it"
    )


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
        if config.separate:
            raise ValueError(
                f"sequence_parallel={ranks} with separate=True: processes share rows by shared-prefix attention; expected "
                "sequence_parallel=1, whose processes have packs of their own"
            )
        try:
            check_ranks(base_model(model), ranks)
        except PrefixNotShared as error:
            raise ValueError(
                f"sequence_parallel={ranks}: processes share rows by shared-prefix attention, and {error}; expected "
                "sequence_parallel=1, whose processes have packs of their own"
            ) from None
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


def check_pairs(
    pairs: Sequence[TokenizedPair], config: LongPOConfig, target: int | None, separate: bool = False
) -> int:
    """-> tokens of the longest sequence. Raises ValueError for a record that lacks what the method reads of it, or does not
    fit the target length."""
    longest, rows, whole = 0, 0, 0
    for pair in pairs:
        length, of_pair = _check_pair(pair, config, target, separate)
        longest, rows = max(longest, length), rows + of_pair
        whole += packed_length(pair, separate) if config.method.sequence == "triples" else 0
    if whole:
        _tell_once(logging.INFO, _savings(config.objective, rows, whole, separate))
    return longest


def _savings(objective: str, rows: int, whole: int, separate: bool) -> str:
    """What it means that no rejected answer is read at length: much where sequences are separate, little beside a prefix that
    chosen and rejected answers share."""
    how = "as separate sequences" if separate else "with prefixes shared"
    return (
        f"{objective} reads {rows} tokens a pass over the data: short inputs with both answers, the long ones with chosen "
        f"answers alone. Both answers on the long inputs alone would be {whole} {how}: {rows / whole:.3g} of that"
    )


def _check_pair(pair: TokenizedPair, config: LongPOConfig, target: int | None, separate: bool) -> tuple[int, int]:
    """-> tokens of its longest sequence, and rows in its pack."""
    selected, method = select(pair, config.method), config.method
    if target and selected.length > target:
        raise ValueError(
            f"record {pair.id!r}: {selected.length} tokens, target_length is {target}; raise it (or "
            "max_position_embeddings, its default for logo), or set it to 0 to leave positions as they are"
        )
    if (tokens := rows_of(method, selected, separate)) < config.sequence_parallel:
        raise ValueError(
            f"record {pair.id!r}: {tokens} tokens in its pack, fewer than the {config.sequence_parallel} processes that share "
            "it; lower sequence_parallel, or leave the record out"
        )
    if method.reference is not None:
        DataReference().logps(pair) if config.reference == "data" else readings(pair, method.reference)
    return max(part.length for part in parts_of(method, selected)), tokens


def check_positions(model: nn.Module, longest: int) -> None:
    """Raises ValueError for a sequence beyond a table of positions, of which the model has no more. Other positions beyond its
    config are told."""
    causal = base_model(model)
    positions, tokens = getattr(causal.config, "max_position_embeddings", None), causal.get_input_embeddings()
    if positions is None or longest <= positions:
        return
    tables = [
        (n, m.num_embeddings) for n, m in causal.named_modules() if isinstance(m, nn.Embedding) and m is not tokens
    ]
    tables += [(name, len(buffer)) for name, buffer in causal.named_buffers() if buffer.dim() == 2]
    for name, rows in tables:
        if positions <= rows <= positions + 8:  # some begin with a row or two of their own
            raise ValueError(
                f"the longest sequence has {longest} tokens, and {name} of {type(causal).__name__} holds {positions} "
                "positions; expected shorter texts (max_length, cut_document), or a model whose positions are not a table"
            )
    told = f"the longest sequence has {longest} tokens, the model's config reads {positions}: set rope_theta and"
    _tell_once(logging.WARNING, f"{told} max_position_embeddings")


def packs_of(
    pairs: Sequence[TokenizedPair], config: LongPOConfig, target: int | None, separate: bool = False
) -> PackedPairs:
    """The packs that a run of this config trains on."""
    given = {"pack_tokens": config.pack_tokens, "target_length": target, "seed": config.seed, "separate": separate}
    return PackedPairs(pairs, config.method, **given)


def check_packs(model: nn.Module, packs: Iterable[PackedPairs]) -> None:
    """Raises ValueError for a pack of sequences that alone would get other RoPE frequencies. Separate ones get their own."""
    if shares_prefix(model) and rope_depends_on_length(base_model(model)):
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
    separate: bool = False,
    quantization: str = NONE,
) -> plan.Plan:
    """What the planner chooses for the longest pack, trained on or evaluated, beside an online reference. A collective of all
    ranks, which choose alike. quantization: of an empty policy, which does not say it itself. Raises ValueError where nothing
    fits, for separate sequences by attention that is not planned, and for a policy that trains other weights than all of them,
    or than adapters of one rank."""
    refuse_unplanned(model, config)
    method = config.method
    longest = max(rows_of(method, select(pair, method), separate) for pairs in datasets for pair in pairs)
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
        separate=_sequences(model, config, datasets) if separate else None,
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if adapters is not None and trained != (planned := work.weights.trained):
        raise ValueError(
            f"fit='auto' plans LoRA of rank {adapters.rank}, {planned} numbers, and the policy trains {trained}: set memory by "
            "hand, and fit to 'off'"
        )
    return search.fit(work, _least_machine(config), config.allow_lossy)


def _sequences(model: nn.Module, config: LongPOConfig, datasets: Sequence[Sequence[TokenizedPair]]) -> Sequences:
    """Of separate packs, as they come."""
    lengths, method = [], config.method
    for pairs in datasets:
        for group in packs_of(pairs, config, None, separate=True).groups:
            parts = [part for i in group for part in parts_of(method, select(pairs[i], method))]
            chosen = [len(part.chosen) for part in parts]
            lengths.append(chosen + [len(sequence) for part in parts for sequence in part.rejected])
    return Sequences.of(lengths, base_model(model).config._attn_implementation)


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
