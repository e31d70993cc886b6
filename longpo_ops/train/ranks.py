"""A transformers.Trainer whose processes may share the rows of a pack (sequence_parallel) and shard the weights (FSDP2).

    accelerate's mesh (dp_shard, cp)      ranks of one cp group draw the same packs, others draw others
    sum over packs = sum over ranks / sequence_parallel

What accelerate and Trainer do to a batch under a "cp" dimension is passed over: they cut what they take for its columns,
demand another attention and refuse windows; the loss cuts rows itself (parallel.Shards). Gradients are reduced after each
pack: until then every rank would hold those of the whole model, in the dtype they are computed in. Not covered: FSDP1.

Tests: tests/parallel/test_trainer_ranks.py.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from ..data import PairBatch, TokenizedPair
from ..parallel import Shards, digest
from ..parallel.mesh import check_alike, owned, sequence_group, sum_over_ranks
from .checkpoints import CheckpointedTrainer
from .config import LongPOConfig
from .identity import DECIDING, LENGTH
from .packed import PairStore

# Not of the weights, and yet a rank that logs, evaluates or saves alone waits for the others.
TOGETHER = (
    "sequence_parallel",
    "gradient_accumulation_steps",
    "reference",
    "fit",
    "memory",
    "gradient_checkpointing",
    "load_best_model_at_end",
    "eval_on_start",
    *(f"{when}_{what}" for when in ("logging", "eval", "save") for what in ("strategy", "steps")),
)


class RanksTrainer(CheckpointedTrainer):
    """Trainer whose mesh is that of LongPOConfig.sequence_parallel."""

    args: LongPOConfig
    separate: bool

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's, without what accelerate would hook into the layers for its own attention over ranks, and without what
        FSDP2 would round by its own mixed precision: losses and metrics that the model returns, and sums of gradients."""
        super().create_accelerator_and_postprocess()
        self.accelerator._prepare_cp = lambda *prepared: prepared
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
            kept = replace(plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32)
            plugin.mixed_precision_policy = kept

    def _build_accelerator_args(self, **kwargs):
        kwargs["gradient_accumulation_plugin"].sync_each_batch |= self.args.is_sharded
        return super()._build_accelerator_args(**kwargs)

    def _prepare_context_parallel_inputs(self, model: nn.Module, inputs: dict):
        return contextlib.nullcontext, inputs

    @cached_property
    def sequence_group(self) -> dist.ProcessGroup | None:
        """Ranks that share the rows of this one's packs, or None where it has them all."""
        return sequence_group(self.accelerator.torch_device_mesh)

    def _shards(self, batch: PairBatch, references: Iterable[Tensor | None]) -> Shards | None:
        """Which rows of a pack are this rank's. Raises ValueError, on all ranks alike, where they drew different ones or
        have other references for it."""
        if self.sequence_group is None:
            return None
        ids = ", ".join(batch.ids[:3]) + ", ..." * (len(batch.ids) > 3)
        parts = (batch.input_ids, batch.position_ids, batch.labels, batch.segments, batch.nll_weights)
        held = digest([*parts, *(None if r is None else r.cpu() for r in references)])
        check_alike({"packs": f"{held:08x} of {ids}"}, self.sequence_group)
        return Shards(batch.layout.length, self.sequence_group)

    def _calls(self, batch: PairBatch) -> int:
        """How often a pack's separate sequences call the model: where ranks share the weights as often on all of them."""
        calls = len(batch.layout.pairs)
        if not self.separate or not (self.args.is_sharded or self.is_deepspeed_enabled):
            return calls
        return int(self.accelerator.gather(torch.tensor([calls], device=self.args.device)).max())

    def _sum_over_packs(self, values: Tensor) -> Tensor:
        """Of all ranks; those that share packs count them once."""
        return self.accelerator.reduce(values) / self.args.sequence_parallel


def check_ranks(args: LongPOConfig, datasets: dict[str, Sequence[TokenizedPair]]) -> None:
    """A collective of all ranks, before any of them works. Raises ValueError on all of them where settings or data differ."""
    if args.world_size > 1:
        settings = args.to_dict()
        held = {name: str(settings[name]) for name in (*DECIDING["config"], *LENGTH, *TOGETHER)}
        check_alike(held | {name: data_digest(pairs) for name, pairs in datasets.items()})


def data_digest(pairs: Sequence[TokenizedPair]) -> str:
    """Of every record, in order, with how many they are."""
    digests = [d for _, d in pairs.records] if isinstance(pairs, PairStore) else [pair.digest for pair in pairs]
    return f"{len(digests)} records {hashlib.sha256(' '.join(digests).encode()).hexdigest()[:12]}"


INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_digest(model: nn.Module) -> list[int]:
    """A number for each trained parameter: the sum of its bits as integers, which a weight that moves changes. Shards add up
    to the numbers of whole weights, in a collective. 32 MiB of scratch."""
    trained = [p.detach() for p in model.parameters() if p.requires_grad]
    sums = torch.stack([_sum_of_bits(owned(p)).to(trained[0].device) for p in trained])
    return (sum_over_ranks(sums) if any(isinstance(p, DTensor) for p in trained) else sums).tolist()


def _sum_of_bits(tensor: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in tensor.reshape(-1).view(INTEGERS[tensor.itemsize]).split(2**22):
        total += part.sum(dtype=torch.int64)
    return total
