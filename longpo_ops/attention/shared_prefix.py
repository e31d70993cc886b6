"""Attention over packs of pairs: the prefix of a pair is read by all its tails, and computed once.

A pack (see data/layout.py) is split into segments of query rows, each with at most two key ranges:

    prefix + chosen tail   its own rows, plain causal
    rejected tail          its own rows, plain causal: (o1, l1);   prefix without its last row: (o2, l2)
                           l = log(exp l1 + exp l2)     o = o1 + sigmoid(l2 - l1) (o2 - o1)

    attention sink        a key of score s and value 0 per head: l = log(exp l + exp s), o = o sigmoid(l1 - s)
    chunks of C rows      segments end where a chunk ends in their separate sequence; of a rejected tail only the first piece
                          has a prefix range, from its chunk's start

The backward calls each kernel's backward once per key range with the MERGED o and l, which is exact (see kernels.py). A sink's
gradient is -sum exp(s - l) (do . o).
Shapes: q (B, H, T, D); k, v (B, Hk, T, D), H a multiple of Hk, grouped heads not repeated; out (B, T, H, D).
Memory: saved for backward q, k, v, out and l (B, H, T) float32. No mask, no concatenation. Work runs over groups of
key heads such that a call's queries stay within GROUP numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longpo_ops.attention.kernels import Case, Kernel, accumulator, choose, make_case
from longpo_ops.data.layout import SharedPrefixLayout
from longpo_ops.kinds import check_number, check_object, check_tensor, check_whole

# Far below the 2^31 numbers that kernels index, and it bounds the scratch of a call at 512K tokens to one key head's.
GROUP = 1 << 28


class KeyRange(NamedTuple):
    """Keys [start, end) of the pack; the segment's first query row sits `offset` positions after row `start`."""

    start: int
    end: int
    offset: int


class Segment(NamedTuple):
    """Query rows [start, end) and what they see. The own ranges of all segments are disjoint and cover the keys."""

    start: int
    end: int
    own: KeyRange
    prefix: KeyRange | None = None


class Call(NamedTuple):
    """One kernel call."""

    rows: slice
    keys: slice
    case: Case
    kernel: Kernel
    why: str


def plan_segments(
    layout: SharedPrefixLayout, window: int | None = None, chunk: int | None = None
) -> tuple[Segment, ...]:
    """The segments of a layout; with a window, prefix keys that no row of the tail can reach are left out.

    Raises ValueError where the pairs do not follow each other without gaps from row 0 to layout.length.
    """
    segments, row = [], 0
    for number, pair in enumerate(layout.pairs):
        tails = pair.tails
        bounds = [pair.prefix_end, *(end for _, end in tails)]
        sound = pair.start == row and pair.start < pair.prefix_end and len(tails) > 0
        if not sound or any(a != b or a >= end for (a, end), b in zip(tails, bounds, strict=False)):
            raise ValueError(
                f"shared_prefix_layout: pair {number} is {pair}, expected to start at row {row} with a prefix of at "
                f"least one row, then its tails, each of at least one row and starting where the one before it ends"
            )
        row = tails[-1][1]
        segments += _pieces(pair.start, tails[0][1], 0, chunk)
        last = pair.prefix_end - 1  # the prefix row that a rejected tail repeats
        for start, end in tails[1:]:
            first = pair.start
            if window is not None:
                first = max(first, last - window + 1)
            if chunk is not None:
                first += (last - first) // chunk * chunk
            pieces = _pieces(start, end, last - pair.start, chunk)
            if first < last:
                pieces[0] = pieces[0]._replace(prefix=KeyRange(first, last, last - first))
            segments += pieces
    if row != layout.length:
        raise ValueError(f"shared_prefix_layout: its pairs end at row {row}, its length says {layout.length}")
    return tuple(segments)


def _pieces(start: int, end: int, position: int, chunk: int | None) -> list[Segment]:
    """Rows [start, end), of which the first has this position, as one causal segment, or one for each chunk."""
    bounds = [start, end] if chunk is None else [start, *range(start + chunk - position % chunk, end, chunk), end]
    return [Segment(a, b, KeyRange(a, b, 0)) for a, b in pairwise(bounds)]


