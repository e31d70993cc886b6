"""Preference losses against full logits in float64, rows packed in any order, and properties of the formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.budget import DRAWS
from longpo_ops import DPO, LOGO, LongPO, packed_preference_loss
from longpo_ops.ops.sweep import workspace_of

from .preference_cases import DTYPES, NAMES, OBJECTIVES, Case, check_case, pack, same

# keywords of Case, of the loss, and `rows` of logits at a time
OPTIONS = {
    "default": {},
    "bias": dict(bias=True),
    "softcap": dict(softcap=3.0),
    "scale": dict(scale=0.7),
    "unshifted": dict(shift=False),
    "without nll": dict(nll=False),
    "several rejected": dict(pair=[0, 2, 1, 0, 2, 2]),
    "num_pairs": dict(num_pairs=7.5),
    "scored first": dict(rows=2),
    "everything": dict(bias=True, softcap=5.0, scale=1.3, pair=[1, 0, 2, 2], num_pairs=64, rows=12),
}


def supported(objective, option) -> bool:
    return "pair" not in OPTIONS[option] or not objective.one_rejected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_error_budget(objective, option, dtype, backend, device, workspace):
    objective, options = OBJECTIVES[objective], dict(OPTIONS[option])
    if not supported(objective, option):
        pytest.skip("takes one rejected answer per pair")
    rows = options.pop("rows", None)
    case = Case(objective, dtype, device, **options)
    draws = DRAWS if dtype == torch.float32 else 1
    check_case(case, draws, backend=backend, workspace_bytes=workspace(case.tensors[2], rows))


@pytest.mark.quick
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_float64_equals_full_logits(objective, option, workspace):
    """Where plain PyTorch is the truth itself, what is left is rounding: a few hundred operations of 1e-16 each."""
    objective, options = OBJECTIVES[objective], dict(OPTIONS[option])
    if not supported(objective, option):
        pytest.skip("takes one rejected answer per pair")
    rows = options.pop("rows", None)
    case = Case(objective, torch.float64, **options)
    ours = case.ours(backend="torch", workspace_bytes=workspace(case.tensors[2], rows))
    for name, a, truth in zip(NAMES, ours, case.full_logits()):
        torch.testing.assert_close(a, truth, rtol=1e-12, atol=1e-13, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    "sizes", [dict(V=1), dict(V=7), dict(V=1031), dict(H=96), dict(T=(2, 2), nll=False), dict(T=(90, 5))], ids=str
)
@pytest.mark.parametrize("rows", [None, 1, 5])
def test_ragged_sizes(sizes, rows, backend, device, workspace):
    if sizes.get("T") == (2, 2):  # one answer token each, the prompt the other
        case = Case(DPO(), torch.float32, device, **sizes)
        case.chosen, case.rejected = (torch.randint(37, (3, 2)) for _ in range(2))
    else:
        case = Case(DPO(), torch.float32, device, **sizes)
    check_case(case, DRAWS, backend=backend, workspace_bytes=workspace(case.tensors[2], rows))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 13, 64])
@pytest.mark.parametrize("objective", ["longpo", "logo", "kto_pair"])
def test_any_chunk_size_gives_the_same(objective, rows, workspace):
    case = Case(OBJECTIVES[objective], torch.float64, bias=True)
    whole = case.ours(backend="torch")
    for name, a, b in zip(NAMES, case.ours(backend="torch", workspace_bytes=workspace(case.tensors[2], rows)), whole):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("rows", [1, 6, None])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradcheck(objective, rows, workspace):
    objective = OBJECTIVES[objective]
    fast = not isinstance(objective, LOGO)
    case = Case(objective, torch.float64, V=5, H=3, T=(6, 5) if fast else (4, 3), bias=True, softcap=3.0)
    more = dict(backend="torch", workspace_bytes=workspace(case.tensors[2], rows))
    assert torch.autograd.gradcheck(lambda *leaves: case.loss(leaves, **more).loss, case.leaves(), fast_mode=fast)


def test_outputs_are_float32_detached_and_right():
    case = Case(LongPO(beta=0.2), torch.bfloat16)
    out = case.loss(case.leaves())
    assert out[7:] == (None, None)
    for name, value in zip(out._fields[:7], out):
        assert value.dtype == torch.float32 and value.requires_grad == (name == "loss"), name
    torch.testing.assert_close(out.loss, 0.01 * out.preference_loss + out.nll_loss)
    torch.testing.assert_close(out.chosen_rewards, 0.2 * (out.chosen_logps - case.refs["ref_chosen_logps"]))
    torch.testing.assert_close(out.rejected_rewards, 0.2 * (out.rejected_logps - case.refs["ref_rejected_logps"]))
    margins = out.chosen_rewards - out.rejected_rewards
    torch.testing.assert_close(out.preference_loss, -torch.nn.functional.logsigmoid(margins).mean())


def test_objective_by_name_equals_its_defaults():
    case = Case(LongPO(), torch.float32)
    by_object = case.ours()
    case.objective = "longpo"
    assert same(case.ours(), by_object)


def test_no_grad_gives_the_same_numbers(workspace):
    for rows in (None, 1):
        case = Case(LongPO(), torch.float64)
        more = dict(backend="torch", workspace_bytes=workspace(case.tensors[2], rows))
        with torch.no_grad():
            quiet = case.loss(case.leaves(), **more)
        loud = case.loss(case.leaves(), **more)
        assert not quiet.loss.requires_grad
        for a, b in zip(quiet, loud):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


# -- packed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [None, 1, 7])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_packed_rows_in_any_order_equal_sequences(objective, rows, workspace):
    several = dict(pair=[0, 1, 2, 1]) if not OBJECTIVES[objective].one_rejected else {}
    case = Case(OBJECTIVES[objective], torch.float64, bias=True, num_pairs=5, **several)
    more = dict(backend="torch", workspace_bytes=workspace(case.tensors[2], rows))
    leaves = case.leaves()
    out = pack(case, leaves, **more)
    out.loss.backward()
    packed = out.loss, out.chosen_logps, out.rejected_logps, *(t.grad for t in leaves)
    for name, a, b in zip(NAMES, packed, case.ours(**more)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, msg=lambda m, name=name: f"{name}: {m}")


def test_packed_multi_turn_sums_over_all_answers_of_a_conversation():
    """Eq. 13: one chosen and one rejected conversation with two answers each."""
    N, V, H = 40, 13, 8
    hidden = torch.randn(N, H, dtype=torch.float64, requires_grad=True)
    weight, labels = torch.randn(V, H, dtype=torch.float64), torch.randint(V, (N,))
    sequences = torch.full((N,), -1)
    sequences[3:8] = sequences[15:18] = 0
    sequences[22:25] = sequences[31:40] = 1
    out = packed_preference_loss(
        hidden, weight, labels, sequences, num_chosen=1, rejected_pair=torch.tensor([0]), objective=DPO(beta=0.1),
        ref_chosen_logps=torch.tensor([-20.0]), ref_rejected_logps=torch.tensor([-30.0]),
    )  # fmt: skip
    logp = (hidden @ weight.T).log_softmax(-1)[torch.arange(N), labels]
    s_w, s_l = logp[3:8].sum() + logp[15:18].sum(), logp[22:25].sum() + logp[31:40].sum()
    truth = -torch.nn.functional.logsigmoid(0.1 * ((s_w + 20) - (s_l + 30)))
    torch.testing.assert_close(out.loss, truth)
    torch.testing.assert_close(torch.autograd.grad(out.loss, hidden)[0], torch.autograd.grad(truth, hidden)[0])


# -- properties ------------------------------------------------------------------------------------------------------


def float64_case(objective, **more):
    return Case(OBJECTIVES[objective], torch.float64, **more)


@settings(max_examples=15)
@given(st.sampled_from(sorted(OBJECTIVES)), st.permutations(range(3)))
def test_the_order_of_pairs_does_not_matter(objective, order):
    case = float64_case(objective)
    before = case.loss(case.leaves(), backend="torch")
    for name in ("chosen", "rejected", "nll"):
        setattr(case, name, getattr(case, name)[order])
    case.tensors[:2] = (t[order] for t in case.tensors[:2])
    case.refs = {name: x[order] for name, x in case.refs.items()}
    after = case.loss(case.leaves(), backend="torch")
    torch.testing.assert_close(after.loss, before.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(after.chosen_logps, before.chosen_logps[list(order)], rtol=1e-13, atol=0)


@settings(max_examples=15)
@given(st.sampled_from(sorted(OBJECTIVES)), st.floats(-50, 50))
def test_a_constant_added_to_every_logit_changes_nothing(objective, constant):
    case = float64_case(objective, bias=True)
    before = case.ours(backend="torch")
    case.tensors[3] += constant
    for a, b in zip(case.ours(backend="torch"), before):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@settings(max_examples=10)
@given(st.floats(-1e4, 1e4, allow_subnormal=False).filter(bool))
def test_gradients_are_linear_in_the_upstream_gradient(factor):
    case = float64_case("longpo")
    grads = torch.autograd.grad(case.loss(leaves := case.leaves()).loss, leaves[:3])
    scaled = torch.autograd.grad(case.loss(leaves := case.leaves()).loss * factor, leaves[:3])
    for a, b in zip(scaled, grads):
        torch.testing.assert_close(a, b * factor, rtol=1e-14, atol=0)


@settings(max_examples=10)
@given(st.sampled_from(sorted(set(OBJECTIVES) - {"kto_pair"})), st.integers(1, 2))
def test_two_calls_with_the_whole_number_of_pairs_add_up_to_one(objective, cut):
    case = float64_case(objective)
    whole = case.ours(backend="torch")
    leaves, total = case.leaves(), 0.0
    for part in (slice(0, cut), slice(cut, 3)):
        piece = float64_case(objective)
        piece.chosen, piece.rejected, piece.nll = case.chosen[part], case.rejected[part], case.nll[part]
        piece.refs = {name: x[part] for name, x in case.refs.items()}
        loss = piece.loss([leaves[0][part], leaves[1][part], *leaves[2:]], num_pairs=3, backend="torch").loss
        loss.backward()
        total += loss.detach()
    for a, b in zip((total, *(t.grad for t in leaves[:3])), (whole[0], *whole[3:])):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@settings(max_examples=25)
@given(st.data())
def test_any_layout_equals_full_logits(data):
    """Pairs, lengths, labels, weights and chunk sizes drawn at random, packed and unpacked."""
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    objective = OBJECTIVES[data.draw(st.sampled_from(sorted(OBJECTIVES)))]
    b, tc, tr, V, H = draw(1, 4), draw(2, 12), draw(2, 12), draw(1, 20), draw(1, 9)
    pair = list(range(b)) + ([draw(0, b - 1) for _ in range(draw(0, 3))] if not objective.one_rejected else [])
    r = len(pair)
    torch.manual_seed(draw(0, 1000))
    case = Case.__new__(Case)
    case.objective, case.options, case.pair = objective, dict(shift=data.draw(st.booleans())), torch.tensor(pair)
    random = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    case.tensors = [random(b, tc, H), random(r, tr, H), random(V, H), random(V) if data.draw(st.booleans()) else None]
    tokens = torch.randint(V, (b, tc)), torch.randint(V, (r, tr))
    case.chosen, case.rejected = (torch.where(torch.rand(x.shape) < 0.5, x, -100) for x in tokens)
    case.chosen[:, -1], case.rejected[:, -1] = tokens[0][:, -1], tokens[1][:, -1]
    case.nll = torch.where(torch.rand(b, tc) < 0.7, tokens[0], -100)
    case.nll[:, -1] = tokens[0][:, -1]
    case.refs = dict(ref_chosen_logps=random(b), ref_rejected_logps=random(r)) if objective.needs_reference else {}
    scratch = workspace_of(draw(1, 40), case.tensors[2], torch.float64)
    got = case.ours(backend="torch", workspace_bytes=scratch)
    for name, a, truth in zip(NAMES, got, case.full_logits()):
        torch.testing.assert_close(a, truth, rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
