"""A sparse hidden gradient against the whole product: what it loses, what it leaves exact, when it takes all columns."""

import pytest
import torch

import longpo_ops
from longpo_ops.ops.dispatch import choose_backend
from longpo_ops.ops.products import Products
from longpo_ops.ops.sparse import RULE, keep_columns_, sparse_gradient

N, V, H = 150, 3001, 48
CHOSEN = dict(objective=longpo_ops.DPO(beta=0.1))


def peaked(n=N, vocab=V, width=H):
    """Hidden states, a head with its bias and labels, as a trained model has them: a Zipf law beneath, few likely tokens."""
    weight = torch.randn(vocab, width) * width**-0.5
    bias = -2.0 * torch.arange(1, vocab + 1).log()[torch.randperm(vocab)]
    topics = torch.randn(5, width)
    hidden = 1.5 * torch.randn(n, width) + 1.5 * topics[torch.arange(n) * 5 // n]
    labels = torch.multinomial((hidden @ weight.t() + bias).softmax(-1), 1).squeeze(1)
    return hidden, weight, bias, labels


def flat(n=N, vocab=V, width=H):
    hidden, weight, _, _ = peaked(n, vocab, width)
    return hidden * 0.1, weight, torch.zeros(vocab), torch.randint(vocab, (n,))


def gradient(states, g=None):
    """dZ (n, V), float32."""
    hidden, weight, bias, labels = states
    dz = (hidden @ weight.t() + bias).softmax(-1).neg_()
    dz[torch.arange(len(labels)), labels] += 1
    return dz if g is None else dz * g[:, None]


@pytest.fixture(params=["torch", "cpu"])
def tiles(request):
    try:
        return choose_backend(torch.device("cpu"), torch.float32, request.param)
    except ValueError as error:
        pytest.skip(str(error))


def keep(tiles, dz):
    return keep_columns_(dz) if tiles.name == "torch" else tiles.keep_columns_(dz)


def apart(found, truth):
    """(n,) how far each row is off, relative to its length."""
    return (found.double() - truth).norm(dim=1) / truth.norm(dim=1)


def worst(found, truth):
    return float(apart(found, truth).quantile(0.99))


WEIGHTS = {
    "alike": lambda n: torch.full((n,), 1.0 / n),
    "unequal, of both signs": lambda n: torch.randn(n) * torch.randn(n).exp() ** 3,
    "tiny": lambda n: torch.rand(n) * 1e-9,
}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_each_row_loses_less_than_by_rounding_to_bfloat16(tiles, weights):
    sparse, rounded, kept = [], [], []
    for _ in range(5):
        states = peaked()
        dz, products = gradient(states, WEIGHTS[weights](N)), Products(states[1], torch.float32, tiles.name)
        truth = dz.double() @ states[1].double()
        rounded.append(worst(dz.bfloat16().float() @ states[1], truth))
        found = keep(tiles, dz)
        kept.append(found.columns.shape[0] / V)
        sparse.append(worst(found.gradient(products), truth))
    assert 0 < max(kept) < RULE.most
    assert sum(sparse) <= sum(rounded)


def test_both_forms_keep_the_same():
    cpu = choose_backend(torch.device("cpu"), torch.float32)
    if cpu.name != "cpu":
        pytest.skip("the C++ back-end is not here")
    for dtype, n in ((torch.float32, N), (torch.bfloat16, N), (torch.float32, RULE.least_rows + 1)):
        dz = gradient(peaked(n), torch.randn(n)).to(dtype)
        pitch = torch.zeros(n, 2 * V, dtype=dtype)[:, :V]  # as 16 bits lie in a float32 tile
        pitch.copy_(dz)
        plain, ours = keep_columns_(dz.clone()), cpu.keep_columns_(pitch)
        assert torch.equal(plain.columns, ours.columns) and torch.equal(plain.dz, ours.dz)
        torch.testing.assert_close(ours.sums, plain.sums, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(ours.shares, plain.shares, rtol=1e-5, atol=1e-9)


def test_what_stands_for_dropped_columns(tiles):
    """Sums of rows are kept, where the head is ones; and rows alike but for a factor are exact with any head."""
    dz = gradient(peaked(), torch.randn(N))
    kept = keep(tiles, dz.clone())
    ones = kept.gradient(Products(torch.ones(V, 2), torch.float32, tiles.name))
    assert (ones - dz.double().sum(1, keepdim=True)).abs().max() <= 1e-6 * dz.abs().sum(1).max()
    weight = torch.randn(V, H)
    alike = dz[:1] * torch.randn(N, 1)
    truth = alike.double() @ weight.double()
    found = keep(tiles, alike.clone())
    assert found.columns.shape[0] < RULE.most * V
    assert apart(found.gradient(Products(weight, torch.float32, tiles.name)), truth).max() < 1e-5


def test_rows_of_zeros_and_of_one_number(tiles):
    dz = gradient(peaked())
    dz[3] = 0.0
    dz[5] = 0.0
    dz[5, 7] = 2.0  # a column that no other row needs
    weight, truth = torch.randn(V, H), None
    truth = dz.double() @ weight.double()
    found = keep(tiles, dz).gradient(Products(weight, torch.float32, tiles.name))
    assert (found[3] == 0).all()
    torch.testing.assert_close(found[5].double(), truth[5], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["blocks", "torch"])
def test_a_chunk_of_zeros(tiles, monkeypatch, form):
    """A clipped policy's: no column matters, and the memory that the gradient is made in holds other numbers."""
    monkeypatch.setenv("LONGPO_OPS_PRODUCTS", form)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(7.0))
    products = Products(torch.randn(V, H), torch.float32, tiles.name)
    assert (sparse_gradient(torch.zeros(N, V), products, lambda x: keep(tiles, x)) == 0).all()


@pytest.mark.parametrize("case", ["flat", "half of them flat", "few rows", "NaN", "inf"])
def test_all_columns_where_they_matter(tiles, case):
    states = flat() if case == "flat" else peaked(RULE.least_rows - 1 if case == "few rows" else N)
    dz = gradient(states)
    if case == "half of them flat":
        dz[N // 2 :] = gradient(flat())[N // 2 :]
    if case in ("NaN", "inf"):
        dz[4, 11] = float(case)
    before, products = dz.clone(), Products(states[1], torch.float32, tiles.name)
    assert keep(tiles, dz) is None and torch.equal(dz.nan_to_num(), before.nan_to_num())
    found = sparse_gradient(dz, products, lambda x: keep(tiles, x))
    assert torch.equal(found.nan_to_num(), products.hidden_gradient(before).nan_to_num())


def test_bitwise_equal_with_any_number_of_threads():
    cpu = choose_backend(torch.device("cpu"), torch.float32)
    if cpu.name != "cpu":
        pytest.skip("the C++ back-end is not here")
    dz, before, found = gradient(peaked()), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(cpu.keep_columns_(dz.clone()))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for kept in found[1:] for a, b in zip(found[0], kept, strict=True))


def test_wrong_tensors_are_refused():
    cpu = choose_backend(torch.device("cpu"), torch.float32)
    if cpu.name != "cpu":
        pytest.skip("the C++ back-end is not here")
    for dz in (torch.randn(3, 4).double(), torch.randn(4, 3).t(), torch.randn(5)):
        with pytest.raises(ValueError, match="dz must be"):
            torch.ops.longpo_cpu.keep_columns_(dz, 0.1, 0.1, 0.6, 8)
    with pytest.raises(ValueError, match=r"columns must lie in \[0, 4\)"):
        torch.ops.longpo_cpu.hidden_gradient_(
            torch.randn(2, 1), torch.randn(4, 3), torch.tensor([4]), torch.empty(2, 3)
        )


# -- through the public functions ----------------------------------------------------------------------------------------


def preference(hidden, weight, bias, labels, **options):
    half = N // 2
    sides = [hidden[:half][None], hidden[half:][None]]
    answers = [labels[:half][None], labels[half:][None]]
    refs = dict(ref_chosen_logps=torch.tensor([-400.0]), ref_rejected_logps=torch.tensor([-400.0]))
    given = dict(nll_labels=answers[0], bias=bias, shift=False, **refs, **options)
    return longpo_ops.fused_preference_loss(*sides, weight, *answers, **given).loss


def packed(hidden, weight, bias, labels, **options):
    given = dict(num_chosen=1, rejected_pair=torch.tensor([0]), objective="simpo", bias=bias, **options)
    sequences = (torch.arange(N) >= N // 2).long()
    return longpo_ops.packed_preference_loss(hidden, weight, labels, sequences, **given).loss


def policy(hidden, weight, bias, labels, **options):
    return longpo_ops.fused_policy_loss(
        hidden, weight, labels, advantages=torch.linspace(-1, 1, N), bias=bias, **options
    ).loss


def divergence(kind):
    def run(hidden, weight, bias, labels, **options):
        teacher = hidden.detach() + 0.3 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
        heads = teacher, weight.detach(), bias.detach()
        return longpo_ops.linear_kl(
            hidden, weight, *heads[:2], bias=bias, teacher_bias=heads[2], kind=kind, softcap=30.0, **options
        )

    return run


def logprobs(outputs):
    def run(hidden, weight, bias, labels, **options):
        rows = longpo_ops.linear_logprobs(hidden, weight, labels, bias=bias, outputs=outputs, **options)
        return (rows.logps + 0.1 * rows.entropy if outputs else rows).mean()

    return run


FUNCTIONS = {
    "cross-entropy": lambda h, w, b, y, **o: longpo_ops.linear_cross_entropy(h, w, y, bias=b, **o),
    "cross-entropy, smoothed": lambda h, w, b, y, **o: longpo_ops.linear_cross_entropy(
        h, w, y, bias=b, z_loss_weight=1e-3, **o
    ),
    "cross-entropy, rows": lambda h, w, b, y, **o: longpo_ops.linear_cross_entropy(
        h, w, y, bias=b, reduction="none", **o
    ).sum(),
    "preference": preference,
    "preference, hidden states reused": lambda h, w, b, y, **o: preference(h * 1, w, b, y, reuse_hidden=True, **o),
    "packed": packed,
    "policy": policy,
    "log-probs": logprobs(()),
    "log-probs and entropies": logprobs(("entropy",)),
    "reverse KL": divergence("reverse"),
    "forward KL": divergence("forward"),
    "JSD": divergence("jsd"),
}


def gradients(function, states, dtype=None, **options):
    hidden, weight, bias, labels = states
    leaves = [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in (hidden, weight, bias)]
    loss = function(*leaves, labels, **options)
    loss.backward()
    return loss.detach(), *(t.grad for t in leaves)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_public_functions(backend, function):
    """Losses and the head's gradients are those of the whole product; the hidden gradient loses what bfloat16 does."""
    states = peaked()
    call = FUNCTIONS[function]
    whole = gradients(call, states, backend=backend)
    sparse = gradients(call, states, backend=backend, sparse_hidden_gradient=True)
    for name, a, b in zip(
        ("loss", "d weight", "d bias"), whole[::2] + whole[3:], sparse[::2] + sparse[3:], strict=True
    ):
        assert torch.equal(a, b), name
    hidden = slice(0, N // 2) if function.startswith("preference") else slice(None)
    off = apart(sparse[1], whole[1].double())[hidden]
    assert not torch.equal(sparse[1], whole[1]), "nothing was dropped"
    assert float(off.median()) < 2e-3 and float(off.quantile(0.9)) < 6e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    states = peaked()
    call = FUNCTIONS["cross-entropy"]
    whole, sparse = (gradients(call, states, dtype, sparse_hidden_gradient=flag) for flag in (False, True))
    assert torch.equal(whole[2], sparse[2])
    assert float(apart(sparse[1], whole[1].double()).quantile(0.9)) < 6e-3 + 2 * torch.finfo(dtype).eps


def test_a_frozen_head_and_a_frozen_body():
    hidden, weight, bias, labels = peaked()
    for leaf in (hidden, weight):
        leaf.requires_grad_()
        longpo_ops.linear_cross_entropy(hidden, weight, labels, bias=bias, sparse_hidden_gradient=True).backward()
        assert leaf.grad.isfinite().all()
        leaf.requires_grad_(False)


def test_flat_states_have_the_exact_gradient(backend):
    states = flat()
    call = FUNCTIONS["cross-entropy"]
    whole, sparse = (gradients(call, states, backend=backend, sparse_hidden_gradient=f) for f in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(whole, sparse, strict=True))


def test_what_is_no_flag_is_refused():
    hidden, weight, _, labels = peaked()
    for function in (longpo_ops.linear_cross_entropy, longpo_ops.linear_logprobs):
        with pytest.raises(ValueError, match="sparse_hidden_gradient"):
            function(hidden, weight, labels, sparse_hidden_gradient="yes")
