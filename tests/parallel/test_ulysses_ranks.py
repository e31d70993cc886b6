"""Heads against rows on 4 ranks: nothing but moved, gradients summed, no copy too many, the numbers sent, errors alike."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longpo_ops.attention import exchanged_numbers, head_plan, shared_prefix_attention, use_shared_prefix
from longpo_ops.attention.ulysses import to_heads, to_rows
from longpo_ops.data import PairSpans, SharedPrefixLayout
from longpo_ops.parallel import Shards
from tests.attention.dense import make_layout, positions
from tests.attention.test_registration import SIZES, make_model

from .ranks import run_ranks

RANKS = 4
# 38 rows: shards of 9 and 10. The last tail of the second pair leaves the one before it.
LAYOUT = SharedPrefixLayout(
    (*make_layout((13, 5, 6)).pairs, PairSpans(24, 31, ((31, 33), (33, 36), (36, 38)), (30, 34))), 38
)
HEADS = {"8 on 8": (8, 8), "8 on 2": (8, 2), "6 on 2": (6, 2), "7 on 1": (7, 1), "12 on 6": (12, 6), "9 on 3": (9, 3)}
SIZE = 8


def tensors(heads, kv_heads, dtype=torch.float64):
    """Whole q, k, v and the output's gradient, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, LAYOUT.length, SIZE) for count in (heads, kv_heads, kv_heads)]
    shapes.append((1, LAYOUT.length, heads, SIZE))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def make_shards(length=LAYOUT.length):
    return Shards(length, dist.group.WORLD)


def moved(heads, kv_heads):
    """Whether what came is bit by bit what the plan says, and goes back as it came."""
    shards, whole = make_shards(), tensors(heads, kv_heads, torch.bfloat16)[:3]
    share = head_plan(heads, kv_heads, RANKS)[shards.rank]
    mine = to_heads(*(x[:, :, shards.rows] for x in whole), shards)
    expected = [x[:, part.start : part.stop] for x, part in zip(whole, (share[0], share[1], share[1]), strict=True)]
    back = to_rows(mine[0].transpose(1, 2), heads, kv_heads, shards)
    return [torch.equal(a, b) for a, b in zip(mine, expected, strict=True)] + [
        torch.equal(back, whole[0][:, :, shards.rows].transpose(1, 2))
    ]


def attention(heads, kv_heads):
    """Largest difference of output and gradients of this rank's rows from those of one process."""
    shards, (*whole, dout) = make_shards(), tensors(heads, kv_heads)
    own = [x[:, :, shards.rows].clone().requires_grad_() for x in whole]
    mine = shared_prefix_attention(*to_heads(*own, shards), layout=LAYOUT, window=6, softcap=4.0)
    out = to_rows(mine, heads, kv_heads, shards)
    out.backward(dout[:, shards.rows])
    whole = [x.requires_grad_() for x in whole]
    truth = shared_prefix_attention(*whole, layout=LAYOUT, window=6, softcap=4.0)
    truth.backward(dout)
    pairs = [(out, truth[:, shards.rows])] + [
        (a.grad, b.grad[:, :, shards.rows]) for a, b in zip(own, whole, strict=True)
    ]
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


class Allocated(TorchDispatchMode):
    """Bytes of all storages made inside."""

    def __init__(self):
        super().__init__()
        self.made, self.kept = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known | {0}:
                self.made += x.untyped_storage().nbytes()
                self.kept.append(x)
                known.add(x.untyped_storage().data_ptr())
        return result


