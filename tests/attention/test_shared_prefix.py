"""The attention function alone, against a dense masked softmax in float64."""

import pytest
import torch

from benchmarks.budget import DRAWS
from longpo_ops.attention import kernels, shared_prefix
from longpo_ops.attention.kernels import choose, make_case
from longpo_ops.attention.shared_prefix import plan_calls, plan_segments, shared_prefix_attention
from longpo_ops.data.layout import PairSpans, SharedPrefixLayout
from tests.budget import check_budget

from .dense import dense_attention, make_layout, make_tree, separate_attention, sequences, visible

# A document of 20 rows, questions that end at rows 25, 41 and 52, answers; forks out of order, and one inside an answer.
TREE = SharedPrefixLayout(
    (make_tree((29, None), (4, 25), (4, 25), (8, 19), (3, 41), (9, 19), (2, 54), (3, 41), (4, 3)),), 66
)
LAYOUTS = {
    "one token each": make_layout((1, 1, 1)),
    "one pair": make_layout((40, 9, 13)),
    "several rejected": make_layout((21, 6, 1, 9, 4)),
    "several pairs": make_layout((17, 3, 5), (1, 4, 2, 1), (12, 6), (1, 1, 3)),
    "a tree, then a pair": SharedPrefixLayout((*TREE.pairs, PairSpans(66, 75, ((75, 78), (78, 82)))), 82),
}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def make_inputs(layout, dtype, device="cpu", heads=4, kv_heads=2, size=16, batch=DRAWS):
    generator = torch.Generator().manual_seed(layout.length)
    shapes = [(batch, layout.length, n, size) for n in (heads, kv_heads, kv_heads, heads)]
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in tensors[:3])
    return q, k, v, tensors[3]


def run(function, q, k, v, dout):
    out = function(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def compare(layout, dtype, device="cpu", window=None, softcap=None, least_keys=1):
    """Output and gradients of ours and of plain PyTorch in the same dtype, both against a dense softmax in float64.

    No gradient enters at rows that see fewer than least_keys keys. For a row with one key that of its query is exactly 0,
    where the formula of all fused kernels, PyTorch's included, takes the difference of two equal sums: what is left of
    them is the sums' own rounding, which has nothing to do with plain's (and differs between processors).
    """
    tensors = make_inputs(layout, dtype, device)
    mask = visible(layout, window).to(device)
    tensors[3].mul_((mask.sum(-1) >= least_keys)[:, None, None])
    scale = 0.5  # off the default, so that a kernel that ignores it is seen
    dense = lambda q, k, v: dense_attention(q, k, v, mask, scale, softcap)  # noqa: E731
    wide = [x.detach().double().requires_grad_() for x in tensors]
    truth = run(dense, *wide)
    sdpa = lambda q, k, v: separate_attention(q, k, v, layout, scale, window)  # noqa: E731
    plain = run(dense if softcap else sdpa, *tensors)
    ours = run(
        lambda q, k, v: shared_prefix_attention(q, k, v, layout=layout, scale=scale, window=window, softcap=softcap),
        *tensors,
    )
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), ours, plain, truth, strict=True):
        assert a.dtype == dtype
        if dtype == torch.float64:
            torch.testing.assert_close(a, c, rtol=0, atol=1e-13)  # about 50 terms below 10: 50 * 10 * eps
        else:
            check_budget(name, a, b, c, draws=True)  # an entry of the batch is a draw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_equals_dense_softmax(layout, device, dtype):
    compare(layout, dtype, device)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [1, 2, 7, 30, 1000])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_window_follows_positions(layout, window, softcap, monkeypatch):
    monkeypatch.setitem(kernels.SCORES, "cpu", 1)  # blocks of 16 rows: several per call
    compare(layout, torch.float64, window=window, softcap=softcap)
    if softcap is None:
        compare(layout, torch.float32, window=window, least_keys=2)


@pytest.mark.parametrize("window", [None, 7])
def test_softcap(window):
    # PyTorch's own attention has no soft-cap, so plain is a softmax written out.
    for layout in (make_layout((40, 9, 13)), make_layout((21, 6, 9, 4), (12, 6))):
        compare(layout, torch.float32, window=window, softcap=1.5, least_keys=4)


def test_blockwise_equals_dense_softmax_in_bf16(monkeypatch):
    monkeypatch.setattr(kernels, "stock_kernels", lambda device: ())
    compare(LAYOUTS["several pairs"], torch.bfloat16)


