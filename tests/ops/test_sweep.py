"""What the sweep plans: which pairs share a visit, how many rows fit, and float16's power of two."""

import math
import sys
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longpo_ops import fused_preference_loss, linear_cross_entropy, linear_kl, linear_logprobs, packed_preference_loss
from longpo_ops.ops import divergence
from longpo_ops.ops.batch import Batch
from longpo_ops.ops.operators import run_sweep
from longpo_ops.ops.products import UPCAST_BYTES, Products
from longpo_ops.ops.rows import sizes, to_device
from longpo_ops.ops.sweep import (
    Options,
    default_workspace,
    float16_scale,
    row_unit,
    rows_per_chunk,
    scratch_bytes,
    workspace_of,
)
from tests.meta import add_products_on_meta

from .preference_cases import OBJECTIVES, Case


@pytest.mark.parametrize("value", [1.0, 0.5, 3e-9, 65504.0, 1e30, 2.0**-30])
def test_float16_scale_brings_a_number_near_one(value):
    scale = float16_scale(torch.tensor(value, dtype=torch.float64))
    assert 0.5 <= scale.double() * value < 1 or (value == 1.0 and scale == 0.5)
    assert math.log2(scale) == round(math.log2(scale))


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_float16_scale_of_no_number_is_one(value):
    assert float16_scale(torch.tensor(value)) == 1


def test_rows_fit_in_what_is_asked_for():
    for V, H, dtype in ((7, 3, torch.float32), (32_000, 64, torch.bfloat16), (1_000, 8, torch.float64)):
        weight = torch.empty(V, H, dtype=dtype, device="meta")
        fixed, row = scratch_bytes(weight, dtype)
        for rows in (1, 5, 127, 128, 200, 1000):
            fit = rows_per_chunk(fixed + rows * row, weight, dtype)
            assert fit <= rows and (fit == rows or (fit % 128 == 0 and rows - fit < 128))
            assert rows_per_chunk(fixed + rows * row + row - 1, weight, dtype) == fit


def test_a_weight_that_is_not_upcast_leaves_room_for_rows():
    weight = torch.empty(32_000, 1024, dtype=torch.bfloat16)
    upcast, native = (rows_per_chunk(64 << 20, weight, weight.dtype, native=native) for native in (False, True))
    assert (native - upcast - 1) * scratch_bytes(weight, weight.dtype)[1] <= UPCAST_BYTES  # both are rounded down
    assert native > upcast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_head_gradient_of_no_row_is_zero(dtype, backend, device):
    held = torch.full((64, 500), math.nan, device=device)  # what comes next may get this memory
    del held
    hidden, weight = (torch.randn(n, 500, device=device).to(dtype).requires_grad_() for n in (9, 64))
    linear_cross_entropy(hidden, weight, torch.full((9,), -100), backend=backend).backward()
    assert (weight.grad == 0).all() and (hidden.grad == 0).all()


@pytest.fixture
def visits(monkeypatch):
    """The number of rows of each product with the head."""
    seen = []
    plain = Products.logits_
    monkeypatch.setattr(Products, "logits_", lambda self, h, out: seen.append(h.shape[0]) or plain(self, h, out))
    return seen


def answers(case):
    chosen, rejected = ((x[:, 1:] != -100).sum(1) for x in (case.chosen, case.rejected))
    return (chosen + rejected).tolist()


def test_pairs_that_fit_a_chunk_are_swept_while_their_tile_waits(visits, workspace):
    case = Case(OBJECTIVES["dpo"], torch.float32, nll=False)
    sizes = answers(case)  # two to four answer tokens each side
    case.ours(backend="torch")
    assert visits == [sum(sizes)]  # everything in one visit: scored, decided and swept
    visits.clear()
    case.ours(backend="torch", workspace_bytes=workspace(case.tensors[2], max(sizes)))
    assert sum(visits) == sum(sizes) and max(visits) <= max(sizes)  # a visit each, nothing twice
    visits.clear()
    case.ours(backend="torch", workspace_bytes=workspace(case.tensors[2], max(sizes) - 1))
    large = sum(n for n in sizes if n > max(sizes) - 1)
    assert sum(n for n in visits) == sum(sizes) + large  # the pairs that do not fit are scored first


