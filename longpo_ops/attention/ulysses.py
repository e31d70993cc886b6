"""Heads against rows: attention over one packed row whose rows lie on the ranks of a group (DeepSpeed Ulysses).

    (1, heads, n_r, D)  --all-to-all-->  (1, own heads, N, D)  attention  --all-to-all-->  (1, n_r, heads, D)

Of n ranks, rank r has n_r of N rows (parallel.Shards: any N, shards of different sizes), and for the attention all N rows of
its share of H query and Hk kv heads:

    n <= Hk    whole kv heads, each with its query heads
    n >  Hk    one kv head, the same on n / Hk ranks, and a part of its query heads

Shares are contiguous and as even as they go; any n up to H goes. A kv head that several ranks share is sent to each of them
and its gradients are summed on return. One all-to-all carries q, k and v. A rank sends, per layer and pass (forward,
backward, and recomputation under checkpointing),

    n_r (2 H + 2 max(Hk, n)) D (n - 1) / n     numbers (exchanged_numbers)

Memory beside arguments and results: from rows to heads the buffer that is sent, and what comes is the result; from heads to
rows the buffer that comes, and one for the gradients of q, k and v together (an output is sent from where it lies). Not
covered: key-value caches, several rows at a time, heads of k and v of different sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from longpo_ops.kinds import check_whole
from longpo_ops.parallel import Shards


class Share(NamedTuple):
    """The heads of one rank."""

    heads: range
    kv_heads: range


@cache
def head_plan(heads: int, kv_heads: int, ranks: int) -> tuple[Share, ...]:
    """The share of each rank. Raises ValueError for more ranks than query heads."""
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads and {kv_heads} kv heads came; expected a multiple of the kv heads")
    if ranks > heads:
        raise ValueError(
            f"sequence_parallel={ranks}: the attention has {heads} query and {kv_heads} kv heads, and each rank takes at least "
            f"one query head; expected at most {heads}"
        )
    group = heads // kv_heads
    if ranks <= kv_heads:
        owned = [_part(kv_heads, ranks, r) for r in range(ranks)]
        return tuple(Share(range(group * kv.start, group * kv.stop), kv) for kv in owned)
    plan = []
    for kv in range(kv_heads):
        sharing = len(_part(ranks, kv_heads, kv))
        for i in range(sharing):
            part = _part(group, sharing, i)
            plan.append(Share(range(kv * group + part.start, kv * group + part.stop), range(kv, kv + 1)))
    return tuple(plan)


def exchanged_numbers(rows: int, heads: int, kv_heads: int, head_dim: int, ranks: int) -> float:
    """Numbers that a rank with so many rows sends to the others, per layer and pass; of shares that differ, the mean."""
    return rows * 2 * (heads + max(kv_heads, ranks)) * head_dim * (ranks - 1) / ranks


def check_heads(config, ranks: int) -> None:
    """Raises ValueError where the attention heads of a transformers config cannot be shared out over so many ranks."""
    ranks = check_whole("sequence_parallel", ranks, 1)
    heads = config.num_attention_heads
    head_plan(heads, getattr(config, "num_key_value_heads", None) or heads, ranks)


def to_heads(q: Tensor, k: Tensor, v: Tensor, shards: Shards) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's rows of all heads, (1, H, n_r, D) and twice (1, Hk, n_r, D) -> all rows of its heads, (1, own heads, N, D).

    A collective. Raises ValueError, before it, for other shapes and for heads that cannot be shared out.
    """
    rows = shards.counts()[shards.rank]
    if q.ndim != 4 or q.shape[0] != 1 or k.shape != v.shape or q[:, 0].shape != k[:, 0].shape or q.shape[2] != rows:
        came = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(
            f"rank {shards.rank} of {shards.size} holds {rows} of {shards.length} rows, got {came}; expected q (1, H, {rows}, "
            f"D) and k, v (1, Hk, {rows}, D): give the model the rows of shards.rows alone"
        )
    parts = tuple((a, b, b) for a, b in head_plan(q.shape[1], k.shape[1], shards.size))
    exchanged = _ToHeads.apply(shards, parts, *(x.squeeze(0).transpose(0, 1) for x in (q, k, v)))
    return tuple(x.transpose(0, 1).unsqueeze(0) for x in exchanged)