def plan_calls(
    q: Tensor,  # (B, H, Tq, D)
    k: Tensor,  # (B, Hk, Tk, D)
    v: Tensor,  # (B, Hk, Tk, Dv)
    layout: SharedPrefixLayout | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    chunk: int | None = None,
) -> tuple[tuple[Call, ...], ...]:
    """Per segment its kernel calls, the own range first. Without a layout queries are the last rows, plainly causal."""
    rows, keys = q.shape[2], k.shape[2]
    if layout is not None:
        segments = plan_segments(layout, window, chunk)
    elif chunk is None:
        segments = (Segment(0, rows, KeyRange(0, keys, keys - rows)),)
    else:
        segments = tuple(_pieces(0, rows, 0, chunk))
    calls = []
    for segment in segments:
        here = slice(segment.start, segment.end)
        ranges = [r for r in (segment.own, segment.prefix) if r is not None]
        calls.append(tuple(_plan_call(q, k, v, here, r, scale, window, softcap) for r in ranges))
    return tuple(calls)


def _plan_call(q, k, v, rows: slice, keys: KeyRange, scale, window, softcap) -> Call:
    seen = slice(keys.start, keys.end)
    case = make_case(rows.stop - rows.start, keys.end - keys.start, keys.offset, scale, window, softcap)
    return Call(rows, seen, case, *choose(q[:, :, rows], k[:, :, seen], v[:, :, seen], case))