def test_objectives_that_mix_pairs_and_float16_score_everything_first(visits):
    for objective, dtype in (("kto_pair", torch.float32), ("dpo", torch.float16)):
        case = Case(OBJECTIVES[objective], dtype, nll=False)
        visits.clear()
        case.ours(backend="torch")
        assert visits == [sum(answers(case))] * 2
        visits.clear()
        with torch.no_grad():
            case.loss(case.leaves(), backend="torch")
        assert visits == [sum(answers(case))]


@pytest.mark.parametrize("V", [32_000, 128_256, 151_936, 262_144])
@pytest.mark.parametrize("N", [4096, 65_536])
def test_chunks_of_the_default_workspace_are_alike(N, V):
    """Those of a GPU, from shapes alone. One more chunk reads and writes the whole gradient of the head once more."""
    weight = torch.empty(V, 4096, dtype=torch.bfloat16, device="meta")
    limit = rows_per_chunk(default_workspace(weight.device), weight, weight.dtype)
    found = list(sizes(N, limit, row_unit(weight.device)))
    assert sum(found) == N and max(found) <= limit and len(found) == -(-N // limit)
    assert all(n % 128 == 0 for n in found[:-1]) and max(found) <= 2 * min(found)
    assert len(found) == 1 or N > 4096 or V > 151_936


def test_the_default_workspace_holds_4096_rows_of_the_widest_common_heads():
    for V, H in ((151_936, 4096), (152_064, 8192)):
        weight = torch.empty(V, H, dtype=torch.bfloat16, device="meta")
        assert workspace_of(4096, weight, weight.dtype) <= default_workspace(weight.device)


def test_the_head_meets_chunks_that_are_alike(visits, workspace):
    """Rows without a label are not visited, and do not make the last chunk small."""
    hidden, weight, labels = torch.randn(1000, 8), torch.randn(64, 8), torch.arange(1000) % 64
    labels[500:] = -100
    linear_cross_entropy(hidden, weight, labels, backend="torch", workspace_bytes=workspace(weight, 240))
    assert visits == [167, 167, 166]


def is_called_by(function) -> bool:
    frame = sys._getframe()
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame is not None


class Transfers(TorchDispatchMode):
    """Copies from one device to another: how many to_device makes, and those that the host waits for or others make."""

    def __init__(self):
        super().__init__()
        self.made, self.wrong = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.name() == "aten::_to_copy" and args[0].device != out.device:
            by_helper = is_called_by(to_device)
            self.made += by_helper
            if not (by_helper and kwargs.get("non_blocking")):
                self.wrong.append(args[0].shape)
        return out


@pytest.mark.parametrize("rows", [7, 40, 100])  # no pair, one pair or all of them in a single visit
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_labels_on_the_host_cost_no_synchronisation(objective, dtype, rows, monkeypatch):
    """Tensors on the meta device stand for a GPU's: whoever reads one of them on the host raises."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # the meta device has none
    add_products_on_meta(dtype, monkeypatch)
    labels = torch.arange(60).view(2, 30)
    weight = torch.empty(60, 8, dtype=dtype, device="meta")
    hiddens = [torch.empty(2, 30, 8, dtype=dtype, device="meta") for _ in range(2)]
    numbers = torch.tensor([-3.0, -4.0, -3.5, -2.0]) if objective.needs_reference else None
    batch = Batch(
        answers=[labels, labels], segments=[torch.arange(2)[:, None], torch.arange(2, 4)[:, None]],
        nll=[labels, labels[:0]], nll_weights=[torch.ones(2, 1), torch.zeros(1, 1)], nll_total=torch.ones(()),
        refs=numbers, group=torch.tensor([1, 0]), role=labels.new_empty(0), count=2, objective=objective.name,
        parameters=objective.parameters(), preference_weight=1.0, num_groups=2.0, shift=True, ignore_index=-100,
    )  # fmt: skip
    options = Options(1.0, 0.0, workspace_of(rows, weight, dtype), dtype, True, True, False)
    with Transfers() as transfers:
        run_sweep(hiddens, [torch.empty_like(h) for h in hiddens], weight, None, batch, options, "torch")
    assert transfers.wrong == [] and transfers.made > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_divergence_does_not_wait_for_numbers_of_the_host(dtype, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    add_products_on_meta(dtype, monkeypatch)
    heads = (torch.empty(50, 8, dtype=dtype, device="meta"), torch.empty(60, 8, dtype=dtype, device="meta"), None) * 2
    scratch, maps = workspace_of(20, heads[1], dtype, 2), ((1.0, 0.0), (1.0, 0.0))
    numbers = torch.arange(50) % 3 > 0, torch.rand(50), torch.ones(())
    with Transfers() as transfers:
        divergence._sweep(heads, *numbers, "jsd", 0.5, *maps, scratch, dtype, False, "torch", [True, True, False] * 2)
    assert transfers.wrong == [] and transfers.made > 0


def test_numbers_of_the_host_are_pinned_on_their_way_to_cuda(monkeypatch):
    """They are converted before: CUDA would convert into memory that is not pinned."""
    way = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: way.append(("pinned", x.dtype, x.is_contiguous())) or x)
    plain = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda x, *to, **how: plain(x, *to) if len(to) == 1 else way.append((*to, how))
    )
    to_device(torch.arange(6)[::2], torch.device("cuda"), torch.float64)
    assert way == [("pinned", torch.float64, True), (torch.device("cuda"), torch.float64, {"non_blocking": True})]


crossed = []


class Afar(torch.Tensor):
    """A tensor that stands for one of a device: whatever reads its numbers is recorded, and what crosses is plain."""

    HARMLESS = ("shape", "layout", "dtype", "device", "dim", "requires_grad", "is_nested", "detach", "__getitem__")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = function.__name__ if function.__name__ != "__get__" else function.__self__.__name__
        out = super().__torch_function__(function, types, args, kwargs)
        if name in cls.HARMLESS:
            return out
        crossed.append(name)
        return out.as_subclass(torch.Tensor) if isinstance(out, torch.Tensor) else out


def afar(tensor):
    return tensor.as_subclass(Afar)


def call_cross_entropy(hidden, weight, tokens, numbers, **more):
    return linear_cross_entropy(hidden, weight, afar(tokens), row_weights=afar(numbers), **more)


def call_logprobs(hidden, weight, tokens, numbers, **more):
    return linear_logprobs(hidden, weight, afar(tokens), **more).sum()


def call_kl(hidden, weight, tokens, numbers, **more):
    other = hidden.detach() + 1
    return linear_kl(hidden, weight, other, weight, mask=afar(tokens > 1), row_weights=afar(numbers), **more)


def call_fused(hidden, weight, tokens, numbers, **more):
    chosen, rejected = hidden.view(2, 2, -1, hidden.shape[1])
    labels = tokens.view(2, 2, -1)
    nll = afar(labels[0])
    return fused_preference_loss(
        chosen, rejected, weight, afar(labels[0]), afar(labels[1]), nll_labels=nll, objective="simpo", **more
    ).loss


def call_packed(hidden, weight, tokens, numbers, **more):
    sequences, pair = torch.arange(hidden.shape[0]) // 5, torch.tensor([1, 0])
    return packed_preference_loss(
        hidden, weight, afar(tokens), afar(sequences), num_chosen=2, rejected_pair=afar(pair),
        nll_weights=afar(numbers), objective="simpo", **more,
    ).loss  # fmt: skip


@pytest.mark.parametrize(
    ("call", "given"), [(call_cross_entropy, 2), (call_logprobs, 1), (call_kl, 2), (call_fused, 3), (call_packed, 4)]
)
def test_what_is_on_the_device_crosses_to_the_host_once(call, given):
    """Forward and backward: each crossing waits for all that was queued before."""
    hidden, weight = torch.randn(20, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    crossed.clear()
    call(hidden, weight, torch.arange(20) % 30, torch.ones(20), backend="torch").backward()
    assert crossed == ["cpu"] * given
