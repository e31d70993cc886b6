"""linear_kl against full logits in float64: three divergences, two heads."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.budget import DRAWS, ulp
from longpo_ops import linear_kl
from longpo_ops.ops import truth
from longpo_ops.ops.products import Products
from longpo_ops.ops.sweep import workspace_of
from tests.budget import check_budget

KINDS = [dict(kind="forward"), dict(kind="reverse"), dict(kind="jsd"), dict(kind="jsd", beta=0.1)]
OPTIONS = {
    "default": {},
    "biases": dict(bias=True),
    "softcap": dict(softcap=3.0),
    "temperature": dict(temperature=2.0),
    "scales": dict(scale=0.8, teacher_scale=1.2),
    "other softcap": dict(softcap=4.0, teacher_softcap=9.0),
    "masked": dict(masked=True),
    "weighted": dict(weighted=True),
    "sum": dict(reduction="sum", weighted=True),
    "none": dict(reduction="none", weighted=True),
    "a few rows at a time": dict(rows=4),
    "everything": dict(bias=True, softcap=5.0, scale=1.2, temperature=0.7, masked=True, weighted=True, rows=6),
}
ENDS = [1e-6, 1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.999999]  # of the JSD's beta
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [dict(N=1), dict(V=1), dict(V=7), dict(V=1031, N=1), dict(V=1031, N=40), dict(H=96, H2=5)]


class Case:
    def __init__(
        self, dtype, device="cpu", *, N=60, V=37, H=16, H2=10, bias=False, masked=False, weighted=False, **options
    ):
        self.options, self.reduction = options, options.get("reduction", "mean")
        draw = lambda *shape, size=1.0: (torch.randn(*shape) * size).to(device, dtype)  # noqa: E731
        self.tensors = [draw(N, H), draw(V, H, size=H**-0.5), draw(V) if bias else None]
        self.tensors += [draw(N, H2), draw(V, H2, size=H2**-0.5), draw(V) if bias else None]
        self.mask = (torch.rand(N) < 0.6).to(device) if masked else None
        self.weights = (torch.rand(N) + 0.1).to(device) if weighted else None
        self.upstream = torch.randn(N).to(device)

    def redraw(self):
        size = lambda i, t: t.shape[1] ** -0.5 if i % 3 == 1 else 1  # noqa: E731
        self.tensors = [
            None if t is None else (torch.randn(t.shape) * size(i, t)).to(t) for i, t in enumerate(self.tensors)
        ]

    def leaves(self, dtype=None):
        return [None if t is None else t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in self.tensors]

    def finish(self, out, leaves):
        upstream = self.upstream.to(out)
        grads = torch.autograd.grad(out, [t for t in leaves if t is not None], upstream if out.dim() else upstream[0])
        return out.detach(), *grads

    def ours(self, **more):
        leaves = self.leaves()
        hidden, weight, bias, *teacher = leaves
        out = linear_kl(
            hidden, weight, *teacher[:2], bias=bias, teacher_bias=teacher[2], mask=self.mask, row_weights=self.weights,
            **self.options | more,
        )  # fmt: skip
        return self.finish(out, leaves)

    def full_logits(self, dtype=None):
        leaves = self.leaves(dtype)
        o = dict(self.options)
        kind, beta, reduction = o.pop("kind"), o.pop("beta", 0.5), o.pop("reduction", "mean")
        other = {name: o.pop("teacher_" + name) for name in ("scale", "softcap") if "teacher_" + name in o}

        def log_softmax(hidden, weight, bias, map):
            z = truth.logits(hidden, weight, bias, **map)
            return (z if z.dtype == torch.float64 else z.float()).log_softmax(-1)

        values = truth.divergence(log_softmax(*leaves[:3], o), log_softmax(*leaves[3:], o | other), kind, beta)
        mask = torch.ones(len(values), device=values.device) if self.mask is None else self.mask
        weights = torch.ones_like(values) if self.weights is None else self.weights.to(values)
        values = torch.where(mask.bool(), values * weights, 0)
        if reduction != "none":
            values = values.sum() / ((weights * mask).sum() if reduction == "mean" else 1)
        return self.finish(values, leaves)

    def check(self, draws=1, redrawn=lambda: None, **more):
        runs = []
        for draw in range(draws):
            if draw:
                self.redraw()
            redrawn()
            runs.append((self.ours(**more), self.full_logits(), self.full_logits(torch.float64)))
        names = [
            n for n, t in zip(("h", "w", "b", "teacher h", "teacher w", "teacher b"), self.tensors) if t is not None
        ]
        for name, *results in zip(["value", *names], *(zip(*part) for part in zip(*runs))):
            check_budget(name, *results)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_error_budget(kind, option, dtype, backend, device, workspace):
    options = dict(OPTIONS[option])
    rows = options.pop("rows", None)
    case = Case(dtype, device, **kind, **options)
    scratch = workspace(case.tensors[1], rows, 2)
    case.check(DRAWS if dtype == torch.float32 else 1, backend=backend, workspace_bytes=scratch)


@pytest.mark.parametrize("spread", [1, 50], ids=["", "underflow"])
@pytest.mark.parametrize("beta", ENDS)
def test_jsd_keeps_the_budget_at_its_ends(beta, spread, backend, device):
    """Near an end value and one gradient are as small as beta or 1 - beta: no digit of them may come from 1 - (1 - x)."""
    case = Case(torch.float32, device, kind="jsd", beta=beta)
    case.check(DRAWS, backend=backend, redrawn=lambda: [h.mul_(spread) for h in (case.tensors[0], case.tensors[3])])


@pytest.mark.parametrize("beta", [1e-300, 1e-30, 1 - 1e-15])
def test_jsd_of_betas_that_float32_does_not_hold(beta, backend, device):
    """KL by the weight that vanishes, and no infinity where one side alone has mass."""
    case = Case(torch.float32, device, kind="jsd", beta=beta, bias=True)
    case.tensors[2][:9] = case.tensors[5][5:12] = -math.inf
    case.tensors[2][20:25] = -200
    value, *grads = case.ours(backend=backend)
    assert 0 <= value < 1e-12 and all(g.isfinite().all() and g.abs().max() < 1e-12 for g in grads)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rows", [None, 1, 5])
@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
def test_ragged_sizes(kind, rows, size, backend, device, workspace):
    case = Case(torch.float32, device, bias=True, **kind, **size)
    wider = max((case.tensors[1], case.tensors[4]), key=lambda w: w.shape[1])
    case.check(DRAWS, backend=backend, workspace_bytes=workspace(wider, rows, 2))


@pytest.mark.quick
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_float64_equals_full_logits(kind, option, workspace):
    options = dict(OPTIONS[option])
    rows = options.pop("rows", None)
    case = Case(torch.float64, **kind, **options)
    ours = case.ours(backend="torch", workspace_bytes=workspace(case.tensors[1], rows, 2))
    for a, expected in zip(ours, case.full_logits()):
        torch.testing.assert_close(a, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradcheck(kind, reduction):
    double = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    leaves = [double(4, 3), double(5, 3), double(5), double(4, 2), double(5, 2), double(5)]
    mask, weights = torch.tensor([True, False, True, True]), torch.rand(4, dtype=torch.float64)

    def call(h, w, b, h2, w2, b2):
        return linear_kl(
            h, w, h2, w2, bias=b, teacher_bias=b2, mask=mask, row_weights=weights, softcap=3.0, temperature=1.5,
            reduction=reduction, **kind,
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, leaves)


def test_directions_are_those_of_the_paper():
    """The short-to-long constraint is KL(policy || short model): reverse, by torch's own kl_div."""
    case = Case(torch.float64, kind="reverse")
    hidden, weight, _, teacher, teacher_weight, _ = case.tensors
    p, q = (hidden @ weight.T).log_softmax(-1), (teacher @ teacher_weight.T).log_softmax(-1)
    got = {kind: linear_kl(hidden, weight, teacher, teacher_weight, kind=kind) for kind in ("forward", "reverse")}
    torch.testing.assert_close(got["reverse"], (p.exp() * (p - q)).sum(-1).mean())
    torch.testing.assert_close(got["forward"], (q.exp() * (q - p)).sum(-1).mean())


