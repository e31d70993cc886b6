"""Preference losses of unusual inputs: nothing to do, padding, rows without weight, extreme numbers, any strides."""

import math

import pytest
import torch

from benchmarks.budget import DRAWS
from longpo_ops import DPO, LongPO, SimPO, fused_preference_loss, packed_preference_loss
from longpo_ops.ops import truth

from .preference_cases import NAMES, OBJECTIVES, Case, check_case, check_draws, same


def test_an_empty_batch_costs_nothing_and_gives_zero():
    chosen, rejected = torch.randn(0, 5, 8, requires_grad=True), torch.randn(0, 4, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    labels = torch.zeros(0, 5, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.int64)
    out = fused_preference_loss(chosen, rejected, weight, *labels, objective="simpo")
    out.loss.backward()
    assert out.loss == 0 and out.chosen_logps.shape == (0,) and not weight.grad.any() and chosen.grad.shape == (0, 5, 8)


def test_packed_empty_batch():
    none = torch.zeros(0, dtype=torch.int64)
    weight = torch.randn(11, 8, requires_grad=True)
    out = packed_preference_loss(
        torch.randn(0, 8), weight, none, none, num_chosen=0, rejected_pair=none, objective="simpo"
    )
    out.loss.backward()
    assert out.loss == 0 and not weight.grad.any()


def test_nll_labels_that_label_nothing_add_nothing():
    case = Case(DPO(), torch.float64)
    case.nll = torch.full_like(case.chosen, -100)
    with_nothing = case.ours()
    case.nll = None
    assert same(with_nothing, case.ours())


@pytest.mark.parametrize("rows", [None, 1])
def test_left_and_right_padding_change_nothing(rows, workspace):
    case = Case(LongPO(), torch.float64)
    case.nll[:, 0] = -100  # nothing predicts the first token, so its label must not be handed to padding
    more = dict(backend="torch", workspace_bytes=workspace(case.tensors[2], rows))
    bare = case.ours(**more)
    pad = torch.nn.functional.pad
    for left, right in ((5, 0), (0, 4), (3, 2)):
        leaves = case.leaves()
        chosen, rejected, weight, bias = leaves
        padded = Case(LongPO(), torch.float64)
        padded.refs = case.refs
        padded.chosen, padded.rejected, padded.nll = (
            pad(x, (left, right), value=-100) for x in (case.chosen, case.rejected, case.nll)
        )
        wide = [pad(x, (0, 0, left, right), value=math.nan) for x in (chosen, rejected)]
        out = padded.loss([*wide, weight, bias], **more)
        out.loss.backward()
        got = out.loss, out.chosen_logps, out.rejected_logps, chosen.grad, rejected.grad, weight.grad
        assert same(got, bare), (left, right)


@pytest.mark.parametrize("rows", [None, 1, 6])
@pytest.mark.parametrize("objective", ["longpo", "kto_pair"])
def test_nan_in_an_unused_row_changes_no_bit(objective, rows, backend, device, workspace):
    case = Case(OBJECTIVES[objective], torch.float32, device)
    more = dict(backend=backend, workspace_bytes=workspace(case.tensors[2], rows))
    clean = case.ours(**more)
    case.tensors[0][:, -1] = case.tensors[1][:, 0] = case.tensors[0][0, :2] = (
        math.nan
    )  # neither predicts a labelled token
    assert same(case.ours(**more), clean)


@pytest.mark.parametrize("rows", [None, 1])
@pytest.mark.parametrize("where", ["answer", "nll"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_in_a_used_row_gives_nan(where, value, rows, backend, device, workspace):
    case = Case(DPO(), torch.float32, device)
    case.tensors[0][1, -2 if where == "answer" else 2, 3] = value
    loss, *_, chosen_grad, rejected_grad, weight_grad = case.ours(
        backend=backend, workspace_bytes=workspace(case.tensors[2], rows)
    )
    assert loss.isnan() and weight_grad.isnan().any() and chosen_grad[1].isnan().any()
    assert rejected_grad[0].isfinite().all() and chosen_grad[0].isfinite().all()  # other pairs are left alone


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("objective", ["longpo", "hinge", "ipo", "kto_pair"])
def test_a_reference_that_is_not_finite_is_refused_on_the_host_and_gives_nan_on_a_device(
    objective, value, backend, device
):
    """A hinge of an infinite reference was a loss of 0.0 with gradients of NaN."""
    case = Case(OBJECTIVES[objective], torch.float32, device)
    for name in case.refs:
        right = case.refs[name].clone()
        case.refs[name][1] = value
        with pytest.raises(ValueError, match=f"{name}: {value} at 1: expected finite log-probs"):
            case.ours(backend=backend)
        if device == "cuda":
            case.refs[name] = case.refs[name].cuda()
            assert case.ours(backend=backend)[0].isnan()
        case.refs[name] = right


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_logits(dtype, backend, device):
    case = Case(SimPO(), dtype, device, H=4)
    case.tensors[2].zero_()
    case.tensors[2][::2, 0], case.tensors[2][1::2, 0] = 100, -100
    for hidden in case.tensors[:2]:
        hidden[..., 0] = torch.where(torch.rand(hidden.shape[:2]) < 0.5, 100.0, -100.0).to(hidden)  # logits +-1e4
    check_case(case, backend=backend)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_minus_infinity_in_the_bias_closes_a_token(softcap, backend, device):
    case = Case(DPO(), torch.float32, device, bias=True, softcap=softcap)
    closed = [2, 7, 36]
    for labels in (case.chosen, case.rejected, case.nll):
        labels[torch.isin(labels, torch.tensor(closed))] = 0
    case.tensors[3][closed] = -math.inf
    check_case(case, DRAWS, backend=backend)
    if softcap is None:
        assert not case.ours(backend=backend)[-1][closed].any()


def test_results_do_not_depend_on_what_new_memory_holds(backend, device, workspace, monkeypatch):
    case = Case(LongPO(), torch.float32, device, bias=True, softcap=3.0)
    runs = []
    for poison in (False, True):
        if poison:
            monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
            torch.use_deterministic_algorithms(True)
        try:
            runs.append([case.ours(backend=backend, workspace_bytes=b) for b in (None, workspace(case.tensors[2], 5))])
        finally:
            torch.use_deterministic_algorithms(False)
    assert torch.utils.deterministic.fill_uninitialized_memory
    for a, b in zip(*runs):
        assert same(a, b)


@pytest.mark.quick
def test_bitwise_repeatable(backend, device, workspace):
    for rows in (None, 3):
        case = Case(LongPO(), torch.bfloat16, device, bias=True)
        more = dict(backend=backend, workspace_bytes=workspace(case.tensors[2], rows))
        assert same(case.ours(**more), case.ours(**more))


@pytest.mark.parametrize("rows", [None, 1])
def test_strides_do_not_matter(rows, backend, device, workspace):
    case = Case(LongPO(), torch.float32, device, bias=True)
    more = dict(backend=backend, workspace_bytes=workspace(case.tensors[2], rows))

    def strided():
        chosen, rejected, weight, bias = leaves = case.leaves()
        views = [
            chosen.transpose(0, 1).contiguous().transpose(0, 1),  # batch second in memory
            torch.stack([rejected, rejected], -1)[..., 1],  # every other number
            weight.t().contiguous().t(),
            torch.stack([bias, bias], -1)[:, 0],
        ]
        assert not any(v.is_contiguous() for v in views)
        out = case.loss(views, **more)
        out.loss.backward()
        return out.loss, out.chosen_logps, out.rejected_logps, *(leaf.grad for leaf in leaves)

    torch.testing.assert_close(strided()[0], case.ours(**more)[0])
    check_draws(case, DRAWS, NAMES, strided, case.full_logits)


def test_expanded_hidden_states():
    case = Case(SimPO(), torch.float64)
    row = torch.randn(1, 1, 16, dtype=torch.float64, requires_grad=True)
    leaves = case.leaves()
    out = case.loss([row.expand(3, 11, 16), *leaves[1:]])
    out.loss.backward()
    case.tensors[0] = row.detach().expand(3, 11, 16)
    torch.testing.assert_close(row.grad[0, 0], case.full_logits()[3].sum((0, 1)))


def test_labels_beyond_one_window_of_rows():
    """Sequences longer than the host reads at a time, with answers in the last window."""
    T, V, H = 70_000, 5, 2
    hidden = torch.randn(1, T, H, dtype=torch.float64, requires_grad=True)
    rejected = torch.randn(1, 4, H, dtype=torch.float64)
    weight, tokens = torch.randn(V, H, dtype=torch.float64, requires_grad=True), torch.randint(V, (1, T))
    answers = tokens.clone()
    answers[:, 10:-10] = -100
    labels = answers, torch.randint(V, (1, 4))
    out = fused_preference_loss(hidden, rejected, weight, *labels, objective="simpo", nll_labels=tokens)
    expected, *_ = truth.preference_loss(hidden, rejected, weight, *labels, objective=SimPO(), nll_labels=tokens)
    torch.testing.assert_close(out.loss, expected)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (out.loss, expected))):
        torch.testing.assert_close(a, b)