def test_one_key_head_at_a_time_gives_the_same(monkeypatch):
    layout = LAYOUTS["several pairs"]
    monkeypatch.setattr(shared_prefix, "GROUP", 1)
    q, k, *_ = make_inputs(layout, torch.float32)
    assert list(shared_prefix._head_groups(q, k)) == [(slice(0, 2), slice(0, 1)), (slice(2, 4), slice(1, 2))]
    compare(layout, torch.float32)


@pytest.mark.parametrize("kernel", ["stock", "blockwise"])
def test_gradcheck(kernel, monkeypatch):
    options = {}
    if kernel == "blockwise":
        monkeypatch.setattr(kernels, "stock_kernels", lambda device: ())
        options = dict(window=4, softcap=2.0)
    layout = make_layout((5, 2, 3, 1), (1, 2, 2))
    q, k, v, _ = make_inputs(layout, torch.float64, size=4, batch=1, heads=2, kv_heads=1)
    attend = lambda q, k, v: shared_prefix_attention(q, k, v, layout=layout, **options)  # noqa: E731
    assert torch.autograd.gradcheck(attend, (q, k, v))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("rows", [1, 4, 23])
def test_without_layout_it_is_causal_over_the_last_rows(rows, window):
    whole = make_layout((22, 1))
    q, k, v, _ = make_inputs(whole, torch.float64)
    mask = visible(whole, window)[-rows:]
    expected = dense_attention(q[:, :, -rows:], k, v, mask, 0.25, None)
    torch.testing.assert_close(shared_prefix_attention(q[:, :, -rows:], k, v, window=window), expected)


