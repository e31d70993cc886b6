"""Shared-prefix attention on this device: every kernel that takes the calls, outputs and gradients against float64.

truth is a masked softmax over all scores in float64, plain PyTorch's own attention at the inputs' dtype over every sequence
by itself. An entry of the batch is a draw. Memory: a few (B, H, T, T) score matrices in float64.

Tests: tests/benchmarks/gpu/test_check.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from longpo_ops.attention import kernels
from longpo_ops.attention.shared_prefix import plan_calls, run_plan
from longpo_ops.data.layout import PairSpans, SharedPrefixLayout

from ..budget import judge, worst
from .correctness import DTYPES, SEEDS
from .rows import Row
from .setting import Setting

LAYOUTS = {  # per pair its rows: prefix, chosen tail, rejected tails
    "one pair": ((1000, 200, 300),),
    "several rejected": ((515, 100, 1, 60, 33),),
    "several pairs": ((300, 50, 70), (1, 40, 2, 10), (260, 90), (1, 1, 3)),
}
TREE = 515, (40, 60, 33, 1), (70, 50)  # a document's rows; of each question its own, then those of its answers
HEADS = {"8 of 2, size 128": (8, 2, 128), "4 of 4, size 64": (4, 4, 64)}  # query heads, key heads, head size
SCALE = 0.07  # off the default, so that a kernel that ignores it is seen
WINDOW = 150
SECONDS = 0.8  # of a case: cuDNN builds a graph for each new shape


def make_layout(*pairs: tuple[int, ...]) -> SharedPrefixLayout:
    """Each pair is (prefix rows, chosen rows, rejected rows ...), a rejected tail's repeated token included."""
    spans, row = [], 0
    for prefix, *tails in pairs:
        start, row = row, row + prefix
        ends = []
        for length in tails:
            ends.append((row, row + length))
            row += length
        spans.append(PairSpans(start, start + prefix, tuple(ends)))
    return SharedPrefixLayout(tuple(spans), row)


def make_tree(*branches: tuple[int, int | None]) -> PairSpans:
    """Each branch is (rows, the row that its first one repeats): one document's, from row 0. The prefix is one row."""
    ends = list(accumulate(rows for rows, _ in branches))
    tails = ((1, ends[0]), *pairwise(ends))
    return PairSpans(0, 1, tails, tuple(fork for _, fork in branches[1:]))