def bytes_made(heads, kv_heads):
    """(made, expected) of to_heads and to_rows, forward and backward: the results, and one buffer or two."""
    shards, (*whole, dout) = make_shards(), tensors(heads, kv_heads)
    own = [x[:, :, shards.rows].contiguous().requires_grad_() for x in whole]
    plan, number = head_plan(heads, kv_heads, RANKS), SIZE * 8
    sizes, mine = [len(a) + 2 * len(b) for a, b in plan], plan[shards.rank]
    rows, all_rows = len(range(shards.length)[shards.rows]) * number, shards.length * number
    with Allocated() as forth:
        q, k, v = to_heads(*own, shards)
    grads = [torch.ones_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    with Allocated() as forth_backward:
        torch.autograd.grad((q, k, v), own, grads)
    out = q.transpose(1, 2).detach().contiguous().requires_grad_()
    with Allocated() as back:
        result = to_rows(out, heads, kv_heads, shards)
    dout = dout[:, shards.rows].contiguous()
    with Allocated() as back_backward:
        torch.autograd.grad(result, out, dout)
    own_heads, shared = all_rows * sizes[shards.rank], sum(sizes) - heads - 2 * kv_heads
    stacked = rows * (2 * kv_heads + sum(2 * len(b) for _, b in plan)) * bool(shared)  # and their sums
    return {
        "rows to heads": (forth.made, rows * sum(sizes) + own_heads),
        "its backward": (forth_backward.made, own_heads + rows * (sum(sizes) + heads + 2 * kv_heads) + stacked),
        "heads to rows": (back.made, 2 * rows * heads),
        "its own backward": (back_backward.made, rows * heads + all_rows * len(mine.heads)),
    }


class Counted:
    """Numbers that this rank sends to others by all-to-alls."""

    def __enter__(self):
        self.sent, self._real = [], dist.all_to_all_single
        dist.all_to_all_single = self
        return self

    def __call__(self, output, input, output_sizes, input_sizes, group):
        assert sum(input_sizes) == input.numel() and sum(output_sizes) == output.numel()
        self.sent.append(input.numel() - input_sizes[group.rank()])
        return self._real(output, input, output_sizes, input_sizes, group=group)

    def __exit__(self, *exc):
        dist.all_to_all_single = self._real


def inputs(shards, ids, layout=LAYOUT):
    rows = shards.rows
    return dict(
        input_ids=ids[:, rows], position_ids=positions(layout)[:, rows], shared_prefix_layout=layout, shards=shards,
        use_cache=False,
    )  # fmt: skip


def ids(layout=LAYOUT):
    return torch.arange(layout.length)[None] % SIZES["vocab_size"]


def sent_by_a_model(checkpointing):
    """Numbers sent in a forward and in a backward, where the plan's mean over the ranks would be sent."""
    shards, model = make_shards(), make_model("llama")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with use_shared_prefix(model):
        with Counted() as forward:
            hidden = model.model(**inputs(shards, ids())).last_hidden_state
        with Counted() as backward:
            hidden.sum().backward()
    return len(forward.sent), sum(forward.sent), len(backward.sent), sum(backward.sent)


def said(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def mixed_precision():
    """Under autocast, as with one process; q and v come in different dtypes where norms and RoPE are float32."""
    shards, model = make_shards(), make_model("qwen3").eval()
    whole = dict(position_ids=positions(LAYOUT), shared_prefix_layout=LAYOUT, use_cache=False)
    with use_shared_prefix(model), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        truth = model.model(ids(), **whole).last_hidden_state[:, shards.rows]
        with Counted() as counted:
            ours = model.model(**inputs(shards, ids())).last_hidden_state
    return float((ours - truth).abs().max() / truth.abs().max()), len(counted.sent)


def refusals():
    """What each rank says."""
    shards, model = make_shards(), make_model("llama").eval()
    few = dict(hidden_size=48, num_attention_heads=3, num_key_value_heads=1, head_dim=16)
    right, texts = inputs(shards, ids()), {}

    def call(model=model, **changed):
        with torch.no_grad():
            model.model(**{**right, **changed})

    with use_shared_prefix(model):
        texts["none"] = said(call)
        texts["no positions"] = said(lambda: call(position_ids=None))
        texts["one position"] = said(lambda: call(position_ids=right["position_ids"][:, :1]))
        begun = right["position_ids"] - right["position_ids"][:, :1] * (shards.rank == 1)
        texts["positions begun anew on rank 1"] = said(lambda: call(position_ids=begun))
        texts["another layout"] = said(lambda: call(shared_prefix_layout=make_layout((13, 5, 6))))
        texts["no shards"] = said(lambda: call(shards=4))
    with use_shared_prefix(small := make_small(**few)):
        texts["heads"] = said(lambda: call(small))
    with use_shared_prefix(small := make_small(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0))):
        texts["rope"] = said(lambda: call(small))
        texts["rope, no layout"] = said(lambda: call(small, shared_prefix_layout=None))
    return texts


def make_small(**changed):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**(SIZES | changed))).eval()


def worker():
    """All cases: (name, arguments) -> what this rank saw."""
    seen = {(f.__name__, name): f(*heads) for f in (moved, attention, bytes_made) for name, heads in HEADS.items()}
    seen |= {("sent", checkpointing): sent_by_a_model(checkpointing) for checkpointing in (False, True)}
    return seen | {"refusals": refusals(), "autocast": mixed_precision()}


@pytest.fixture(scope="module")
def seen():
    return run_ranks(worker, RANKS)


@pytest.mark.parametrize("heads", HEADS)
def test_what_comes_is_what_was_sent_bit_by_bit(seen, heads):
    assert all(all(of_rank["moved", heads]) for of_rank in seen)


@pytest.mark.parametrize("heads", HEADS)
def test_attention_and_its_gradients_equal_one_process(seen, heads):
    assert max(of_rank["attention", heads] for of_rank in seen) < 1e-13


@pytest.mark.parametrize("heads", HEADS)
def test_an_exchange_makes_results_and_buffers_and_no_more(seen, heads):
    for of_rank in seen:
        for what, (made, expected) in of_rank["bytes_made", heads].items():
            assert made <= expected, what
            assert made == expected or "backward" in what, what


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_more_is_sent_than_must_be(seen, checkpointing):
    layers, size = SIZES["num_hidden_layers"], SIZES["head_dim"]
    heads, kv_heads = SIZES["num_attention_heads"], SIZES["num_key_value_heads"]
    least = layers * exchanged_numbers(LAYOUT.length, heads, kv_heads, size, RANKS)
    calls, forward, calls_backward, backward = map(
        sum, zip(*(of_rank["sent", checkpointing] for of_rank in seen), strict=True)
    )
    passes = 2 if checkpointing else 1
    assert (calls, calls_backward) == (2 * layers * RANKS, passes * 2 * layers * RANKS)
    assert forward == pytest.approx(least, rel=0.05)
    assert backward == pytest.approx(passes * least, rel=0.05)


def test_autocast_equals_one_process(seen):
    for error, calls in (of_rank["autocast"] for of_rank in seen):
        assert error < 0.02 and calls == 2 * SIZES["num_hidden_layers"]


SAID = {
    "no positions": "do not fit the shared_prefix_layout",  # transformers then counts each rank's rows from 0
    "one position": "position_ids of shape (1, 1) came",
    "positions begun anew on rank 1": "do not fit the shared_prefix_layout",
    "another layout": "describes 24 rows",
    "no shards": "shards",
    "heads": "3 query and 1 kv heads",
    "rope": "RoPE of type dynamic",
    "rope, no layout": "RoPE of type dynamic",
}


@pytest.mark.parametrize("what", SAID)
def test_every_rank_refuses(seen, what):
    for of_rank in seen:
        assert of_rank["refusals"]["none"] is None
        assert SAID[what] in (of_rank["refusals"][what] or "")
