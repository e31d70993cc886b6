"""Attention over packs of pairs and trees: what several sequences share is read by all of them, and computed once.

A pack (see data/layout.py) is a plan of kernel calls. The own call of a branch is its rows, plain causal; each row range of its
ancestors is one more call, in which every row sees every key, and all neighbours that see that range are one call:

    o1, l1  of a row from its own range;   o2, l2  from a range of an ancestor, e.g. the prefix without its last row
    l = log(exp l1 + exp l2)     o = o1 + sigmoid(l2 - l1) (o2 - o1)        and so on, range by range

    attention sink        a key of score s and value 0 per head: l = log(exp l + exp s), o = o sigmoid(l1 - s)
    chunks of C rows      own calls end where a chunk ends in their separate sequence; only the first piece of a branch sees
                          ancestors, from its chunk's start
    a window that binds   goes by a row's position: each branch then has calls of its own

K sequences whose ancestors have A distinct ranges are K + A calls: of questions about a document with answers each, a range
for each question and one for the document. The backward calls each kernel's backward once per call with the MERGED o and l,
which is exact (see kernels.py): own calls write, those of ancestors add. A sink's gradient is -sum exp(s - l) (do . o).
Shapes: q (B, H, T, D); k, v (B, Hk, T, D), H a multiple of Hk, grouped heads not repeated; out (B, T, H, D).
Memory: saved for backward q, k, v, out and l (B, H, T) float32; while rows are merged, theirs in float32. No mask, no
concatenation. Work runs over groups of key heads such that a call's queries stay within GROUP numbers.
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
    """Query rows [start, end) and keys that they see. window: None where it hides none of them from any row."""

    start: int
    end: int
    keys: KeyRange
    window: int | None = None


class Call(NamedTuple):
    """One kernel call."""

    rows: slice
    keys: slice
    case: Case
    kernel: Kernel
    why: str


class Stretch(NamedTuple):
    """Neighbouring rows whose results are merged: their own calls, which cover all of them once, and those of ancestors."""

    rows: slice
    own: tuple[Call, ...]
    shared: tuple[Call, ...]


Plan = tuple[Stretch, ...]


def plan_segments(
    layout: SharedPrefixLayout, window: int | None = None, chunk: int | None = None
) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """-> own segments, whose key ranges are disjoint and cover all rows, and those of ancestors. With a window or chunks, keys
    that no row can reach are left out.

    Raises ValueError for a layout that is not sound (SharedPrefixLayout.check).
    """
    layout.check()
    own, shared = [], []
    for pair in layout.pairs:
        for j in range(len(pair.tails)):
            *ancestors, (start, end) = pair.path(j)
            place = sum(behind - first for first, behind in ancestors)  # of the first row in its separate sequence
            pieces = _pieces(start, end, place, window, chunk)
            own += pieces
            _add(shared, pieces[0], place, ancestors, _first_place(place, window, chunk), window)
    return tuple(own), _joined(shared)


def _pieces(start: int, end: int, place: int, window: int | None, chunk: int | None) -> list[Segment]:
    """Rows [start, end), of which the first has this place, as one causal segment, or one for each chunk."""
    bounds = [start, end] if chunk is None else [start, *range(start + chunk - place % chunk, end, chunk), end]
    return [Segment(a, b, KeyRange(a, b, 0), window) for a, b in pairwise(bounds)]


def _first_place(place: int, window: int | None, chunk: int | None) -> int:
    """The first place in its separate sequence that a row of this place sees."""
    first = 0 if window is None else max(0, place - window + 1)
    return first if chunk is None else place - place % chunk


def _add(shared: list[Segment], piece: Segment, place: int, ancestors, first: int, window: int | None) -> None:
    """What a piece, whose first row has this place, sees of its ancestors, in their order, from place `first` on."""
    before = 0
    for start, end in ancestors:
        seen = start + max(0, first - before)
        if seen < end:
            offset = place - before - (seen - start)
            hides = window is not None and piece.end - piece.start + offset > window
            keys = KeyRange(seen, end, offset if hides else end - seen)
            shared.append(Segment(piece.start, piece.end, keys, window if hides else None))
        before += end - start


def _joined(shared: list[Segment]) -> tuple[Segment, ...]:
    """Neighbours that see the same keys, all of them, as one."""
    joined: dict[tuple, Segment] = {}  # by keys, window and the row behind the last one
    for segment in shared:
        before = joined.pop((segment.keys, segment.window, segment.start), None) if segment.window is None else None
        segment = segment if before is None else segment._replace(start=before.start)
        joined[segment.keys, segment.window, segment.end] = segment
    return tuple(joined.values())


def plan_calls(
    q: Tensor,  # (B, H, Tq, D)
    k: Tensor,  # (B, Hk, Tk, D)
    v: Tensor,  # (B, Hk, Tk, Dv)
    layout: SharedPrefixLayout | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    chunk: int | None = None,
) -> Plan:
    """The kernel calls, stretch by stretch. Without a layout queries are the last rows, plainly causal."""
    rows, keys = q.shape[2], k.shape[2]
    if layout is not None:
        own, shared = plan_segments(layout, window, chunk)
    elif chunk is None:
        own, shared = (Segment(0, rows, KeyRange(0, keys, keys - rows), window),), ()
    else:
        own, shared = _pieces(0, rows, 0, window, chunk), ()
    stretches: list[tuple[list[Call], list[Call]]] = []
    end = 0
    for segment, kind in sorted([*((s, 0) for s in own), *((s, 1) for s in shared)], key=lambda x: (x[0].start, x[1])):
        if segment.start >= end:
            stretches.append(([], []))
        stretches[-1][kind].append(_plan_call(q, k, v, segment, scale, softcap))
        end = max(end, segment.end)
    return tuple(
        Stretch(slice(own[0].rows.start, own[-1].rows.stop), tuple(own), tuple(shared)) for own, shared in stretches
    )


def _plan_call(q: Tensor, k: Tensor, v: Tensor, segment: Segment, scale: float, softcap: float | None) -> Call:
    keys, rows = segment.keys, slice(segment.start, segment.end)
    seen = slice(keys.start, keys.end)
    case = make_case(rows.stop - rows.start, keys.end - keys.start, keys.offset, scale, segment.window, softcap)
    return Call(rows, seen, case, *choose(q[:, :, rows], k[:, :, seen], v[:, :, seen], case))


def _head_groups(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Matching slices of query and key heads, each of at most GROUP query numbers where one key head allows it."""
    batch, heads, rows, size = q.shape
    per_key = heads // k.shape[1]
    step = max(1, GROUP // (batch * per_key * rows * size))
    for head in range(0, k.shape[1], step):
        end = min(head + step, k.shape[1])
        yield slice(head * per_key, end * per_key), slice(head, end)


def _attend(q: Tensor, k: Tensor, v: Tensor, stretch: Stretch) -> tuple[Tensor, Tensor]:
    """Attention of a stretch's rows over all that they see: o (B, H, n, Dv) and l (B, H, n)."""
    first, calls = stretch.rows.start, (*stretch.own, *stretch.shared)
    parts = ((c.rows, *c.kernel.forward(q[:, :, c.rows], k[:, :, c.keys], v[:, :, c.keys], c.case)) for c in calls)
    if len(calls) == 1:
        return next(parts)[1:]
    shape, dtype = (*q.shape[:2], stretch.rows.stop - first), accumulator(q)
    out, lse = q.new_empty(*shape, v.shape[-1], dtype=dtype), q.new_empty(shape, dtype=dtype)
    for number, (rows, o, logs) in enumerate(parts):
        here = slice(rows.start - first, rows.stop - first)
        if number < len(stretch.own):
            out[:, :, here], lse[:, :, here] = o, logs
        else:
            _merge(out[:, :, here], lse[:, :, here], o, logs)
    return out, lse


def _merge(o: Tensor, lse: Tensor, o2: Tensor, l2: Tensor) -> None:
    """Makes attention over a key set, o (B, H, n, D) and l (B, H, n), that over it and a disjoint one, in place."""
    w2 = torch.sigmoid(l2 - lse).unsqueeze(-1)  # the weights sum to 1 exactly, unlike exp(l1 - l) and exp(l2 - l)
    o.lerp_(o2.to(o.dtype), w2)
    torch.logaddexp(lse, l2, out=lse)


def _sink(o: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Attention that also sees a key of score `sinks` (H,) and value 0."""
    scores = sinks.to(lse.dtype)[:, None]
    return (o * torch.sigmoid(lse - scores).unsqueeze(-1)).to(o.dtype), torch.logaddexp(lse, scores.expand_as(lse))


class _SharedPrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, plan: Plan, sinks: Tensor | None) -> Tensor:
        batch, heads, rows, _ = q.shape
        out = q.new_empty(batch, rows, heads, v.shape[-1])
        lse = q.new_empty(batch, heads, rows, dtype=accumulator(q))
        for h, hk in _head_groups(q, k):
            for stretch in plan:
                o, logs = _attend(q[:, h], k[:, hk], v[:, hk], stretch)
                o, logs = (o, logs) if sinks is None else _sink(o, logs, sinks[h])
                out[:, stretch.rows, h] = o.transpose(1, 2)
                lse[:, h, stretch.rows] = logs
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
            # Own ranges cover all rows and keys once: they write, what comes from ancestors' ranges is added.
            own, shared = ([c for s in ctx.plan for c in s.own], [c for s in ctx.plan for c in s.shared])
            for write, call in [*((True, c) for c in own), *((False, c) for c in shared)]:
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
    """Attention of a pack of pairs and trees, (B, Tq, H, Dv) in q's dtype, equal to that of their separate sequences.

    layout: which rows belong to which sequences; the same for every batch entry; Tq = Tk = layout.length.
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


def run_plan(q: Tensor, k: Tensor, v: Tensor, plan: Plan, sinks: Tensor | None = None) -> Tensor:
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
