"""What shared-prefix attention must equal, as separate sequences and dense masks, and how close it must come."""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.budget import judge
from longpo_ops.data.layout import PairSpans, SharedPrefixLayout


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


def sequences(layout: SharedPrefixLayout) -> list[list[list[int]]]:
    """Per pair, per tail: the rows that make up its separate sequence, in order."""
    result = []
    for pair in layout.pairs:
        prefix = list(range(pair.start, pair.prefix_end))
        heads = [prefix] + [prefix[:-1]] * (len(pair.tails) - 1)
        result.append([head + list(range(*tail)) for head, tail in zip(heads, pair.tails, strict=True)])
    return result


def visible(layout: SharedPrefixLayout, window: int | None = None) -> Tensor:
    """(T, T) bool: row i sees column j, if j comes at most window - 1 places before i in a sequence both belong to."""
    mask = torch.zeros(layout.length, layout.length, dtype=torch.bool)
    for rows in (rows for pair in sequences(layout) for rows in pair):
        for place, row in enumerate(rows):
            first = 0 if window is None else max(0, place - window + 1)
            mask[row, rows[first : place + 1]] = True
    return mask


def positions(layout: SharedPrefixLayout) -> Tensor:
    """(1, T): each row's place in its separate sequence."""
    result = torch.empty(1, layout.length, dtype=torch.long)
    for rows in (rows for pair in sequences(layout) for rows in pair):
        result[0, rows] = torch.arange(len(rows))
    return result


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


class TrueFloat64(TorchFunctionMode):
    """Inside it a float64 model really computes in float64: transformers' norms, rotary angles and eager softmax ask
    for float32 whatever the model's dtype, which would leave a truth no better than what it judges."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        widen = lambda x: torch.float64 if x is torch.float32 else x  # noqa: E731
        if function is torch.Tensor.float:
            return args[0].double()
        if function in (torch.Tensor.to, torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax):
            args, kwargs = tuple(map(widen, args)), {name: widen(x) for name, x in (kwargs or {}).items()}
        return function(*args, **(kwargs or {}))


def check_budget(name: str, ours: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Fails unless ours keeps the error budget of plain PyTorch at the same dtype against float64 truth."""
    verdict = judge(ours, plain, truth)
    assert verdict["status"] == "passed", f"{name}: {verdict}"
