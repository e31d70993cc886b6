"""The registered operators: torch.compile without a graph break, opcheck, autocast, hooks, checkpointing."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from longpo_ops import (
    DPO,
    Objective,
    fused_preference_loss,
    linear_cross_entropy,
    linear_kl,
    linear_logprobs,
    packed_objective_loss,
    packed_preference_loss,
)
from longpo_ops.ops import divergence, operators, truth
from longpo_ops.ops.products import Products
from tests.budget import check_budget

N, V, H = 12, 11, 8
LABELS = torch.tensor([1, 2, -100, 10, 0, 5, 5, -100, 3, 7, 8, 9])
ROWS = torch.linspace(0.5, 1.5, N)


def fused(hidden, weight, bias, **more):
    chosen, rejected = hidden.view(2, 2, 3, H)
    labels = LABELS.view(2, 2, 3).to(hidden.device)
    out = fused_preference_loss(
        chosen, rejected, weight, labels[0], labels[1], objective=DPO(), ref_chosen_logps=torch.tensor([-3.0, -4.0]),
        ref_rejected_logps=torch.tensor([-5.0, -6.0]), nll_labels=labels[0], bias=bias, **more,
    )  # fmt: skip
    return out.loss


def packed(hidden, weight, bias, **more):
    return packed_preference_loss(
        hidden, weight, LABELS, torch.arange(N) // 3, num_chosen=2, rejected_pair=torch.tensor([1, 0]),
        nll_weights=ROWS, objective="simpo", bias=bias, **more,
    ).loss  # fmt: skip


def logprobs(hidden, weight, bias, **more):
    return (linear_logprobs(hidden, weight, LABELS, bias=bias, softcap=5.0, **more) * ROWS.to(hidden.device)).sum()


def cross_entropy(hidden, weight, bias, **more):
    return linear_cross_entropy(hidden, weight, LABELS, bias=bias, row_weights=ROWS, **more)


def kl(hidden, weight, bias, **more):
    teacher = hidden.flip(0), weight * 2
    return linear_kl(hidden, weight, *teacher, bias=bias, kind="reverse", mask=LABELS >= 0, **more)


def kl_rows(hidden, weight, bias, **more):
    teacher = hidden.flip(0), weight * 2
    values = linear_kl(hidden, weight, *teacher, bias=bias, kind="jsd", reduction="none", **more)
    return (values * ROWS.to(hidden.device)).sum()


@dataclass(frozen=True, kw_only=True)
class Squares(Objective):
    """Of nobody but this test: slopes of autograd inside the operator."""

    needs_reference: ClassVar[bool] = False
    beta: float = 0.1

    def losses(self, answers):
        chosen, rejected = answers.pairs(answers.logps / answers.lengths)
        return answers.mean_over_rejected((self.beta * (chosen - rejected) - 1).square())


def own(hidden, weight, bias, **more):
    return packed_objective_loss(
        hidden, weight, LABELS, torch.arange(N) // 3, groups=torch.tensor([0, 1, 0, 1]), roles=torch.tensor([0, 1, 1, 0]),
        num_groups=2, objective=Squares(), bias=bias, **more,
    ).loss  # fmt: skip


FUNCTIONS = (fused, packed, own, logprobs, cross_entropy, kl, kl_rows)


def leaves(dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in ((N, H), (V, H), (V,))]


def value_and_gradients(function, inputs):
    value = function(*inputs)
    return value.detach(), *torch.autograd.grad(value, inputs)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_compiles_without_a_graph_break(function):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: function(*(t * 1 for t in x)) * 0.5, fullgraph=True, backend="aot_eager")
    plain = value_and_gradients(lambda *x: function(*x) * 0.5, leaves())
    for a, b in zip(value_and_gradients(compiled, leaves()), plain):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_compiles_with_inductor():
    torch._dynamo.reset()
    compiled = torch.compile(lambda h, w, b: fused(h.tanh(), w, b), fullgraph=True)
    plain = value_and_gradients(lambda h, w, b: fused(h.tanh(), w, b), leaves())
    for a, b in zip(value_and_gradients(compiled, leaves()), plain):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_compiles_for_lengths_that_change():
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (5, 9, 30):
        hidden, weight, labels = torch.randn(n, H, requires_grad=True), torch.randn(V, H), torch.randint(V, (n,))
        torch.testing.assert_close(compiled(hidden, weight, labels), linear_cross_entropy(hidden, weight, labels))


def test_compiles_without_gradients():
    torch._dynamo.reset()
    for function in FUNCTIONS:
        inputs = [t.detach() for t in leaves()]
        with torch.no_grad():
            torch.testing.assert_close(
                torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs), function(*inputs)
            )


@pytest.mark.parametrize("function", [fused, kl], ids=lambda f: f.__name__)
def test_compiled_backward_with_retain_graph(function):
    torch._dynamo.reset()
    inputs = leaves()
    value = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    first = torch.autograd.grad(value * 0.5, inputs, retain_graph=True)
    second = torch.autograd.grad(value * 0.5, inputs)
    plain = value_and_gradients(lambda *x: function(*x) * 0.5, leaves())[1:]
    for a, b, c in zip(first, second, plain):
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(b, c)


def test_reuse_hidden_is_refused_under_compile():
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: fused(*x, reuse_hidden=True), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="reuse_hidden=True: expected False under"):
        compiled(*leaves())


def test_opcheck_sweep():
    hidden, weight, bias = leaves(torch.float32)
    none = torch.empty(0, dtype=torch.int64)
    for need, objective, references in (
        ([True, True, True], ("dpo", [1.0, 0.1, 0.0, 0.0]), torch.zeros(4)),
        ([True, False, False], ("simpo", [1.0, 2.0, 1.0, 0.0]), None),
    ):
        torch.library.opcheck(
            operators.sweep_op,
            (
                list(hidden.detach().view(2, 2, 3, H).requires_grad_().unbind()),
                weight if need[1] else weight.detach(), bias if need[2] else bias.detach(), list(LABELS.view(2, 2, 3)),
                [torch.tensor([[0], [1]]), torch.tensor([[2], [3]])], [LABELS.view(2, 2, 3)[0], none],
                [torch.ones(2, 1), torch.zeros(2, 1)], torch.tensor(2.0), references, torch.tensor([0, 1]), none, 2,
                *objective, 1.0, 2.0, True, -100, "", need[1], 1.0, 0.0, 64 << 20, torch.float32, need, "torch",
            ),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck_log_probs_and_divergence(dtype):
    hidden, weight, bias = leaves(dtype)
    options = (1.0, 3.0, 64 << 20, dtype)
    torch.library.opcheck(operators.logps_op, (hidden, weight, bias, LABELS, -100, *options, False, "torch"))
    plain = [t.detach() for t in (hidden, weight, bias)]
    torch.library.opcheck(
        operators.logps_backward_op, (ROWS, *plain, LABELS, -100, *options, [True, False, True], "torch")
    )
    heads = (hidden, weight, bias, *plain[:2], None)
    rest = ("jsd", 0.5, 1.0, 0.0, 1.0, 2.0, 64 << 20, dtype, False, "torch")
    torch.library.opcheck(divergence._values_op, (*heads, LABELS >= 0, *rest))
    need = [True, True, True, False, False, False]
    torch.library.opcheck(
        divergence._divergence_op, (*heads, LABELS >= 0, ROWS, torch.tensor(2.0), "", *rest, need),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
def test_autocast(function, dtypes):
    """float32 weights under bfloat16 autocast: gradients in each input's own dtype, as good as plain autocast's."""
    hidden, weight, bias = leaves(torch.float32)
    inputs = [x.detach().to(d).requires_grad_() for x, d in zip((hidden, weight, bias), (*dtypes, torch.float32))]
    if function in (kl, kl_rows):  # the teacher is made of both
        inputs[0] = inputs[0].detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = function(*inputs)
    assert value.dtype == torch.float32
    grads = torch.autograd.grad(value, inputs)
    assert [g.dtype for g in grads] == [x.dtype for x in inputs]
    expected = value_and_gradients(function, [x.detach().double().requires_grad_() for x in inputs])
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in inputs]
    plain = value_and_gradients(function, rounded)  # what rounding the operands to bfloat16 alone costs
    for name, a, p, t in zip(("value", "hidden", "weight", "bias"), (value, *grads), plain, expected):
        size = t.abs().max().item()
        assert (a.double() - t).abs().max() <= 2 * (p - t).abs().max() + 2**-8 * size, name


def test_autocast_off_for_float64():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = cross_entropy(*leaves())
    torch.testing.assert_close(value, cross_entropy(*leaves()), rtol=1e-14, atol=0)


def as_teacher(hidden, weight, bias, **more):
    return linear_kl(hidden.flip(0), weight * 2, hidden, weight, teacher_bias=bias, kind="jsd", beta=0.9, **more)


def reused(hidden, weight, bias, **more):
    return packed(hidden + 0.0, weight, bias, reuse_hidden=True, **more)  # the sum keeps the strides


LAYOUTS = {
    "every other number": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "by columns": lambda t: torch.stack([t] * 3)[1] if t.dim() < 2 else t.mT.contiguous().mT,
    "within more": lambda t: torch.nn.functional.pad(t, (1, 2))[..., 1:-2],
    "one row": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function", [*FUNCTIONS, as_teacher, reused], ids=lambda f: f.__name__)
def test_leaves_of_any_strides(function, dtype, layout, backend, device):
    """Each in its turn, with a loss that is scaled before backward: the numbers of the same values, contiguous."""
    plain = [t.detach().to(device).requires_grad_() for t in leaves(dtype)]
    for which, tensor in enumerate(plain):
        view = LAYOUTS[layout](tensor.detach())
        assert which == 2 or view.stride() != tensor.stride()
        dense = view.clone(memory_format=torch.contiguous_format)
        runs = [[*plain[:which], x.requires_grad_(), *plain[which + 1 :]] for x in (view, dense)]
        results = [value_and_gradients(lambda *x: function(*x, backend=backend) * 0.5, run) for run in runs]
        for a, b in zip(*results, strict=True):
            size = max(
                1, b.detach().abs().max().item()
            )  # what is 0 but for rounding is as near as terms of size 1 allow
            torch.testing.assert_close(a, b, rtol=0, atol=4 * torch.finfo(dtype).eps * size)


def test_numbers_of_any_strides(backend, device):
    """Labels, weights of rows, sequences, references, masks and upstream gradients: every other number of a tensor."""
    hidden, weight, bias = (t.detach().to(device).requires_grad_() for t in leaves(torch.float32))

    def results(way):
        labels, rows, numbers = way(LABELS), way(ROWS), way(torch.arange(N) // 3)
        of_pairs = dict(
            ref_chosen_logps=way(torch.tensor([-3.0, -4.0])), ref_rejected_logps=way(torch.tensor([-5.0, -6.0]))
        )
        loss = packed_preference_loss(
            hidden, weight, labels, numbers, num_chosen=2, rejected_pair=way(torch.tensor([1, 0])), nll_weights=rows,
            bias=bias, backend=backend, **of_pairs,
        ).loss  # fmt: skip
        loss = loss + linear_cross_entropy(hidden, weight, labels, row_weights=rows, bias=bias, backend=backend)
        head = dict(mask=way(LABELS >= 0), row_weights=rows, bias=bias, backend=backend)
        loss = loss + linear_kl(hidden, weight, hidden.detach(), weight.detach(), **head)
        logps = linear_logprobs(hidden, weight, labels, bias=bias, backend=backend)
        return loss, *torch.autograd.grad(
            [loss, logps], [hidden, weight, bias], [torch.ones_like(loss), way(ROWS).to(logps)]
        )

    for a, b in zip(results(lambda t: torch.stack([t, t], -1)[..., 0]), results(lambda t: t), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("products", ["blocks", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_bits_with_the_same_number_of_threads(dtype, products, backend, device, monkeypatch):
    """And with csrc/cpu's float32 products with any number: every sum of theirs and of the rows is one chain."""
    monkeypatch.setenv("LONGPO_OPS_PRODUCTS", products)
    n, vocab, width = 150, 1031, 70
    tensors = [torch.randn(shape).to(device, dtype) for shape in ((n, width), (vocab, width), (vocab,))]
    labels, pairs = torch.randint(vocab, (n,)), torch.arange(n) // 50 - 1

    def results(threads):
        torch.set_num_threads(threads)
        hidden, weight, bias = inputs = [t.clone().requires_grad_() for t in tensors]
        more = dict(bias=bias, backend=backend)
        losses = [
            packed_preference_loss(
                hidden, weight, labels, pairs, num_chosen=1, rejected_pair=torch.zeros(1, dtype=torch.int64),
                nll_weights=torch.ones(n), objective="simpo", **more,
            ).loss,
            linear_cross_entropy(hidden, weight, labels, **more),
            linear_logprobs(hidden, weight, labels, **more).sum(),
            linear_kl(hidden, weight, hidden.detach().flip(0), weight.detach() / 2, kind="jsd", **more),
        ]  # fmt: skip
        return [x for loss in losses for x in (loss, *torch.autograd.grad(loss, inputs))]

    before = torch.get_num_threads()
    try:
        one, again, two, twice = (results(threads) for threads in (1, 1, 2, 2))
    finally:
        torch.set_num_threads(before)
    chains = backend == "cpu" and dtype == torch.float32 and products == "blocks"
    same = [(one, again), (two, twice)] + [(one, two)] * chains
    assert all(torch.equal(a, b) for left, right in same for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("function", [*FUNCTIONS, reused], ids=lambda f: f.__name__)
def test_second_derivatives_are_refused(function):
    inputs = leaves()
    with pytest.raises(RuntimeError, match="create_graph=True: longpo_ops has no second derivatives"):
        torch.autograd.grad(function(*inputs), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        function(*inputs).backward(create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.functional.hvp(lambda w: function(inputs[0], w, inputs[2]), inputs[1], torch.ones(V, H).double())


def test_a_loss_that_is_a_constant_to_a_transform_is_one():
    """And its own gradients go on past it."""
    (hidden, weight, bias), x = leaves(), torch.arange(1.0, 4.0).double()
    labels = torch.arange(len(hidden)) % len(weight)
    loss = lambda: linear_cross_entropy(hidden, weight, labels, bias=bias)  # noqa: E731
    weighted = lambda x: (x**2).sum() * loss()  # noqa: E731
    grad, truth = torch.func.grad(weighted)(x), loss().detach()
    torch.testing.assert_close(grad.detach(), 2 * x * truth)
    torch.testing.assert_close(torch.func.jvp(weighted, (x,), (x,))[1].detach(), 28 * truth)
    torch.testing.assert_close(torch.func.jacrev(weighted)(x).detach(), 2 * x * truth)
    torch.testing.assert_close(torch.autograd.grad(grad.sum(), weight)[0], 12 * torch.autograd.grad(loss(), weight)[0])


def test_row_weights_that_a_transform_differentiates_are_refused():
    hidden, weight, bias = (t.detach() for t in leaves())
    labels, ones = torch.zeros(len(hidden), dtype=torch.int64), torch.ones(len(hidden)).double()
    loss = lambda w: linear_cross_entropy(hidden, weight, labels, bias=bias, row_weights=w)  # noqa: E731
    for transform in (torch.func.grad, torch.func.jacfwd):
        with pytest.raises(ValueError, match=r"row_weights is differentiated by, or made within, a torch.func"):
            transform(loss)(ones)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match="row_weights carries a forward-mode"):
        loss(torch.autograd.forward_ad.make_dual(ones, ones))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_transforms_that_would_lose_the_derivative_are_refused(function):
    plain = [t.detach() for t in leaves()]
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        with pytest.raises(ValueError, match=r"torch.func transform around longpo_ops: expected loss.backward"):
            transform(lambda w: function(plain[0], w, plain[2]))(plain[1])
    with pytest.raises(ValueError, match=r"torch.func transform"):
        torch.func.jvp(lambda b: function(*plain[:2], b), (plain[2],), (plain[2],))
    below = lambda w: torch.func.vmap(lambda b: function(plain[0], w, b))(plain[2][None]).sum()  # noqa: E731
    with pytest.raises(ValueError, match=r"torch.func transform"):
        torch.func.grad(below)(plain[1])
    with torch.autograd.forward_ad.dual_level():
        assert function(*plain).isfinite()
        for which, name in enumerate(("hidden", "weight", "bias")):
            dual = torch.autograd.forward_ad.make_dual(plain[which], torch.ones_like(plain[which]))
            with pytest.raises(ValueError, match=f"{name} carries a forward-mode tangent"):
                function(*plain[:which], dual, *plain[which + 1 :])


@pytest.mark.parametrize("function", [logprobs, kl, kl_rows], ids=lambda f: f.__name__)
def test_vmap_is_a_loop(function):
    hidden, weight, bias = (t.detach() for t in leaves())
    heads = torch.stack([weight, weight * 2])
    together = torch.vmap(lambda w: function(hidden, w, bias))(heads)
    torch.testing.assert_close(together, torch.stack([function(hidden, w, bias) for w in heads]))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_activation_checkpointing(function, reentrant):
    plain = value_and_gradients(function, leaves())
    recomputed = value_and_gradients_by_backward(lambda *x: checkpoint(function, *x, use_reentrant=reentrant), leaves())
    for a, b in zip(recomputed, plain):
        assert torch.equal(a, b)


def value_and_gradients_by_backward(function, inputs):
    value = function(*inputs)
    value.backward()
    return value.detach(), *(x.grad for x in inputs)


def test_saved_tensors_may_move_away_and_back():
    """Offloading hooks hand back other tensors than those they were given."""
    plain = value_and_gradients(fused, leaves())
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy().copy(), torch.from_numpy):
        value = fused(*(inputs := leaves()))
    for a, b in zip(torch.autograd.grad(value, inputs), plain[1:]):
        assert torch.equal(a, b)


@pytest.mark.parametrize("function", ["preference", "cross_entropy", "kl"])
def test_backward_makes_no_second_gradient(function):
    """What forward computed is handed over, not copied: no tensor of a gradient's size is made in backward."""
    wide = 4096
    chosen, rejected = (torch.randn(2, 3, wide, requires_grad=True) for _ in range(2))
    weight, labels = torch.randn(V, wide, requires_grad=True), LABELS.view(2, 2, 3)
    rows = torch.randn(N, wide, requires_grad=True)
    if function == "preference":
        loss = fused_preference_loss(chosen, rejected, weight, *labels, objective="simpo", nll_labels=labels[0]).loss
    elif function == "cross_entropy":
        loss = linear_cross_entropy(rows, weight, LABELS)
    else:
        loss = linear_kl(rows, weight, torch.randn(N, 3), torch.randn(V, 3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        loss.backward()
    made = [e.nbytes() for e in record.profiler.kineto_results.events() if e.name() == "[memory]" and e.nbytes() > 0]
    assert max(made, default=0) < 4 * wide, made


def test_products_are_in_float32_for_16_bit_inputs_on_the_cpu():
    for dtype in (torch.bfloat16, torch.float16):
        weight, h = torch.randn(3000, 64).to(dtype), torch.randn(5, 64).to(dtype)
        products = Products(weight, dtype)
        z = products.logits_(h.float(), torch.empty(5, 3000))
        expected = h.double() @ weight.double().T
        check_budget("logits", z, h.float() @ weight.float().T, expected, draws=True)  # a row is a draw
        dz = torch.randn(5, 3000)
        hidden = dz @ weight.float(), dz.double() @ weight.double()
        check_budget("hidden", products.hidden_gradient(dz), *hidden, draws=True)
        dw = torch.ones(3000, 64)
        products.add_weight_gradient_(dw, dz, h.float())
        check_budget("weight", dw, 1 + dz.T @ h.float(), 1 + dz.double().T @ h.double(), draws=True)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_few_rows_are_multiplied_as_well_as_many(n):
    """A product of one row adds V numbers one after another on a CPU; ours must not lose digits to that."""
    weight, dz = torch.randn(20_000, 32), torch.randn(64, 20_000)
    expected = dz.double() @ weight.double()
    parts = torch.cat([Products(weight, torch.float32).hidden_gradient(d) for d in dz.split(n)])
    check_budget("hidden", parts, dz @ weight, expected, draws=True)
    h, wide = torch.randn(64, 4096), torch.randn(300, 4096)
    products = Products(wide, torch.float32)
    logits = torch.cat([products.logits_(x, torch.empty(len(x), 300)) for x in h.split(n)])
    check_budget("logits", logits, h @ wide.T, h.double() @ wide.double().T, draws=True)


def test_the_reference_is_plain_pytorch():
    hidden, weight, bias = leaves()
    z = torch.nn.functional.linear(hidden, weight, bias)
    capped = 5 * torch.tanh(2 * z / 5) / 3
    torch.testing.assert_close(truth.logits(hidden, weight, bias, softcap=5, scale=2, temperature=3), capped)
    nll = torch.nn.functional.cross_entropy(z, LABELS, reduction="none")
    torch.testing.assert_close(truth.logprobs(hidden, weight, LABELS, bias=bias), -nll)
    torch.testing.assert_close(truth.cross_entropy(hidden, weight, LABELS, bias=bias, reduction="sum"), nll.sum())


class Calls(TorchDispatchMode):
    """Names of the operators called within."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_gradient_is_scaled_in_float32(dtype):
    gradient, factor = (
        torch.randn(3, operators.SCALE_BLOCK // 2).to(dtype),
        torch.tensor(1.2345678, dtype=torch.float64),
    )
    wanted = (gradient.float() * factor.float()).to(dtype)
    assert torch.equal(operators.scale_(gradient, factor), wanted)


def test_a_gpu_scales_a_16_bit_gradient_in_one_kernel():
    """The meta device stands for it: block by block, launches would take longer than the numbers."""
    gradient, factor = torch.empty(1 << 30, dtype=torch.bfloat16, device="meta"), torch.ones((), device="meta")
    with Calls() as calls:
        operators.scale_(gradient, factor)
    assert [name for name in calls.names if "mul" in name] == ["aten::mul_.Tensor"]