def to_rows(out: Tensor, heads: int, kv_heads: int, shards: Shards) -> Tensor:
    """All rows of this rank's heads, (1, N, own heads, D) -> its rows of all heads, (1, n_r, heads, D). A collective."""
    parts = tuple((share.heads,) for share in head_plan(heads, kv_heads, shards.size))
    return _ToRows.apply(shards, parts, out.squeeze(0)).unsqueeze(0)


Parts = tuple[tuple[range, ...], ...]  # of each rank, its heads of each tensor


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shards: Shards, parts: Parts, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.given = shards, parts
        return _rows_to_heads(shards, parts, tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        return None, None, *_heads_to_rows(*ctx.given, grads)


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shards: Shards, parts: Parts, tensor: Tensor) -> Tensor:
        ctx.given = shards, parts
        return _heads_to_rows(shards, parts, (tensor,))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return None, None, *_rows_to_heads(*ctx.given, (grad,))


def _rows_to_heads(shards: Shards, parts: Parts, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(n_r, heads, D) each -> (N, own heads, D) each: views of what came, which lies row by row already."""
    rows, size = tensors[0].shape[0], tensors[0].shape[2]
    counts = [sum(map(len, part)) for part in parts]
    sizes, mine = [rows * count * size for count in counts], counts[shards.rank]
    sent = tensors[0].new_empty(sum(sizes))
    for part, chunk in zip(parts, sent.split(sizes), strict=True):
        theirs = [x[:, heads.start : heads.stop] for x, heads in zip(tensors, part, strict=True)]
        torch.cat(theirs, 1, out=chunk.view(rows, -1, size))
    came = _all_to_all(sent, sizes, [n * mine * size for n in shards.counts()], shards)
    return came.view(shards.length, mine, size).split([len(heads) for heads in parts[shards.rank]], 1)


def _heads_to_rows(shards: Shards, parts: Parts, tensors: Sequence[Tensor]) -> list[Tensor]:
    """(N, own heads, D) each -> (n_r, heads, D) each; what several ranks have of one head is summed."""
    rows, size = shards.counts()[shards.rank], tensors[0].shape[2]
    counts = [sum(map(len, part)) for part in parts]
    sizes, mine = [rows * count * size for count in counts], counts[shards.rank]
    sent = tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat(list(tensors), 1).view(-1)
    came = _all_to_all(sent, [n * mine * size for n in shards.counts()], sizes, shards)
    of_rank = [
        chunk.view(rows, count, size).split([len(heads) for heads in part], 1)
        for part, count, chunk in zip(parts, counts, came.split(sizes), strict=True)
    ]
    result = []
    for i in range(len(tensors)):
        of_heads: dict[range, list[Tensor]] = {}
        for part, pieces in zip(parts, of_rank, strict=True):
            of_heads.setdefault(part[i], []).append(pieces[i])
        summed = [x[0] if len(x) == 1 else torch.stack(x).sum(0) for x in of_heads.values()]
        result.append(torch.cat(summed, 1))
    return result


def _all_to_all(sent: Tensor, sizes: list[int], sizes_to_come: list[int], shards: Shards) -> Tensor:
    came = sent.new_empty(sum(sizes_to_come))
    dist.all_to_all_single(came, sent, sizes_to_come, sizes, group=shards.group)
    return came


def _part(whole: int, parts: int, i: int) -> range:
    """The i-th of so many parts of range(whole), which differ by at most one."""
    return range(whole * i // parts, whole * (i + 1) // parts)
