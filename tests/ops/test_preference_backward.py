"""What preference losses compute, what their backward gives, and gradients written over the hidden states."""

import pytest
import torch

from benchmarks.budget import DRAWS
from longpo_ops import LongPO, SimPO, packed_preference_loss
from longpo_ops.ops import truth
from longpo_ops.ops.products import Products
from tests.budget import check_budget

from .preference_cases import DTYPES, NAMES, Case, check_draws, pack, same


@pytest.fixture
def products(monkeypatch):
    """Counts the rows that enter each product."""
    counts = dict(logits_=0, hidden_gradient=0, add_weight_gradient_=0)

    def counted(name, plain):
        def product(self, *args):
            counts[name] += args[1 if name == "add_weight_gradient_" else 0].shape[0]
            return plain(self, *args)

        return product

    for name in counts:
        monkeypatch.setattr(Products, name, counted(name, getattr(Products, name)))
    return counts


@pytest.mark.parametrize("rows", [None, 1])
def test_only_rows_with_weight_are_multiplied(rows, products, workspace):
    case = Case(LongPO(), torch.float32)
    case.ours(backend="torch", workspace_bytes=workspace(case.tensors[2], rows))
    answers = [(labels[:, 1:] != -100).sum() for labels in (case.chosen, case.rejected)]
    nll = ((case.nll[:, 1:] != -100) | (case.chosen[:, 1:] != -100)).sum() + answers[1]
    assert products["hidden_gradient"] == products["add_weight_gradient_"] == nll
    assert products["logits_"] == nll + (sum(answers) if rows else 0)  # scored first, then swept


@pytest.mark.parametrize("frozen", ["head", "body", "rejected_hidden", "everything"])
def test_frozen_parts_cost_no_product(frozen, products):
    case = Case(LongPO(), torch.float64, bias=True)
    whole = case.ours(backend="torch")
    products.update(dict.fromkeys(products, 0))
    leaves = case.leaves()
    still = {"head": [2, 3], "body": [0, 1], "rejected_hidden": [1], "everything": [0, 1, 2, 3]}[frozen]
    for i in still:
        leaves[i].requires_grad_(False)
    out = case.loss(leaves, backend="torch")
    torch.testing.assert_close(out.loss.detach(), whole[0].detach())
    assert (products["hidden_gradient"] == 0) == (frozen in ("body", "everything"))
    assert (products["add_weight_gradient_"] == 0) == (frozen in ("head", "everything"))
    if frozen == "everything":
        assert not out.loss.requires_grad
        return
    out.loss.backward()
    for i, leaf in enumerate(leaves):
        if i in still:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, whole[3 + i], rtol=1e-12, atol=1e-14)


# -- backward --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstream_gradient_within_budget(dtype, reuse):
    case = Case(LongPO(), dtype, bias=True)

    def ours():
        leaves = case.leaves()
        bodies = [leaves[0] * 1, leaves[1] * 1]  # no leaves: their memory may be reused
        (case.loss([*bodies, *leaves[2:]], reuse_hidden=reuse).loss * 0.3).backward()
        return [leaf.grad for leaf in leaves]

    def full(dtype):
        again = case.leaves(dtype)
        loss, *_ = truth.preference_loss(
            *again[:3],
            case.chosen,
            case.rejected,
            objective=case.objective,
            bias=again[3],
            nll_labels=case.nll,
            **case.refs,
        )
        return torch.autograd.grad(loss * 0.3, again)

    check_draws(case, DRAWS, NAMES[3:], ours, full)


def test_float16_with_a_loss_scale_and_tiny_weights():
    """512K labelled tokens: each weighs 2e-6, most of the softmax is 1e-3 of that, and float16 ends at 6e-8."""
    N, V, H = 512, 300, 16
    hidden, weight = torch.randn(N, H).half(), (torch.randn(V, H) / 4).half()
    labels, sequences = torch.randint(V, (N,)), torch.full((N,), -1)
    sequences[:4], sequences[4:8] = 0, 1
    weights = torch.full((N,), 1 / 524288, dtype=torch.float64)

    def ours():
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = packed_preference_loss(
            *leaves, labels, sequences, num_chosen=1, rejected_pair=torch.tensor([0]), nll_weights=weights,
            objective=SimPO(preference_weight=1e-6),
        )  # fmt: skip
        return torch.autograd.grad(out.loss * 65536, leaves)

    def full(dtype):
        leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        logp = truth.logprobs(*leaves, labels).double()
        x = 2.0 * (logp[:4].mean() - logp[4:8].mean()) - 1.0
        loss = -1e-6 * torch.nn.functional.logsigmoid(x) - (weights * logp).sum()
        return torch.autograd.grad(loss * 65536, leaves)

    for name, a, plain, expected in zip(("hidden", "weight"), ours(), full(torch.float16), full(torch.float64)):
        check_budget(name, a, plain, expected)