@pytest.mark.parametrize("kind", [*KINDS, *(dict(kind="jsd", beta=b) for b in (1e-6, 0.9999))], ids=str)
def test_equal_heads_diverge_by_nothing(kind, backend, device):
    case = Case(torch.float32, device, H2=16, **kind)
    case.tensors[3:] = case.tensors[:3]
    value, *grads = case.ours(backend=backend, reduction="sum")
    assert abs(value) < 1e-5 and all(g.abs().max() < 1e-5 for g in grads)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("how", ["no rows", "all masked", "no weight"])
def test_nothing_to_do_gives_zero(how, kind, backend, device):
    case = Case(torch.float32, device, masked=True, weighted=True, **kind)
    case.mask[:] = how != "all masked"
    if how == "no weight":
        case.weights[:] = 0
        case.tensors[0][0] = math.nan
    if how == "no rows":
        case.tensors[0], case.tensors[3], case.mask, case.weights = (
            t[:0] for t in (case.tensors[0], case.tensors[3], case.mask, case.weights)
        )
    value, *grads = case.ours(backend=backend)
    assert value == 0 and not any(g.any() for g in grads)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_nan_rows(kind, reduction, backend, device):
    case = Case(torch.float32, device, masked=True, weighted=True, reduction=reduction, **kind)
    case.mask[3], case.mask[4], case.mask[5] = False, True, True
    clean = case.ours(backend=backend)
    case.tensors[0][3] = case.tensors[3][3] = math.nan
    assert same(case.ours(backend=backend), clean)
    case.tensors[0][4, 1] = math.nan
    value, hidden, weight, *_ = case.ours(backend=backend)
    assert value.isnan().any() and hidden[4].isnan().any() and weight.isnan().any() and hidden[5].isfinite().all()
    if reduction == "none":
        assert value.isnan().nonzero().tolist() == [[4]]


