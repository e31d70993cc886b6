"""linear_logprobs and linear_cross_entropy against full logits in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.budget import DRAWS
from longpo_ops import linear_cross_entropy, linear_logprobs
from longpo_ops.ops import truth
from longpo_ops.ops.products import Products
from longpo_ops.ops.sweep import workspace_of
from tests.budget import check_budget

OPTIONS = {
    "default": {},
    "bias": dict(bias=True),
    "softcap": dict(softcap=3.0),
    "scale": dict(scale=0.6),
    "temperature": dict(temperature=2.5),
    "a few rows at a time": dict(rows=4),
    "everything": dict(bias=True, softcap=6.0, scale=1.4, temperature=0.7, rows=5),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [dict(N=1), dict(V=1), dict(V=7), dict(V=1031), dict(H=96), dict(N=130, V=3, H=1)]
LOSSES = {
    "logprobs": None,
    "mean": dict(reduction="mean"),
    "sum": dict(reduction="sum"),
    "none": dict(reduction="none"),
    "weighted mean": dict(reduction="mean", weighted=True),
    "weighted sum": dict(reduction="sum", weighted=True),
    "weighted none": dict(reduction="none", weighted=True),
}


class Case:
    """Rows, a third of them without a label; a loss of any kind ends in a scalar through a random upstream gradient."""

    def __init__(self, dtype, device="cpu", *, N=23, V=37, H=16, bias=False, loss="logprobs", **map):
        self.map, self.loss = map, LOSSES[loss]
        self.tensors = [torch.randn(N, H), torch.randn(V, H) * H**-0.5, torch.randn(V) if bias else None]
        self.tensors = [None if t is None else t.to(device, dtype) for t in self.tensors]
        self.labels = torch.where(torch.rand(N) < 0.3, -100, torch.randint(V, (N,)))
        self.labels[0] = V - 1
        self.weights = torch.rand(N) * 2
        self.upstream = torch.randn(N)

    def redraw(self):
        hidden, weight, bias = self.tensors
        draws = [torch.randn(hidden.shape), torch.randn(weight.shape) * weight.shape[1] ** -0.5]
        self.tensors = [*(t.to(hidden) for t in draws), bias]

    def run(self, ours, dtype=None, **more):
        leaves = [None if t is None else t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in self.tensors]
        hidden, weight, bias = leaves
        place = lambda x: x.to(weight.device)  # noqa: E731
        options = dict(self.map, bias=bias, **more)
        labels = self.labels if ours else place(self.labels)
        if self.loss is None:
            out = (linear_logprobs if ours else truth.logprobs)(hidden, weight, labels, **options)
        else:
            call = linear_cross_entropy if ours else truth.cross_entropy
            row_weights = place(self.weights) if "weighted" in self.loss else None
            out = call(hidden, weight, labels, row_weights=row_weights, reduction=self.loss["reduction"], **options)
        upstream = place(self.upstream).to(out)
        grads = torch.autograd.grad(out, [t for t in leaves if t is not None], upstream if out.dim() else upstream[0])
        return out.detach(), *grads

    def check(self, draws=1, **more):
        runs = []
        for draw in range(draws):
            if draw:
                self.redraw()
            runs.append((self.run(True, **more), self.run(False), self.run(False, torch.float64)))
        for name, *results in zip(("value", "hidden", "weight", "bias"), *(zip(*part) for part in zip(*runs))):
            check_budget(name, *results)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_error_budget(loss, option, dtype, backend, device, workspace):
    options = dict(OPTIONS[option])
    rows = options.pop("rows", None)
    case = Case(dtype, device, loss=loss, **options)
    scratch = workspace(case.tensors[1], rows)
    case.check(DRAWS if dtype == torch.float32 else 1, backend=backend, workspace_bytes=scratch)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rows", [None, 1, 7])
@pytest.mark.parametrize("loss", ["logprobs", "weighted mean"])
def test_ragged_sizes(loss, rows, size, backend, device, workspace):
    case = Case(torch.float32, device, loss=loss, bias=True, **size)
    case.check(DRAWS, backend=backend, workspace_bytes=workspace(case.tensors[1], rows))


@pytest.mark.quick
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_float64_equals_full_logits(loss, option, workspace):
    options = dict(OPTIONS[option])
    rows = options.pop("rows", None)
    case = Case(torch.float64, loss=loss, **options)
    ours = case.run(True, backend="torch", workspace_bytes=workspace(case.tensors[1], rows))
    for a, expected in zip(ours, case.run(False)):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, expected, rtol=1e-12, atol=1e-13)


def test_log_probs_of_16_bit_inputs_are_float32_and_within_2e_3():
    """Sums over long answers need it; a bf16 logits tile would be off by up to 0.06 nats a token."""
    hidden, weight, labels = torch.randn(256, 64), torch.randn(500, 64), torch.randint(500, (256,))
    for dtype in (torch.bfloat16, torch.float16):
        h, w = hidden.to(dtype), weight.to(dtype)
        got = linear_logprobs(h, w, labels)
        assert got.dtype == torch.float32
        assert (got.double() - truth.logprobs(h.double(), w.double(), labels)).abs().max() < 2e-3


@pytest.mark.parametrize("rows", [1, None])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss, rows, workspace):
    options = LOSSES[loss] or {}
    hidden, weight = torch.randn(6, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    bias, weights = torch.randn(5, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    labels = torch.tensor([0, -100, 4, 2, 2, -100])
    more = dict(softcap=2.0, temperature=1.5, backend="torch", workspace_bytes=workspace(weight, rows))
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    if loss == "logprobs":
        assert torch.autograd.gradcheck(lambda h, w, b: linear_logprobs(h, w, labels, bias=b, **more), leaves)
        return
    reduction = options["reduction"]
    if loss == "weighted none":
        leaves.append(weights.requires_grad_())

    def call(h, w, b, row_weights=weights if "weighted" in options else None):
        return linear_cross_entropy(h, w, labels, bias=b, row_weights=row_weights, reduction=reduction, **more)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("rows", [None, 1])
def test_one_hot_upstream_gradients_are_exact(rows, workspace):
    """Each returned log-prob has its own gradient: the rows of the Jacobian, one by one."""
    case = Case(torch.float64, N=5)
    for row in range(5):
        case.upstream = torch.eye(5)[row]
        ours = case.run(True, backend="torch", workspace_bytes=workspace(case.tensors[1], rows))
        for a, expected in zip(ours, case.run(False)):
            torch.testing.assert_close(a, expected, rtol=1e-12, atol=1e-14)


def test_equals_torch_cross_entropy():
    case = Case(torch.float64, loss="mean")
    hidden, weight, _ = case.tensors
    for reduction in ("mean", "sum", "none"):
        ours = linear_cross_entropy(hidden, weight, case.labels, reduction=reduction)
        torch.testing.assert_close(ours, F.cross_entropy(hidden @ weight.T, case.labels, reduction=reduction))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["no rows", "nothing labelled"])
def test_nothing_to_do_gives_zero_and_no_gradient(kind, loss, backend, device):
    case = Case(torch.float32, device, loss=loss, bias=True)
    if kind == "no rows":
        case.tensors[0], case.labels, case.weights, case.upstream = (
            x[:0] for x in (case.tensors[0], case.labels, case.weights, case.upstream)
        )
        if case.loss and case.loss["reduction"] != "none":
            case.upstream = torch.ones(1)
    else:
        case.labels.fill_(-100)
    value, *grads = case.run(True, backend=backend)
    assert not value.any() and not any(g.any() for g in grads)
    assert [g.shape for g in grads] == [t.shape for t in case.tensors]


@pytest.mark.parametrize("loss", ["logprobs", "mean", "weighted sum"])
@pytest.mark.parametrize("rows", [None, 1])
def test_nan_rows(loss, rows, backend, device, workspace):
    """In a used row NaN comes out; in a row without label or weight it changes no bit."""
    case = Case(torch.float32, device, loss=loss, bias=True)
    case.labels[3], case.labels[4] = -100, 5
    case.weights[5], case.labels[5] = 0, 6
    more = dict(backend=backend, workspace_bytes=workspace(case.tensors[1], rows))
    clean = case.run(True, **more)
    case.tensors[0][3] = math.nan
    if "weighted" in loss and device == "cpu":  # weights the host can see: their zeros are rows without weight
        case.tensors[0][5] = math.inf
    assert same(case.run(True, **more), clean)
    case.tensors[0][4, 2] = math.nan
    value, hidden, weight, bias = case.run(True, **more)
    assert hidden[4].isnan().any() and weight.isnan().any() and bias.isnan().any()
    assert value.isnan() if value.dim() == 0 else value.isnan().nonzero().tolist() == [[4]]
    assert hidden[[0, 1, 2, 3, 6]].isfinite().all()


def test_nan_row_weights_of_ignored_rows_do_not_matter():
    for dtype in (torch.float32, torch.float16):
        for loss in ("weighted mean", "weighted sum"):
            case = Case(dtype, loss=loss)
            case.labels[3] = -100
            clean = case.run(True)
            case.weights[3] = math.nan
            assert same(case.run(True), clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", ["logprobs", "mean"])
def test_extreme_logits(loss, dtype, backend, device):
    case = Case(dtype, device, loss=loss, H=2)
    case.tensors[0] = torch.tensor([100.0, 1.0]).repeat(23, 1).to(case.tensors[0])
    case.tensors[1] = torch.stack([torch.where(torch.rand(37) < 0.5, 100.0, -100.0), torch.randn(37)], 1).to(
        case.tensors[1]
    )
    case.check(backend=backend)
    value, *_ = case.run(True, backend=backend)
    assert value.isfinite().all() and value.abs().max() > 1e3


def test_minus_infinity_in_the_bias(backend, device):
    case = Case(torch.float32, device, bias=True)
    case.tensors[2][:5] = -math.inf
    case.labels[(case.labels >= 0) & (case.labels < 5)] = 5
    case.labels[1] = 2  # a closed label: log-prob -inf, and a gradient that is none of its logits' doing
    value, *grads = case.run(True, backend=backend)
    expected, *true_grads = case.run(False, torch.float64)
    assert value[1] == -math.inf == expected[1]
    for a, b in zip(grads, true_grads):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["logprobs", "weighted mean"])
def test_float16_sums_that_float16_cannot_hold_on_the_way(loss):
    """Gradients of many equal rows, in units of the largest row weight, pass 65504 before they are scaled back."""
    N = 100_000

    def run(dtype):
        hidden, weight, bias = torch.full((N, 2), 8.0), torch.zeros(4, 2), torch.zeros(4)
        hidden, weight, bias = (x.to(dtype).requires_grad_() for x in (hidden, weight, bias))
        labels = torch.zeros(N, dtype=torch.int64)
        if loss == "logprobs":
            value = -linear_logprobs(hidden, weight, labels, bias=bias).mean()
        else:
            value = linear_cross_entropy(hidden, weight, labels, bias=bias, row_weights=torch.full((N,), 3.0))
        return torch.autograd.grad(value, (weight, bias))

    for a, b in zip(run(torch.float16), run(torch.float32)):  # two roundings to 11 bits apart
        torch.testing.assert_close(a.float(), b, rtol=1e-3, atol=0)


@pytest.mark.parametrize("loss", ["logprobs", "weighted mean"])
def test_strides_and_devices_of_labels_do_not_matter(loss, backend, device):
    case = Case(torch.float32, device, loss=loss, bias=True)
    expected = case.run(True, backend=backend)
    hidden, weight, bias = case.tensors
    case.tensors = [hidden.t().contiguous().t(), torch.stack([weight, weight], -1)[..., 0], bias]
    for a, b in zip(case.run(True, backend=backend), expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    case.tensors = [hidden, weight, bias]
    case.labels = torch.stack([case.labels, case.labels], 1)[:, 1].to(device)
    assert same(case.run(True, backend=backend), expected)


def test_repeatable_and_indifferent_to_what_new_memory_holds(backend, device):
    for loss in ("logprobs", "weighted mean"):
        case = Case(torch.bfloat16, device, loss=loss, bias=True)
        plain = case.run(True, backend=backend)
        assert same(case.run(True, backend=backend), plain)
        torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
        try:
            assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
            assert same(case.run(True, backend=backend), plain)
        finally:
            torch.use_deterministic_algorithms(False)


@settings(max_examples=40)
@given(st.data())
def test_properties(data):
    """Any chunk size; any order of rows; parts add up; a constant in the bias does nothing; upstream is linear."""
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    torch.manual_seed(draw(0, 1000))
    N, V = draw(0, 30), draw(1, 20)
    case = Case(torch.float64, N=max(N, 1), V=V, H=draw(1, 6), bias=True)
    hidden, weight, bias = case.tensors
    labels, rows = case.labels, draw(1, 40)
    near = dict(rtol=1e-10, atol=1e-11)

    def total(hidden, labels, bias, factor=1.0, **more):
        leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
        loss = factor * linear_cross_entropy(
            *leaves[:2], labels, bias=leaves[2], reduction="sum", backend="torch", **more
        )
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    whole = total(hidden, labels, bias)
    order = torch.randperm(len(hidden))
    shuffled = total(hidden[order], labels[order], bias)
    for changed in (
        total(hidden, labels, bias, workspace_bytes=workspace_of(rows, weight, torch.float64)),
        total(hidden, labels, bias + data.draw(st.floats(-30, 30))),
        (shuffled[0], shuffled[1][order.argsort()], *shuffled[2:]),
    ):
        for a, b in zip(changed, whole):
            torch.testing.assert_close(a, b, **near)
    cut = draw(0, len(hidden))
    parts = [total(hidden[s], labels[s], bias) for s in (slice(0, cut), slice(cut, None))]
    for a, b in zip((parts[0][0] + parts[1][0], torch.cat([p[1] for p in parts])), whole):
        torch.testing.assert_close(a, b, **near)
    for i in (2, 3):
        torch.testing.assert_close(parts[0][i] + parts[1][i], whole[i], **near)
    factor = data.draw(st.floats(-1e3, 1e3))
    for a, b in zip(total(hidden, labels, bias, factor), whole):
        torch.testing.assert_close(a, factor * b, **near)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("loss", ["logprobs", "mean"])
def test_frozen_inputs_cost_no_product(loss, frozen, monkeypatch):
    calls = []
    for name in ("hidden_gradient", "add_weight_gradient_"):
        plain = getattr(Products, name)
        monkeypatch.setattr(Products, name, lambda *a, plain=plain, name=name: calls.append(name) or plain(*a))
    case = Case(torch.float64, loss=loss, bias=True)
    names = ["hidden", "weight", "bias"]
    leaves = [t.requires_grad_(name != frozen) for t, name in zip(case.tensors, names)]
    call = linear_logprobs if loss == "logprobs" else linear_cross_entropy
    call(*leaves[:2], case.labels, bias=leaves[2]).sum().backward()
    absent = {"hidden": "hidden_gradient", "weight": "add_weight_gradient_"}.get(frozen)
    assert set(calls) == {"hidden_gradient", "add_weight_gradient_"} - {absent}
    assert [t.grad is None for t in leaves] == [name == frozen for name in names]


def test_no_grad_and_inference_mode():
    case = Case(torch.float32, bias=True)
    hidden, weight, bias = (t.requires_grad_() for t in case.tensors)
    loud = linear_cross_entropy(hidden, weight, case.labels, bias=bias)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            quiet = linear_cross_entropy(hidden, weight, case.labels, bias=bias)
            assert not linear_logprobs(hidden, weight, case.labels).requires_grad
        torch.testing.assert_close(quiet, loud.detach(), rtol=1e-6, atol=0)
        assert not quiet.requires_grad


def test_retain_graph():
    case = Case(torch.float64)
    hidden, weight, _ = (t if t is None else t.requires_grad_() for t in case.tensors)
    for loss in (linear_cross_entropy(hidden, weight, case.labels), linear_logprobs(hidden, weight, case.labels).sum()):
        first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        second = torch.autograd.grad(loss, (hidden, weight))
        assert same(first, second)


def test_gradients_of_gradients_are_refused():
    case = Case(torch.float64)
    hidden, weight, _ = (t if t is None else t.requires_grad_() for t in case.tensors)
    for loss in (linear_cross_entropy(hidden, weight, case.labels), linear_logprobs(hidden, weight, case.labels).sum()):
        with pytest.raises(RuntimeError):
            torch.autograd.grad(loss, hidden, create_graph=True)[0].square().sum().backward()


def test_rows_beyond_one_window():
    N = 70_000
    hidden, weight = torch.randn(N, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    labels = torch.where(torch.rand(N) < 0.9, -100, torch.randint(4, (N,)))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    ours, expected = linear_logprobs(*leaves, labels), truth.logprobs(*leaves, labels)
    torch.testing.assert_close(ours, expected)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (ours, expected))):
        torch.testing.assert_close(a, b)
