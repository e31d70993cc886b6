"""Preference losses against full logits in float64, and everything a caller may do to them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longpo_ops import (
    DPO,
    IPO,
    LOGO,
    ORPO,
    Hinge,
    KTOPair,
    LongPO,
    SimPO,
    fused_preference_loss,
    packed_preference_loss,
)
from longpo_ops.ops import reference
from longpo_ops.ops.products import Products

from .budget import DRAWS, check_budget, check_mean_budget

OBJECTIVES = {
    "longpo": LongPO(),
    "dpo": DPO(beta=0.3, label_smoothing=0.1, preference_weight=0.5),
    "hinge": Hinge(beta=0.2),
    "ipo": IPO(),
    "ipo average": IPO(average=True),
    "kto_pair": KTOPair(),
    "simpo": SimPO(),
    "logo": LOGO(),
    "orpo": ORPO(lam=0.5),
}
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
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def supported(objective, option) -> bool:
    return "pair" not in OPTIONS[option] or not objective.one_rejected


class Case:
    """B = 3 pairs with prompts of different lengths, and what to call the loss with."""

    def __init__(
        self, objective, dtype, device="cpu", *, bias=False, nll=True, pair=None, V=37, H=16, T=(11, 9), **options
    ):
        b, r = 3, 3 if pair is None else len(pair)
        tc, tr = T
        self.objective, self.options = objective, options
        self.pair = None if pair is None else torch.tensor(pair)
        draw = lambda *shape, size=1.0: (size * torch.randn(*shape)).to(device, dtype)  # noqa: E731
        self.tensors = [draw(b, tc, H), draw(r, tr, H), draw(V, H, size=H**-0.5), draw(V) if bias else None]
        self.chosen, self.rejected = torch.randint(V, (b, tc)), torch.randint(V, (r, tr))
        self.nll = self.chosen.clone() if nll else None
        for labels, width in ((self.chosen, tc), (self.rejected, tr)):
            for row in range(len(labels)):
                labels[row, : width - 2 - row % 3] = -100  # 2 to 4 answer tokens
        if nll:
            self.nll[0, :3] = -100
            self.nll[2, -2:] = -100  # answer tokens without NLL
        self.refs = {}
        if objective.needs_reference:
            self.refs = dict(ref_chosen_logps=-10 + torch.randn(b), ref_rejected_logps=-10 + torch.randn(r))

    def redraw(self):
        self.tensors = [
            None if t is None else (torch.randn(t.shape) * t.float().std().cpu()).to(t) for t in self.tensors
        ]

    def leaves(self, dtype=None):
        return [None if t is None else t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in self.tensors]

    def full_logits(self, dtype=None):
        """-> loss, sums of chosen and rejected, gradients, by plain PyTorch at that dtype."""
        chosen, rejected, weight, bias = leaves = self.leaves(dtype)
        place = lambda x: None if x is None else x.to(weight.device)  # noqa: E731
        loss, *sums = reference.preference_loss(
            chosen, rejected, weight, place(self.chosen), place(self.rejected), objective=self.objective, bias=bias,
            nll_labels=place(self.nll), rejected_pair=place(self.pair),
            **{name: place(x) for name, x in self.refs.items()}, **self.options,
        )  # fmt: skip
        loss.backward()
        return loss, *sums, *(t.grad for t in leaves if t is not None)

    def loss(self, leaves, **more):
        chosen, rejected, weight, bias = leaves
        return fused_preference_loss(
            chosen, rejected, weight, self.chosen, self.rejected, objective=self.objective, bias=bias,
            nll_labels=self.nll, rejected_pair=self.pair, **self.refs, **self.options | more,
        )  # fmt: skip

    def ours(self, leaves=None, **more):
        """-> loss, sums, gradients."""
        leaves = leaves or self.leaves()
        out = self.loss(leaves, **more)
        out.loss.backward()
        return out.loss, out.chosen_logps, out.rejected_logps, *(t.grad for t in leaves if t is not None)


NAMES = ("loss", "chosen_logps", "rejected_logps", "chosen_hidden", "rejected_hidden", "weight", "bias")


def check_case(case, draws=1, **more):
    """The budget of one case, or of the mean of several draws of its numbers."""
    runs = []
    for draw in range(draws):
        if draw:
            case.redraw()
        runs.append((case.ours(**more), case.full_logits(), case.full_logits(torch.float64)))
    for name, *results in zip(NAMES, *(zip(*part) for part in zip(*runs))):
        check_mean_budget(name, *results)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


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
    check_case(case, draws, backend=backend, workspace_bytes=rows and workspace(case.tensors[2], rows))


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
    ours = case.ours(backend="torch", workspace_bytes=rows and workspace(case.tensors[2], rows))
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
    check_case(case, DRAWS, backend=backend, workspace_bytes=rows and workspace(case.tensors[2], rows))


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
    case = Case(objective, torch.float64, V=5, H=3, T=(6, 5), bias=True, softcap=3.0)
    more = dict(backend="torch", workspace_bytes=rows and workspace(case.tensors[2], rows))
    fast = not isinstance(objective, LOGO)
    assert torch.autograd.gradcheck(lambda *leaves: case.loss(leaves, **more).loss, case.leaves(), fast_mode=fast)


def test_outputs_are_float32_detached_and_right():
    case = Case(LongPO(beta=0.2), torch.bfloat16)
    out = case.loss(case.leaves())
    for name, value in out._asdict().items():
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
        more = dict(backend="torch", workspace_bytes=rows and workspace(case.tensors[2], rows))
        with torch.no_grad():
            quiet = case.loss(case.leaves(), **more)
        loud = case.loss(case.leaves(), **more)
        assert not quiet.loss.requires_grad
        for a, b in zip(quiet, loud):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


# -- packed ----------------------------------------------------------------------------------------------------------


def pack(case, leaves, **more):
    """The same pairs as flat rows, shuffled, through packed_preference_loss."""
    chosen, rejected, weight, bias = leaves
    counts = (case.nll[:, 1:] != -100).sum(1)
    rows, labels, sequences, weights = [], [], [], []
    for k, (hidden, answers, nll) in enumerate(
        [(chosen[b], case.chosen[b], case.nll[b]) for b in range(len(chosen))]
        + [(rejected[r], case.rejected[r], torch.full_like(case.rejected[r], -100)) for r in range(len(rejected))]
    ):
        rows.append(hidden[:-1])
        labels.append(torch.where(answers[1:] == -100, nll[1:], answers[1:]))
        sequences.append(torch.where(answers[1:] == -100, -1, k))
        weights.append(
            (nll[1:] != -100) / counts[k].double() if k < len(chosen) else torch.zeros(len(answers) - 1).double()
        )
    order = torch.randperm(sum(map(len, rows)))
    pair = torch.arange(len(rejected)) if case.pair is None else case.pair
    return packed_preference_loss(
        torch.cat(rows)[order], weight, torch.cat(labels)[order], torch.cat(sequences)[order], num_chosen=len(chosen),
        rejected_pair=pair, nll_weights=torch.cat(weights)[order], objective=case.objective, bias=bias, **case.refs,
        **case.options | more,
    )  # fmt: skip


@pytest.mark.parametrize("rows", [None, 1, 7])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_packed_rows_in_any_order_equal_sequences(objective, rows, workspace):
    several = dict(pair=[0, 1, 2, 1]) if not OBJECTIVES[objective].one_rejected else {}
    case = Case(OBJECTIVES[objective], torch.float64, bias=True, num_pairs=5, **several)
    more = dict(backend="torch", workspace_bytes=rows and workspace(case.tensors[2], rows))
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


# -- nothing to do, padding, rows without weight ---------------------------------------------------------------------


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
    more = dict(backend="torch", workspace_bytes=rows and workspace(case.tensors[2], rows))
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
    more = dict(backend=backend, workspace_bytes=rows and workspace(case.tensors[2], rows))
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
        backend=backend, workspace_bytes=rows and workspace(case.tensors[2], rows)
    )
    assert loss.isnan() and weight_grad.isnan().any() and chosen_grad[1].isnan().any()
    assert rejected_grad[0].isfinite().all() and chosen_grad[0].isfinite().all()  # other pairs are left alone


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
    check_case(case, backend=backend)
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
        more = dict(backend=backend, workspace_bytes=rows and workspace(case.tensors[2], rows))
        assert same(case.ours(**more), case.ours(**more))


@pytest.mark.parametrize("rows", [None, 1])
def test_strides_do_not_matter(rows, backend, device, workspace):
    case = Case(LongPO(), torch.float32, device, bias=True)
    more = dict(backend=backend, workspace_bytes=rows and workspace(case.tensors[2], rows))
    truth = case.ours(**more)
    chosen, rejected, weight, bias = case.leaves()
    views = [
        chosen.transpose(0, 1).contiguous().transpose(0, 1),  # batch second in memory
        torch.stack([rejected, rejected], -1)[..., 1],  # every other number
        weight.t().contiguous().t(),
        torch.stack([bias, bias], -1)[:, 0],
    ]
    assert not any(v.is_contiguous() for v in views)
    out = case.loss(views, **more)
    out.loss.backward()
    grads = chosen.grad, rejected.grad, weight.grad, bias.grad
    plain = case.full_logits()
    for name, a, p, t in zip(
        NAMES, (out.loss, out.chosen_logps, out.rejected_logps, *grads), plain, case.full_logits(torch.float64)
    ):
        check_budget(name, a, p, t)
    torch.testing.assert_close(out.loss, truth[0])


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
    truth, *_ = reference.preference_loss(hidden, rejected, weight, *labels, objective=SimPO(), nll_labels=tokens)
    torch.testing.assert_close(out.loss, truth)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (out.loss, truth))):
        torch.testing.assert_close(a, b)


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
    from longpo_ops.ops.sweep import scratch_bytes

    fixed, row = scratch_bytes(case.tensors[2], torch.float64)
    got = case.ours(backend="torch", workspace_bytes=fixed + draw(1, 40) * row)
    for name, a, truth in zip(NAMES, got, case.full_logits()):
        torch.testing.assert_close(a, truth, rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


# -- what is computed ------------------------------------------------------------------------------------------------


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
    case.ours(backend="torch", workspace_bytes=rows and workspace(case.tensors[2], rows))
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
    leaves = case.leaves()
    bodies = [leaves[0] * 1, leaves[1] * 1]  # no leaves: their memory may be reused
    (case.loss([*bodies, *leaves[2:]], reuse_hidden=reuse).loss * 0.3).backward()

    def full(dtype):
        again = case.leaves(dtype)
        loss, *_ = reference.preference_loss(
            *again[:3],
            case.chosen,
            case.rejected,
            objective=case.objective,
            bias=again[3],
            nll_labels=case.nll,
            **case.refs,
        )
        return torch.autograd.grad(loss * 0.3, again)

    for name, leaf, plain, truth in zip(NAMES[3:], leaves, full(dtype), full(torch.float64)):
        check_budget(name, leaf.grad, plain, truth)


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
        logp = reference.logprobs(*leaves, labels).double()
        x = 2.0 * (logp[:4].mean() - logp[4:8].mean()) - 1.0
        loss = -1e-6 * torch.nn.functional.logsigmoid(x) - (weights * logp).sum()
        return torch.autograd.grad(loss * 65536, leaves)

    for name, a, plain, truth in zip(("hidden", "weight"), ours(), full(torch.float16), full(torch.float64)):
        check_budget(name, a, plain, truth)


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


@pytest.mark.parametrize("retain", [False, True])
def test_gradients_of_gradients_are_refused(retain):
    case = Case(LongPO(), torch.float64)
    leaves = case.leaves()
    (grad,) = torch.autograd.grad(case.loss(leaves).loss, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.square().sum().backward(retain_graph=retain)


# -- reuse_hidden ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "strided", "chunks of one", "packed"])
@pytest.mark.parametrize("rows", [None, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_reuse_hidden_gives_the_same_gradients(dtype, rows, layout, workspace):
    case = Case(LongPO(), dtype, bias=True)
    more = dict(backend="torch", workspace_bytes=rows and workspace(case.tensors[2], rows))

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
