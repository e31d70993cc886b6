"""What rows tell beside a log-prob, and label smoothing, class weights and z-loss, against full logits in float64."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks.budget import DRAWS
from longpo_ops import linear_cross_entropy, linear_logprobs, packed_preference_loss
from longpo_ops.ops import affine, truth
from tests.budget import check_budget

N, V, H = 23, 37, 16
ALL = ("entropy", "logsumexp", "predicted")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MAPS = {"default": {}, "softcap": dict(softcap=6.0, scale=1.4, temperature=0.7)}
LOSSES = {
    "smoothed": dict(label_smoothing=0.2),
    "z-loss": dict(z_loss_weight=1e-2),
    "class weights": dict(class_weights=True),
    "all": dict(label_smoothing=0.2, z_loss_weight=1e-2, class_weights=True),
}


class Case:
    """Rows, a third of them without a label; losses end in a scalar through random upstream gradients."""

    def __init__(self, dtype, device="cpu", **map):
        self.map, self.dtype, self.device = map, dtype, device
        self.labels = torch.where(torch.rand(N) < 0.3, -100, torch.randint(V, (N,)))
        self.labels[0] = V - 1
        self.weights, self.classes = torch.rand(N) * 2, torch.rand(V) * (torch.arange(V) % 5 != 0)
        self.upstream = torch.randn(3, N)
        self.redraw()

    def redraw(self):
        draws = torch.randn(N, H), torch.randn(V, H) * 2 * H**-0.5, torch.randn(V)
        self.tensors = [t.to(self.device, self.dtype) for t in draws]

    def leaves(self, dtype=None):
        return [t.detach().to(dtype or self.dtype).requires_grad_() for t in self.tensors]

    def outputs(self, ours, dtype=None, through=(0, 1, 2), **more):
        """-> log-probs, entropies, logsumexps, predicted tokens, and the gradients through some of them."""
        hidden, weight, bias = leaves = self.leaves(dtype)
        labels = self.labels.to(self.device)
        if ours:
            found = linear_logprobs(hidden, weight, labels, bias=bias, outputs=ALL, **self.map, **more)
        else:
            found = truth.row_outputs(hidden, weight, labels, bias=bias, **self.map)
        upstream = [self.upstream[i].to(found[i]) for i in through]
        grads = torch.autograd.grad([found[i] for i in through], leaves, upstream)
        return [x.detach() for x in found] + list(grads)

    def loss(self, ours, dtype=None, reduction="mean", weighted=True, **more):
        hidden, weight, bias = leaves = self.leaves(dtype)
        if more.pop("class_weights", None):
            more["class_weights"] = self.classes.to(self.device, dtype or torch.float32)
        labels, rows = self.labels.to(self.device), self.weights.to(self.device) if weighted else None
        call = linear_cross_entropy if ours else truth.cross_entropy
        out = call(hidden, weight, labels, bias=bias, row_weights=rows, reduction=reduction, **self.map, **more)
        upstream = self.upstream[0].to(out)
        return out.detach(), *torch.autograd.grad(out, leaves, upstream if out.dim() else upstream[0])


def check(case, run, names, draws, **more):
    """Each result within the budget, on average over draws."""
    runs = []
    for _ in range(draws):
        case.redraw()
        runs.append((run(True, **more), run(False), run(False, torch.float64)))
    for name, *results in zip(names, *(zip(*part) for part in zip(*runs))):
        check_budget(name, *results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("map", MAPS)
def test_outputs_keep_the_budget(map, dtype, backend, device, workspace):
    case = Case(dtype, device, **MAPS[map])
    options = dict(backend=backend, workspace_bytes=workspace(case.tensors[1], 4))
    run = lambda *a, **k: [x for x in case.outputs(*a, **k) if x.is_floating_point()]  # noqa: E731
    check(case, run, ("logps", "entropy", "logsumexp", "hidden", "weight", "bias"), DRAWS, **options)
    predicted = case.outputs(True, **options)[3]
    assert predicted.dtype == torch.int64 and (predicted == -1).tolist() == (case.labels == -100).tolist()
    assert torch.equal(predicted, case.outputs(False, torch.float64)[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", ["smoothed", "all"])
def test_losses_keep_the_budget(loss, reduction, dtype, backend, device, workspace):
    case = Case(dtype, device, softcap=6.0)
    options = dict(backend=backend, workspace_bytes=workspace(case.tensors[1], 5))
    more = LOSSES[loss] | dict(reduction=reduction)
    run = lambda ours, dtype=None, **given: case.loss(ours, dtype, **more, **given)  # noqa: E731
    check(case, run, ("value", "hidden", "weight", "bias"), DRAWS, **options)


@pytest.mark.quick
@pytest.mark.parametrize("rows", [None, 1])
def test_float64_equals_full_logits(rows, workspace):
    case = Case(torch.float64, softcap=3.0)
    options = dict(backend="torch", workspace_bytes=workspace(case.tensors[1], rows))
    for through in ((0, 1, 2), (0,), (1,), (2,), (0, 1), (1, 2)):
        pairs = zip(case.outputs(True, through=through, **options), case.outputs(False, through=through), strict=True)
        for ours, expected in pairs:
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)
    for loss, reduction in itertools.product(LOSSES, ("mean", "sum", "none")):
        more = LOSSES[loss] | dict(reduction=reduction, weighted=reduction != "sum")
        for ours, expected in zip(case.loss(True, **more, **options), case.loss(False, **more), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


def test_equals_torch_cross_entropy_without_row_weights():
    case = Case(torch.float64)
    hidden, weight, _ = case.tensors
    for smoothing, classes, reduction in itertools.product(
        (0.0, 0.3), (None, case.classes.double()), ("mean", "sum", "none")
    ):
        ours = linear_cross_entropy(
            hidden, weight, case.labels, label_smoothing=smoothing, class_weights=classes, reduction=reduction
        )
        options = dict(weight=classes, label_smoothing=smoothing, reduction=reduction)
        torch.testing.assert_close(ours, F.cross_entropy(hidden @ weight.T, case.labels, **options))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction):
    case = Case(torch.float64, softcap=2.0, temperature=1.5)
    labels, classes = case.labels[:5], case.classes[:7].double()
    leaves = [t.detach()[:n].clone().requires_grad_() for t, n in zip(case.tensors, (5, 7, 7))]
    leaves[0], leaves[1] = (t.detach()[:, :4].clone().requires_grad_() for t in leaves[:2])
    labels = torch.where(labels < 0, labels, labels % 7)

    def losses(hidden, weight, bias):
        more = dict(class_weights=classes, label_smoothing=0.3, z_loss_weight=0.1, reduction=reduction, **case.map)
        return linear_cross_entropy(hidden, weight, labels, bias=bias, **more)

    def told(hidden, weight, bias):
        return linear_logprobs(hidden, weight, labels, bias=bias, outputs=ALL, **case.map)[:3]

    assert torch.autograd.gradcheck(losses, leaves)
    assert torch.autograd.gradcheck(told, leaves)


def test_the_log_probs_gradient_alone_is_that_of_linear_logprobs(backend, device):
    """Nothing is paid for what no gradient comes through, and no bit differs."""
    case = Case(torch.float32, device)
    hidden, weight, bias = leaves = case.leaves()
    more = dict(bias=bias, backend=backend)
    plain = linear_logprobs(hidden, weight, case.labels, **more)
    told = linear_logprobs(hidden, weight, case.labels, outputs=("predicted",), **more)
    assert told.entropy is None and told.logsumexp is None and not told.predicted.requires_grad
    upstream = case.upstream[0].to(plain)
    for a, b in zip(*(torch.autograd.grad(x, leaves, upstream) for x in (plain, told.logps)), strict=True):
        assert torch.equal(a, b)


def test_closed_tokens_add_nothing_to_an_entropy(backend, device):
    """0 * log 0: a bias of -inf takes tokens out; of a softmax that is sure the entropy is 0 and its gradient is no NaN."""
    case = Case(torch.float32, device)
    case.tensors[2][5:] = -math.inf
    case.labels = torch.where(case.labels < 0, case.labels, case.labels % 5)
    ours, expected = case.outputs(True, backend=backend), case.outputs(False, torch.float64)
    assert all(x.isfinite().all() for x in ours)
    for a, b in zip(ours[:4], expected[:4], strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)
    case.tensors[2][:5] = torch.tensor([1e4, 0, 0, 0, 0])
    sure = case.outputs(True, backend=backend)
    assert (sure[1] == 0).all() and all(x.isfinite().all() for x in sure)
    case.classes[5:] = 0  # class weights of 0 leave closed classes out of the smoothing, too
    for reduction in ("mean", "none"):
        found = case.loss(True, reduction=reduction, class_weights=True, label_smoothing=0.1, backend=backend)
        assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("rows", [None, 1])
def test_nan_rows(rows, backend, device, workspace):
    """In a used row NaN comes out, and no token is predicted; in a row without a label it changes no bit."""
    case = Case(torch.float32, device)
    case.labels[3], case.labels[4] = -100, 5
    options = dict(backend=backend, workspace_bytes=workspace(case.tensors[1], rows))
    runs = [lambda: case.outputs(True, **options), lambda: case.loss(True, **LOSSES["all"], **options)]
    clean = [run() for run in runs]
    case.tensors[0][3] = math.nan
    case.weights[3] = math.nan
    for run, before in zip(runs, clean):
        assert all(torch.equal(a, b) for a, b in zip(run(), before, strict=True))
    case.tensors[0][4, 2] = math.nan
    logps, entropy, logsumexp, predicted, hidden, weight, _ = case.outputs(True, **options)
    assert all(x.isnan().nonzero().tolist() == [[4]] for x in (logps, entropy, logsumexp))
    assert predicted[4] == -1 and (predicted[[0, 1, 2]] >= -1).all()
    assert hidden[4].isnan().any() and weight.isnan().any() and hidden[[0, 1, 2, 3]].isfinite().all()
    assert case.loss(True, **LOSSES["all"], **options)[0].isnan()


@pytest.mark.parametrize("kind", ["no rows", "nothing labelled"])
def test_nothing_to_do_gives_zero_and_no_gradient(kind, backend, device):
    case = Case(torch.float32, device)
    if kind == "no rows":
        case.tensors[0], case.labels, case.weights = (x[:0] for x in (case.tensors[0], case.labels, case.weights))
        case.upstream = torch.ones(3, 1)[:, :0]
    else:
        case.labels.fill_(-100)
    logps, entropy, logsumexp, predicted, *grads = case.outputs(True, backend=backend)
    assert not any(x.any() for x in (logps, entropy, logsumexp, *grads)) and (predicted == -1).all()
    case.upstream = torch.ones(3, max(1, len(case.labels)))[:, : len(case.labels) or 1]
    value, *grads = case.loss(True, **LOSSES["all"], backend=backend)
    assert not value.any() and not any(g.any() for g in grads)


def test_ties_predict_the_first_token(backend, device):
    hidden, weight = torch.ones(2, 4, device=device), torch.ones(2000, 4, device=device)
    weight[[700, 1500]] = 2.0
    told = linear_logprobs(hidden, weight, torch.tensor([0, 1]), outputs=("predicted",), backend=backend)
    assert told.predicted.tolist() == [700, 700]


@pytest.mark.parametrize("kind", ["large", "small"])
def test_float16_gradients_of_large_and_small_losses(kind):
    """A z-loss of logits near 1e4 is too large for float16 and a weight of 1e-7 too small, but for their scaling."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(40, 8).half(), torch.randn(300, 8).half()
    factor = 8.0 if kind == "large" else 1.0
    labels, z = torch.randint(300, (40,)), 20.0 if kind == "large" else 1e-7

    def run(dtype):
        leaves = [(hidden * factor).to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        more = dict(z_loss_weight=z, label_smoothing=0.1, reduction="sum")
        return torch.autograd.grad(
            linear_cross_entropy(*leaves, labels, **more) * (1e-3 if kind == "large" else 1), leaves
        )

    for a, b in zip(run(torch.float16), run(torch.float32), strict=True):
        assert a.isfinite().all()
        assert (a.float() - b).abs().max() <= 2e-3 * b.abs().max()


# ---- the tokens that a preference loss counts --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [None, 2], ids=["one visit", "scored first"])
@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "no_grad"])
def test_correct_tokens_are_counted_and_nothing_else_changes(gradient, rows, dtype, backend, device, workspace):
    case = Case(dtype, device, softcap=6.0)
    hidden, weight, bias = case.leaves() if gradient else case.tensors
    sequences = torch.where(case.labels < 0, -1, torch.arange(N) % 5)
    best = truth.row_outputs(hidden, weight, case.labels.to(device), bias=bias, **case.map)[3].cpu()
    case.labels[1::2] = torch.where(case.labels[1::2] < 0, -100, best[1::2])  # half of them are as predicted
    options = dict(
        num_chosen=2, rejected_pair=torch.tensor([0, 1, 1]), objective="logo", nll_weights=torch.ones(N), bias=bias,
        backend=backend, workspace_bytes=workspace(weight, rows), softcap=6.0, scale=1.0,
    )  # fmt: skip

    def run(correct):
        out = packed_preference_loss(hidden, weight, case.labels, sequences, correct_tokens=correct, **options)
        grads = torch.autograd.grad(out.loss, (hidden, weight, bias)) if gradient else ()
        return out, [out.loss.detach(), out.chosen_logps, out.rejected_logps, *grads]

    (plain, before), (counted, after) = run(False), run(True)
    assert plain.chosen_correct is None and plain.rejected_correct is None
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(before, after, strict=True))
    expected = [int(((best == case.labels) & (sequences == k)).sum()) for k in range(5)]
    assert [*counted.chosen_correct.tolist(), *counted.rejected_correct.tolist()] == expected and sum(expected) > 0