def _head_groups(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Matching slices of query and key heads, each of at most GROUP query numbers where one key head allows it."""
    batch, heads, rows, size = q.shape
    per_key = heads // k.shape[1]
    step = max(1, GROUP // (batch * per_key * rows * size))
    for head in range(0, k.shape[1], step):
        end = min(head + step, k.shape[1])
        yield slice(head * per_key, end * per_key), slice(head, end)


def _merge(o1: Tensor, l1: Tensor, o2: Tensor, l2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets, from that over each: o (B, H, n, D), l (B, H, n)."""
    w2 = torch.sigmoid(l2 - l1).unsqueeze(-1)  # the weights sum to 1 exactly, unlike exp(l1 - l) and exp(l2 - l)
    return torch.lerp(o1.to(w2.dtype), o2.to(w2.dtype), w2).to(o1.dtype), torch.logaddexp(l1, l2)


def _sink(o: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Attention that also sees a key of score `sinks` (H,) and value 0."""
    scores = sinks.to(lse.dtype)[:, None]
    return (o * torch.sigmoid(lse - scores).unsqueeze(-1)).to(o.dtype), torch.logaddexp(lse, scores.expand_as(lse))


class _SharedPrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, plan: tuple[tuple[Call, ...], ...], sinks: Tensor | None
    ) -> Tensor:
        batch, heads, rows, _ = q.shape
        out = q.new_empty(batch, rows, heads, v.shape[-1])
        lse = q.new_empty(batch, heads, rows, dtype=accumulator(q))
        for h, hk in _head_groups(q, k):
            for calls in plan:
                parts = [c.kernel.forward(q[:, h, c.rows], k[:, hk, c.keys], v[:, hk, c.keys], c.case) for c in calls]
                o, logs = parts[0] if len(parts) == 1 else _merge(*parts[0], *parts[1])
                o, logs = (o, logs) if sinks is None else _sink(o, logs, sinks[h])
                out[:, calls[0].rows, h] = o.transpose(1, 2)
                lse[:, h, calls[0].rows] = logs
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.plan = plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        q, k, v, out, lse, sinks = ctx.saved_tensors
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        out, dout = out.transpose(1, 2), dout.transpose(1, 2)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dsinks = None if sinks is None else torch.empty_like(sinks)
        for h, hk in _head_groups(q, k):
            if sinks is not None:
                seen = (dout[:, h].to(lse.dtype) * out[:, h].to(lse.dtype)).sum(-1)
                dsinks[h] = -(torch.exp(sinks[h].to(lse.dtype)[:, None] - lse[:, h]) * seen).sum((0, 2)).to(sinks.dtype)
            # Own ranges cover all rows and keys once: they write, what comes from the prefix ranges is added.
            for write, call in [(True, c[0]) for c in ctx.plan] + [(False, c[1]) for c in ctx.plan if len(c) > 1]:
                r, s = call.rows, call.keys
                grads = call.kernel.backward(
                    dout[:, h, r], q[:, h, r], k[:, hk, s], v[:, hk, s], out[:, h, r], lse[:, h, r], call.case
                )
                for total, part in zip((dq[:, h, r], dk[:, hk, s], dv[:, hk, s]), grads, strict=True):
                    total.copy_(part) if write else total.add_(part)
        return dq, dk, dv, None, dsinks


def shared_prefix_attention(
    q: Tensor,  # (B, H, Tq, D)
    k: Tensor,  # (B, Hk, Tk, D), Hk divides H
    v: Tensor,  # (B, Hk, Tk, Dv)
    *,
    layout: SharedPrefixLayout | None = None,
    scale: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of a pack of pairs, (B, Tq, H, Dv) in q's dtype, equal to that of the pairs' separate sequences.

    layout: which rows are prefix, chosen and rejected; the same for every batch entry; Tq = Tk = layout.length.
    None is plain causal attention, the queries being the last Tq of Tk positions (Tq < Tk: decoding with a cache).
    scale: of the scores, D^-1/2 by default. window: a row sees the `window` last positions, its own included, counted
    in its separate sequence, so a rejected tail sees on into the end of the prefix. chunk: a row sees no row before the
    last multiple of `chunk` in its separate sequence; queries are then as many as keys. softcap: scores become
    softcap * tanh(score / softcap). sinks (H,): scores, as they come, of one more key of each head, whose value is 0.
    dtypes: float64, float32, bfloat16, float16; under autocast q, k and v are cast.

    Raises ValueError for shapes, dtypes or a layout that do not fit, naming them.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor)
    q, k, v = under_autocast(q, k, v)
    _check(q, k, v, layout)
    scale = q.shape[-1] ** -0.5 if scale is None else check_number("scale", scale)
    softcap = None if softcap is None else check_number("softcap", softcap, above=0)
    window, chunk = (
        None if rows is None else check_whole(name, rows, 1, "at least 1 (a row sees itself), or None")
        for name, rows in (("window", window), ("chunk", chunk))
    )
    _check_more(q, k, window, chunk, sinks)
    return run_plan(q, k, v, plan_calls(q, k, v, layout, scale, window, softcap, chunk), sinks)


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, in autocast's dtype where it is enabled for their device."""
    kind = tensors[0].device.type
    enabled = torch.is_autocast_enabled(kind)
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors) if enabled else tensors


def run_plan(
    q: Tensor, k: Tensor, v: Tensor, plan: tuple[tuple[Call, ...], ...], sinks: Tensor | None = None
) -> Tensor:
    """Attention (B, Tq, H, Dv) by the calls of plan_calls."""
    return _SharedPrefixAttention.apply(q, k, v, plan, sinks)


def _check_more(q: Tensor, k: Tensor, window: int | None, chunk: int | None, sinks: Tensor | None) -> None:
    if chunk is not None and (window is not None or q.shape[2] != k.shape[2]):
        raise ValueError(
            f"chunk={chunk} came with window={window}, {q.shape[2]} queries and {k.shape[2]} keys; expected no window, and as "
            "many queries as keys (no cache)"
        )
    if sinks is not None and check_tensor("sinks", sinks).shape != q.shape[1:2]:
        raise ValueError(f"sinks has the shape {tuple(sinks.shape)}: expected ({q.shape[1]},), a score for each head")


def _check(q: Tensor, k: Tensor, v: Tensor, layout: SharedPrefixLayout | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        came = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"q, k and v must share one floating dtype and one device, got {came}")
    if layout is not None:
        check_object("shared_prefix_layout", layout, SharedPrefixLayout, "a SharedPrefixLayout, as a PairBatch has")
    if q.ndim != 4 or k.ndim != 4 or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"expected q (B, H, Tq, D), k (B, Hk, Tk, D) and v (B, Hk, Tk, Dv), got {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"the number of query heads must be a multiple of the number of key heads, got {shapes}")
    if not 0 < q.shape[2] <= k.shape[2]:
        raise ValueError(f"expected at least one query row and no more query than key rows, got {shapes}")
    if layout is not None and not q.shape[2] == k.shape[2] == layout.length:
        raise ValueError(
            f"shared_prefix_layout describes {layout.length} rows, got {shapes}; where keys outnumber queries a cache "
            f"is in use: pass use_cache=False with a layout"
        )