def test_weights_of_masked_rows_and_zero_weights_do_not_matter():
    for dtype in (torch.float32, torch.float16):
        case = Case(dtype, kind="reverse", masked=True, weighted=True)
        case.mask[3], case.weights[5] = False, 0
        clean = case.ours()
        case.weights[3] = math.nan
        case.tensors[0][5] = math.nan
        assert same(case.ours(), clean)


def test_row_weights_of_any_dtype_are_summed_in_float64():
    """A sum of 70,000 ones passes float16's largest number."""
    N = 70_000
    hidden, teacher, weight = torch.randn(N, 2), torch.randn(N, 2), torch.randn(3, 2)
    expected = linear_kl(hidden, weight, teacher, weight)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        weights = torch.ones(N, dtype=dtype)
        torch.testing.assert_close(linear_kl(hidden, weight, teacher, weight, row_weights=weights), expected)


def test_float16_sums_that_float16_cannot_hold_on_the_way():
    N = 200_000
    hidden, teacher = torch.full((N, 2), 8.0).half(), torch.ones(N, 1).half()
    weight = torch.zeros(2, 2).half().requires_grad_()
    teacher_weight = torch.tensor([[10.0], [-10.0]]).half()
    linear_kl(hidden, weight, teacher, teacher_weight).backward()  # dl = p - q = -1/2, 1/2
    torch.testing.assert_close(weight.grad.float(), torch.tensor([[-4.0, -4.0], [4.0, 4.0]]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", [*KINDS, *(dict(kind="jsd", beta=b) for b in (1e-4, 0.999))], ids=str)
def test_extreme_logits_and_closed_tokens(kind, backend, device):
    """Distributions at opposite corners, and tokens both close: finite values, no 0 * inf."""
    case = Case(torch.float32, device, bias=True, H=2, H2=2, **kind)
    case.tensors[0][:, 0] = case.tensors[3][:, 0] = 30
    case.tensors[1][:, 0] = torch.where(torch.rand(37) < 0.5, 100.0, -100.0).to(device)
    case.tensors[4] = case.tensors[1].clone() * 0.9
    for bias in (case.tensors[2], case.tensors[5]):
        bias[:4] = -math.inf
    value, *grads = case.ours(backend=backend)
    assert value.isfinite() and value > 5e-5 and all(g.isfinite().all() for g in grads)
    if kind["kind"] == "reverse":
        with torch.no_grad():
            p, q = (
                (h.double() @ w.double().T + b.double()).log_softmax(-1)
                for h, w, b in (case.tensors[:3], case.tensors[3:])
            )
            expected = torch.where(p.exp() == 0, 0, p.exp() * (p - q)).sum(-1).mean()
        assert abs(value - expected) < ulp(torch.tensor(3000.0), torch.float32)  # logits of 3,000 are known no better


def test_gradient_goes_where_it_is_asked_for(monkeypatch):
    calls = []
    for name in ("hidden_gradient", "add_weight_gradient_"):
        plain = getattr(Products, name)
        monkeypatch.setattr(Products, name, lambda *a, plain=plain, name=name: calls.append(name) or plain(*a))
    for reduction in ("mean", "none"):
        case = Case(torch.float64, kind="forward", H2=16)
        expected = case.ours(reduction=reduction)[1:]
        for wanted in range(4):
            calls.clear()
            leaves = [t.detach().clone() for t in case.tensors if t is not None]
            leaves[wanted].requires_grad_()
            out = linear_kl(*leaves, kind="forward", reduction=reduction)
            out.backward(case.upstream.to(out) if reduction == "none" else case.upstream[0].to(out))
            torch.testing.assert_close(leaves[wanted].grad, expected[wanted])
            assert calls == [("hidden_gradient", "add_weight_gradient_")[wanted % 2]]


@settings(max_examples=30)
@given(st.data())
def test_properties(data):
    """Divergences are not negative, JSD is bounded and symmetric under exchange, chunks and order do not matter."""
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    torch.manual_seed(draw(0, 1000))
    kind = data.draw(st.sampled_from(KINDS))
    case = Case(torch.float64, N=draw(1, 20), V=draw(1, 12), H=draw(1, 5), H2=draw(1, 5), bias=True, **kind)
    hidden, weight, bias, teacher, teacher_weight, teacher_bias = case.tensors
    heads = dict(bias=bias, teacher_bias=teacher_bias)
    values = linear_kl(hidden, weight, teacher, teacher_weight, reduction="none", **heads, **kind)
    assert (values > -1e-12).all()
    if kind["kind"] == "jsd":
        assert (values <= math.log(2) + 1e-12).all()
        swapped = linear_kl(
            teacher, teacher_weight, hidden, weight, bias=teacher_bias, teacher_bias=bias, reduction="none", kind="jsd",
            beta=1 - kind.get("beta", 0.5),
        )  # fmt: skip
    else:
        swapped = linear_kl(
            teacher, teacher_weight, hidden, weight, bias=teacher_bias, teacher_bias=bias, reduction="none",
            kind={"forward": "reverse", "reverse": "forward"}[kind["kind"]],
        )  # fmt: skip
    torch.testing.assert_close(values, swapped, rtol=1e-9, atol=1e-12)
    order, wider = torch.randperm(len(hidden)), max((weight, teacher_weight), key=lambda w: w.shape[1])
    scratch = workspace_of(draw(1, 30), wider, torch.float64, 2)
    total = linear_kl(
        hidden[order], weight, teacher[order], teacher_weight, workspace_bytes=scratch,
        reduction="sum", bias=bias + data.draw(st.floats(-20, 20)), teacher_bias=teacher_bias, **kind,
    )  # fmt: skip
    torch.testing.assert_close(total, values.sum(), rtol=1e-9, atol=1e-11)


def test_strides_repeatability_and_new_memory(backend, device):
    case = Case(torch.bfloat16, device, bias=True, kind="jsd")
    expected = case.ours(backend=backend)
    assert same(case.ours(backend=backend), expected)
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        assert same(case.ours(backend=backend), expected)
    finally:
        torch.use_deterministic_algorithms(False)
    case.tensors[0] = case.tensors[0].t().contiguous().t()
    case.tensors[4] = torch.stack([case.tensors[4]] * 2, -1)[..., 1]
    for a, b in zip(case.ours(backend=backend), expected):
        torch.testing.assert_close(a, b)


def test_retain_graph_and_gradients_of_gradients():
    for reduction in ("mean", "none"):
        case = Case(torch.float64, kind="reverse", reduction=reduction)
        leaves = case.leaves()
        out = linear_kl(leaves[0], leaves[1], leaves[3], leaves[4], kind="reverse", reduction=reduction).sum()
        first = torch.autograd.grad(out, leaves[0], retain_graph=True)
        assert same(first, torch.autograd.grad(out, leaves[0], retain_graph=True))
        with pytest.raises(RuntimeError):
            torch.autograd.grad(out, leaves[0], create_graph=True)[0].square().sum().backward()


def test_rows_beyond_one_window():
    N = 70_000
    hidden, teacher = torch.randn(N, 2, dtype=torch.float64), torch.randn(N, 2, dtype=torch.float64)
    weight, mask = torch.randn(3, 2, dtype=torch.float64), torch.rand(N) < 0.1
    mask[-1] = True
    p, q = ((x @ weight.T).log_softmax(-1) for x in (hidden, teacher))
    got = linear_kl(hidden, weight, teacher, weight, kind="reverse", mask=mask, reduction="none")
    torch.testing.assert_close(got, torch.where(mask, (p.exp() * (p - q)).sum(-1), 0))