def test_retain_graph_gives_the_same_twice_and_no_third():
    case = Case(LongPO(), torch.float64, bias=True)
    once = case.ours()[3:]
    leaves = case.leaves()
    loss = case.loss(leaves).loss
    for count in (1, 2, 3):
        (loss * 0.5).backward(retain_graph=count < 3)
        for a, b in zip(leaves, once):
            torch.testing.assert_close(a.grad, 0.5 * count * b, rtol=1e-13, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


# -- reuse_hidden ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "strided", "chunks of one", "packed"])
@pytest.mark.parametrize("rows", [None, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_reuse_hidden_gives_the_same_gradients(dtype, rows, layout, workspace):
    case = Case(LongPO(), dtype, bias=True)
    more = dict(backend="torch", workspace_bytes=workspace(case.tensors[2], rows))

    def run(reuse):
        leaves = case.leaves()
        if layout == "chunks of one":
            both = torch.cat([leaves[0][:, :9], leaves[1]]) * 1
            bodies = list(both.chunk(2))
            case_ = Case(LongPO(), dtype, bias=True)
            case_.chosen, case_.rejected, case_.refs = case.chosen[:, 2:], case.rejected, case.refs
            case_.nll = case.nll[:, 2:]
            out = case_.loss([*bodies, *leaves[2:]], reuse_hidden=reuse, **more)
        elif layout == "packed":
            torch.manual_seed(1)
            out = pack(case, leaves, reuse_hidden=reuse, **more)
        else:
            bodies = [x.transpose(0, 1).clone().transpose(0, 1) if layout == "strided" else x * 1 for x in leaves[:2]]
            out = case.loss([*bodies, *leaves[2:]], reuse_hidden=reuse, **more)
        out.loss.backward()
        return out.loss, *(t.grad for t in leaves)

    assert same(run(True), run(False))


def test_reuse_hidden_really_writes_over_the_hidden_states():
    case = Case(LongPO(), torch.float32)
    leaves = case.leaves()
    body = leaves[0] * 1
    pointer, got = body.data_ptr(), []
    body.register_hook(lambda grad: got.append(grad))
    case.loss([body, *leaves[1:]], reuse_hidden=True).loss.backward()
    assert got[0].data_ptr() == pointer


def test_reuse_hidden_where_values_are_still_needed_is_refused_by_autograd():
    case = Case(LongPO(), torch.float32)
    leaves = case.leaves()
    body = leaves[0].tanh()  # its backward reads its own output
    out = case.loss([body, leaves[1] * 1, *leaves[2:]], reuse_hidden=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_reuse_hidden_twice_backward():
    case = Case(LongPO(), torch.float64, bias=True)
    once = case.ours()[3:]
    leaves = case.leaves()
    out = case.loss([leaves[0] * 1, leaves[1] * 1, *leaves[2:]], reuse_hidden=True)
    out.loss.backward(retain_graph=True)
    out.loss.backward()
    for a, b in zip(leaves, once):
        torch.testing.assert_close(a.grad, 2 * b, rtol=1e-12, atol=1e-14)
    with pytest.raises(RuntimeError):
        out.loss.backward()


@pytest.mark.parametrize("kind", ["expanded", "the same twice", "overlapping"])
def test_reuse_hidden_refuses_rows_that_share_memory(kind):
    case = Case(SimPO(), torch.float32, T=(9, 9))
    leaves = case.leaves()
    if kind == "expanded":
        bodies = [torch.randn(1, 1, 16, requires_grad=True).expand(3, 9, 16), leaves[1] * 1]
    elif kind == "the same twice":
        bodies = [leaves[0] * 1] * 2
    else:
        both = torch.randn(3, 14, 16, requires_grad=True) * 1
        bodies = [both[:, :9], both[:, 5:]]
    with pytest.raises(ValueError, match=r"reuse_hidden=True: .* share"):
        case.loss([*bodies, *leaves[2:]], reuse_hidden=True)


def test_reuse_hidden_takes_two_parts_of_one_tensor():
    case = Case(SimPO(), torch.float64, T=(9, 9))
    both = torch.randn(3, 18, 16, dtype=torch.float64, requires_grad=True)
    weight = case.tensors[2]
    grads = []
    for reuse in (False, True):
        body = both * 1
        out = case.loss([body[:, :9], body[:, 9:], weight, None], reuse_hidden=reuse)
        grads.append(torch.autograd.grad(out.loss, both)[0])
    assert torch.equal(*grads)