def make_layouts(shrink: int) -> dict[str, SharedPrefixLayout]:
    """The pairs of LAYOUTS and the tree, all of their parts shorter by a factor."""
    less = lambda parts: tuple(-(-rows // shrink) for rows in parts)  # noqa: E731
    layouts = {name: make_layout(*map(less, pairs)) for name, pairs in LAYOUTS.items()}
    (document,), branches = less(TREE[:1]), []
    row = document
    for question, *answers in map(less, TREE[1:]):
        branches.append((question, document - 1))
        branches += ((rows, row + question - 1) for rows in answers)
        row += question + sum(answers)
    tree = make_tree((document, None), *branches)
    return layouts | {"tree": SharedPrefixLayout((tree,), tree.end)}


def sequences(layout: SharedPrefixLayout) -> list[list[list[int]]]:
    """Per pair, per tail: the rows that make up its separate sequence, in order, walked from each row to the one before it."""
    result = []
    for pair in layout.pairs:
        before = {row: row - 1 for row in range(pair.start + 1, pair.end)} | {pair.start: None}
        for (start, _), fork in zip(pair.tails[1:], pair.forks, strict=True):
            before[start] = before[fork]
        result.append([])
        for _, end in pair.tails:
            row, rows = end - 1, []
            while row is not None:
                rows.append(row)
                row = before[row]
            result[-1].append(rows[::-1])
    return result


def visible(layout: SharedPrefixLayout, window: int | None = None) -> Tensor:
    """(T, T) bool: row i sees column j, if j comes at most window - 1 places before i in a sequence both belong to."""
    mask = torch.zeros(layout.length, layout.length, dtype=torch.bool)
    for rows in (rows for pair in sequences(layout) for rows in pair):
        for place, row in enumerate(rows):
            first = 0 if window is None else max(0, place - window + 1)
            mask[row, rows[first : place + 1]] = True
    return mask


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    """(B, T, H, D): masked softmax over all scores at once, the softmax in at least float32, as transformers' eager."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = q @ k.mT * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    p = s.masked_fill(~mask, float("-inf")).softmax(-1, dtype=dtype).to(q.dtype)
    return (p @ v).transpose(1, 2)


def separate_attention(q: Tensor, k: Tensor, v: Tensor, layout: SharedPrefixLayout, scale: float, window: int | None):
    """(B, T, H, D): every sequence by itself through PyTorch's own attention, as a trainer without sharing would."""
    out = [None] * layout.length
    for rows in (rows for pair in sequences(layout) for rows in pair):
        mask = None if window is None else visible(make_layout((len(rows) - 1, 1)), window).to(q.device)
        part = torch.nn.functional.scaled_dot_product_attention(
            *(x[:, :, rows] for x in (q, k, v)), mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        for place, row in enumerate(rows):
            out[row] = part[:, :, place] if out[row] is None else out[row]
    return torch.stack(out, 1)


def rows(setting: Setting) -> Iterator[Row]:
    """A row per kernel, layout, heads, dtype and window; bfloat16 first, other dtypes on one pair: a graph costs time."""
    shrink = 1 if setting.on_gpu else 20
    stock = (kernels.CUDNN, kernels.TORCH_FLASH) if setting.elsewhere else kernels.stock_kernels(setting.device)
    found = (*stock, kernels.BLOCKWISE)
    for dtype in DTYPES:
        for name, layout in list(make_layouts(shrink).items())[: None if dtype == DTYPES[0] else 1]:
            for shape, heads in HEADS.items():
                for window in (None, WINDOW // shrink):
                    about = f"{name}, {shape}, {str(dtype)[6:]}" + (f", window {window}" if window else "")
                    for kernel in found:
                        compute = partial(_case, kernel, layout, heads, dtype, window, setting)
                        yield Row("shared-prefix attention", about, compute, kernel.name, SECONDS)


def _case(
    kernel: kernels.Kernel, layout: SharedPrefixLayout, heads: tuple[int, int, int], dtype, window, setting: Setting,
    seed: int,
) -> dict:  # fmt: skip
    generator, (query, key, size) = torch.Generator().manual_seed(layout.length + SEEDS * seed), heads
    device, shapes = setting.device, [(setting.draws, layout.length, n, size) for n in (query, key, key, query)]
    *inputs, upstream = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    inputs = [x.transpose(1, 2) for x in inputs]
    plan = plan_calls(*inputs, layout, SCALE, window, None)
    for call in (call for stretch in plan for call in (*stretch.own, *stretch.shared)):
        q, k, v = inputs[0][:, :, call.rows], inputs[1][:, :, call.keys], inputs[2][:, :, call.keys]
        if (refusal := kernel.refusal(q, k, v, call.case)) is not None:
            return {"status": f"skipped: {kernel.name} {refusal}"}
    put = lambda calls: tuple(call._replace(kernel=kernel) for call in calls)  # noqa: E731
    plan = tuple(stretch._replace(own=put(stretch.own), shared=put(stretch.shared)) for stretch in plan)
    mask = visible(layout, window).to(device)

    ours = _run(lambda *tensors: run_plan(*tensors, plan), inputs, upstream)
    plain = _run(lambda *tensors: separate_attention(*tensors, layout, SCALE, window), inputs, upstream)
    wide = [x.double() for x in inputs]
    truth = _run(lambda *tensors: dense_attention(*tensors, mask, SCALE, None), wide, upstream.double())
    names = ("out", "dq", "dk", "dv")
    return worst({name: judge(*results, draws=True) for name, *results in zip(names, ours, plain, truth, strict=True)})


def _run(function, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]