def test_saves_no_more_than_inputs_output_and_logsumexp():
    layout = LAYOUTS["several pairs"]
    q, k, v, _ = make_inputs(layout, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        out = shared_prefix_attention(q, k, v, layout=layout)
    assert sorted(saved) == sorted([q.numel(), k.numel(), v.numel(), out.numel(), q.numel() // q.shape[-1]])


def test_autocast_casts_all_three():
    layout = LAYOUTS["one pair"]
    q, k, v, _ = make_inputs(layout, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = shared_prefix_attention(q, k.bfloat16(), v, layout=layout)
    assert out.dtype == torch.bfloat16


def test_a_window_that_hides_nothing_keeps_the_stock_kernel():
    q, k, v, _ = make_inputs(make_layout((40, 9, 13)), torch.float32)
    for window, stock in ((53, True), (52, False)):  # the longest sequence has 52 rows beside the repeated one
        calls = plan_calls(q, k, v, make_layout((40, 9, 13)), 1.0, window - 1, None)
        assert all(c.kernel is kernels.CPU_FLASH for s in calls for c in (*s.own, *s.shared)) == stock


def test_choice_says_why():
    q, k, v, _ = make_inputs(make_layout((4, 4)), torch.float32)
    kernel, why = choose(q, k, v, make_case(8, 8, 0, 1.0, None, 30.0))
    assert kernel is kernels.BLOCKWISE and "soft-cap (30)" in why
    kernel, why = choose(q, k, v, make_case(8, 8, 0, 1.0, 3, None))
    assert kernel is kernels.BLOCKWISE and "sliding window (3)" in why
    assert choose(q, k, v, make_case(8, 8, 0, 1.0, 8, None)) == (kernels.CPU_FLASH, "first choice on this device")


BAD_LAYOUTS = {
    "gap before a tail": SharedPrefixLayout((PairSpans(0, 3, ((3, 5), (6, 8))),), 8),
    "empty tail": SharedPrefixLayout((PairSpans(0, 3, ((3, 5), (5, 5))),), 5),
    "empty prefix": SharedPrefixLayout((PairSpans(0, 0, ((0, 2),)),), 2),
    "no tail": SharedPrefixLayout((PairSpans(0, 3, ()),), 3),
    "gap between pairs": SharedPrefixLayout((PairSpans(0, 2, ((2, 3),)), PairSpans(4, 5, ((5, 6),))), 6),
    "a tail that repeats a row of its own": SharedPrefixLayout((PairSpans(0, 3, ((3, 5), (5, 7)), (5,)),), 7),
    "a tail that repeats a row before the prefix's last": SharedPrefixLayout(
        (PairSpans(0, 3, ((3, 5), (5, 7)), (1,)),), 7
    ),
    "rows left over": SharedPrefixLayout((PairSpans(0, 2, ((2, 3),)),), 4),
}


@pytest.mark.parametrize("layout", BAD_LAYOUTS.values(), ids=BAD_LAYOUTS)
def test_refuses_unsound_layouts(layout):
    with pytest.raises(ValueError, match="shared_prefix_layout"):
        plan_segments(layout)


def test_refuses_unsound_inputs():
    layout = make_layout((4, 4))
    q, k, v, _ = make_inputs(layout, torch.float32)
    for arguments, options, message in [
        ((q[:, :, 1:], k, v), dict(layout=layout), "use_cache=False"),
        ((q, k.double(), v), {}, "one floating dtype"),
        ((q, k[..., :8], v), {}, "expected q"),
        ((q[:, :3], k, v), {}, "multiple"),
        ((q, k[:, :, :5], v[:, :, :5]), {}, "no more query than key rows"),
        ((q, k, v), dict(window=0), "window=0: expected at least 1"),
        ((q, k, v), dict(window=1.5), "window=1.5: expected at least 1"),
        ((q, k, v), dict(scale=float("nan")), "scale=nan: expected a finite number"),
        ((q, k, v), dict(scale=True), "scale=True: expected a finite number"),
        ((q, k, v), dict(softcap=-1.0), "softcap=-1.0: expected a finite number > 0"),
        ((q, k, v), dict(layout="x"), "shared_prefix_layout: expected a SharedPrefixLayout"),
        ((q.tolist(), k, v), {}, "q: expected a tensor of float16"),
        ((q, k.long(), v), {}, "k.dtype=torch.int64"),
        ((q, k, v.detach().to_sparse()), {}, "v: a tensor of layout sparse_coo"),
        ((q, k, v.to("meta")), {}, "v is on the meta device"),
    ]:
        with pytest.raises(ValueError, match=message):
            shared_prefix_attention(*arguments, **options)
    for spans in (
        dict(start=0.0),
        dict(prefix_end="1"),
        dict(tails=((1, 2, 3),)),
        dict(tails=(4, 5)),
        dict(tails=5),
        dict(forks=(0,)),
        dict(forks=("0",)),
    ):
        with pytest.raises(ValueError, match=f"PairSpans: {next(iter(spans))}"):
            PairSpans(**dict(start=0, prefix_end=1, tails=((1, 2),)) | spans)


def chunked(layout, chunk):
    """(T, T) bool: who sees whom, by places in the separate sequence; prefix rows of a rejected tail have their own places."""
    seen = torch.zeros(layout.length, layout.length, dtype=torch.bool)
    for pair in sequences(layout):
        for rows in pair:
            for place, row in enumerate(rows):
                seen[row] = False
                seen[row, rows[place - place % chunk : place + 1]] = True
    return seen


@pytest.mark.parametrize("chunk", [1, 2, 5, 8, 64])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_chunks_end_where_they_do_in_separate_sequences(layout, chunk):
    tensors = [x.detach().double().requires_grad_() for x in make_inputs(layout, torch.float64, batch=1)]
    mask = chunked(layout, chunk)
    truth = run(lambda q, k, v: dense_attention(q, k, v, mask, 0.5, None), *tensors)
    ours = run(lambda q, k, v: shared_prefix_attention(q, k, v, layout=layout, scale=0.5, chunk=chunk), *tensors)
    for a, c in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, c, rtol=0, atol=1e-13)


@pytest.mark.parametrize("window", [None, 7])
def test_a_sink_is_one_more_key_of_no_value(window):
    layout = LAYOUTS["several pairs"]
    q, k, v, dout = (x.detach().double().requires_grad_() for x in make_inputs(layout, torch.float64, batch=2))
    sinks = torch.linspace(-2, 3, 4, dtype=torch.float64, requires_grad=True)
    scores = 0.5 * q @ k.repeat_interleave(2, 1).transpose(2, 3)
    scores = scores.masked_fill(~visible(layout, window), -torch.inf)
    column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    truth = (weights @ v.repeat_interleave(2, 1)).transpose(1, 2)
    ours = shared_prefix_attention(q, k, v, layout=layout, scale=0.5, window=window, sinks=sinks)
    for a, c in zip(
        [ours, *torch.autograd.grad(ours, (q, k, v, sinks), dout.detach())],
        [truth, *torch.autograd.grad(truth, (q, k, v, sinks), dout.detach())],
        strict=True,
    ):
        torch.testing.assert_close(a, c, rtol=0, atol=1e-12)


def test_refuses_chunks_with_a_cache_and_sinks_of_other_heads():
    q, k, v, _ = make_inputs(LAYOUTS["one pair"], torch.float32, batch=1)
    with pytest.raises(ValueError, match="chunk=8 came with window=None, 5 queries and 62 keys"):
        shared_prefix_attention(q[:, :, -5:], k, v, chunk=8)
    with pytest.raises(ValueError, match=r"sinks has the shape \(3,\): expected \(4,\)"):
        shared_prefix_attention(q, k, v, sinks=torch.zeros(3))
