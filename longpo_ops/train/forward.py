"""A causal LM on the rows of a pack: one call for a model that shares prefixes, else one call for every sequence.

    shared      h (N, H) = body(rows of the pack, its layout)                           compute(h, head)
    separate    h_k (T_k, H) = body(tokens of sequence k alone), k = 1..K, one by one   compute([h_1; ...; h_K], head)

A separate sequence meets the model's own attention as a batch of one, without a mask, positions or a cache: whatever the model
does to a text alone it does here, whether it keeps a state, goes by the length or looks at chunks. The last call's compute has
the head and the rows of all, so that a loss reads N rows once, as of a pack. Auxiliary losses are averaged by tokens:

    A = sum_k T_k A_k / sum_k T_k

All K graphs wait for the one backward; gradient checkpointing and offload keep T_1 + ... + T_K rows of every layer's input.
Where ranks share the weights (FSDP2, ZeRO-3), each call is a collective: a rank with fewer sequences than another makes idle
calls first, on a few tokens whose rows are cut off again, so that their gradients are zeros and all ranks call equally often.
Memory beside that: hidden states twice, N x H. Which way a model goes it says itself, by its attention. Not covered: several
sequences in one batch, which would need padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from ..attention import NAME
from ..data import TreeBatch
from ..parallel import Shards
from .arithmetic import base_model

FEW = 8  # tokens of an idle call


def shares_prefix(model: nn.Module) -> bool:
    """Whether packs of this model hold a prefix once (use_shared_prefix), wrapped for several processes or not."""
    return _causal(model).config._attn_implementation == NAME


def run(
    model: nn.Module,
    batch: TreeBatch,
    compute: Callable,
    device: torch.device,
    shards: Shards | None = None,
    calls: int = 0,
) -> tuple[Any, Tensor | None]:
    """-> compute(hidden (N, H), head) of the pack's rows, or of this rank's, and the model's auxiliary loss, if it has one.

    model: its forward attached (ops/head.py). calls: how often separate sequences call it at least. Raises ValueError for a
    pack with shared prefixes and a model that reads sequences one by one, and where several ranks share such a model's rows.
    """
    if shares_prefix(model):
        return _run_shared(model, batch, compute, device, shards)
    if shards is not None or any(len(spans.tails) > 1 for spans in batch.layout.pairs):
        raise ValueError(
            f"{type(_causal(model)).__name__} reads sequences one by one, and this pack's share a prefix, or several ranks its "
            "rows; expected pack(..., separate=True) and one rank"
        )
    return _run_separate(model, batch, compute, device, calls)


def _run_shared(model, batch: TreeBatch, compute, device, shards: Shards | None):
    rows = slice(None) if shards is None else shards.rows
    result, outputs = model(
        input_ids=batch.input_ids[:, rows].to(device, non_blocking=True),
        position_ids=batch.position_ids[:, rows].to(device, non_blocking=True),
        shared_prefix_layout=batch.layout,
        shards=shards,
        use_cache=False,
        compute=lambda hidden, head: compute(hidden[0], head),
        return_outputs=True,
    )
    return result, _auxiliary(outputs)


def _run_separate(model, batch: TreeBatch, compute, device, calls: int):
    takes = inspect.signature(type(_causal(model)).forward).parameters.values()
    quiet = any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in takes)
    kwargs = {"use_cache": False} if quiet else {}
    hidden: list[Tensor] = []  # of the calls before
    losses: list[Tensor] = []  # T_k A_k

    def call(start: int, end: int, compute: Callable, weight: int):
        ids = batch.input_ids[:, start:end].to(device, non_blocking=True)
        result, outputs = model(input_ids=ids, compute=compute, return_outputs=True, **kwargs)
        if (loss := _auxiliary(outputs)) is not None:
            losses.append(loss * weight)
        return result

    def at_last(states: Tensor, head):
        before = [each.to(states) for each in hidden]  # accelerate widens what a model returns under autocast
        return compute(torch.cat([*before, states[0]])[idle * few :], head)

    *first, last = batch.layout.pairs
    idle, few = max(0, calls - len(batch.layout.pairs)), min(FEW, batch.layout.pairs[0].end)
    for _ in range(idle):
        hidden.append(call(0, few, lambda states, head: states[0], 0))
    for spans in first:
        hidden.append(call(spans.start, spans.end, lambda states, head: states[0], spans.end - spans.start))
    result = call(last.start, last.end, at_last, last.end - last.start)
    return result, sum(losses) / batch.layout.length if losses else None


def _auxiliary(outputs) -> Tensor | None:
    loss = getattr(outputs, "aux_loss", None)
    return loss if isinstance(loss, Tensor) else None  # 0 stands for none in some models


def _causal(model: nn.Module) -> nn.Module:
    return base_model(extract_model_from_parallel(model, keep_fp32_wrapper=True))