# ---- as registered operators -----------------------------------------------------------------------------------------

LABELS = torch.tensor([1, 2, -100, 10, 0, 5, 5, -100, 3, 7, 8, 9])


def told(hidden, weight, bias, **more):
    found = linear_logprobs(hidden, weight, LABELS, bias=bias, softcap=5.0, outputs=ALL, **more)
    return found.logps.sum() + 2 * found.entropy.sum() - (found.logsumexp * 0.1).sum()


def smoothed(hidden, weight, bias, **more):
    options = dict(label_smoothing=0.1, z_loss_weight=1e-2, class_weights=torch.linspace(0, 2, 11))
    return linear_cross_entropy(hidden, weight, LABELS, bias=bias, **options, **more)


def smoothed_rows(hidden, weight, bias, **more):
    return smoothed(hidden, weight, bias, reduction="none", **more).sum()


FUNCTIONS = (told, smoothed, smoothed_rows)


def small_leaves(dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in ((12, 8), (11, 8), (11,))]


def value_and_gradients(function, inputs):
    value = function(*inputs)
    return value.detach(), *torch.autograd.grad(value, inputs)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_compiles_without_a_graph_break(function):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: function(*(t * 1 for t in x)) * 0.5, fullgraph=True, backend="aot_eager")
    plain = value_and_gradients(lambda *x: function(*x) * 0.5, small_leaves())
    for a, b in zip(value_and_gradients(compiled, small_leaves()), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*small_leaves()), plain[0])


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_autocast(function):
    inputs = small_leaves(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value_and_gradients(function, inputs)
    assert all(x.dtype == torch.float32 for x in found)
    rounded = value_and_gradients(function, [x.detach().bfloat16().double().requires_grad_() for x in inputs])
    exact = value_and_gradients(function, small_leaves())
    for ours, plain, true in zip(found, rounded, exact, strict=True):
        assert (ours.double() - true).abs().max() <= 2 * (plain - true).abs().max() + 2**-8 * true.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(dtype):
    hidden, weight, bias = small_leaves(dtype)
    options = (-100, 1.0, 3.0, 64 << 20, dtype)
    for classes, asked in ((None, [True, False, True]), (torch.rand(11), [False, True, False])):
        torch.library.opcheck(affine.rows_op, (hidden, weight, bias, classes, LABELS, asked, *options, False, "torch"))
    plain = [t.detach() for t in (hidden, weight, bias)]
    upstream, nothing = torch.randn(12), torch.empty(0)
    for given in ([upstream, upstream, nothing, nothing], [upstream, nothing, nothing, nothing]):
        torch.library.opcheck(
            affine.rows_backward_op, (given, *plain, None, LABELS, *options, [True, False, True], "torch")
        )
    rows = [torch.rand(12).double() for _ in range(3)]
    torch.library.opcheck(
        affine.cross_entropy_op,
        ([hidden], weight, bias, torch.rand(11), LABELS, rows, -100, "", *options[1:], [True] * 3, "torch"),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_second_derivatives_are_refused(function):
    inputs = small_leaves()
    with pytest.raises(RuntimeError, match="create_graph=True: longpo_ops has no second derivatives"):
        torch.autograd.grad(function(*inputs), inputs, create_graph=True)


def test_the_same_bits_again(backend, device):
    for function in FUNCTIONS:
        inputs = [t.detach().to(device).requires_grad_() for t in small_leaves(torch.float32)]
        runs = [value_and_gradients(functools.partial(function, backend=backend), inputs) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_what_cannot_be_is_refused():
    hidden, weight, _ = small_leaves(torch.float32)
    with pytest.raises(ValueError, match=r"outputs=\('entropies',\): expected a tuple of some of entropy"):
        linear_logprobs(hidden, weight, LABELS, outputs=("entropies",))
    with pytest.raises(ValueError, match=r"label_smoothing=1.0: expected a number in"):
        linear_cross_entropy(hidden, weight, LABELS, label_smoothing=1.0)
    with pytest.raises(ValueError, match="class_weights requires a gradient"):
        linear_cross_entropy(hidden, weight, LABELS, class_weights=torch.ones(11, requires_grad=True))
    with pytest.raises(ValueError, match=r"outputs: 'predicted' with V=16777217"):
        linear_logprobs(hidden[:, :1], torch.empty(1, 1).expand((1 << 24) + 1, 1), LABELS, outputs=("predicted",))
