"""Every objective: written-out slopes against autograd, values against formulas from the papers and official codes."""

import math
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.budget import DRAWS
from longpo_ops.ops.objective import ANCHOR, PAIR, Answers, Objective, decide
from longpo_ops.ops.objectives import (
    AOT,
    CPO,
    DPO,
    IPO,
    KTO,
    LOGO,
    OBJECTIVES,
    ORPO,
    APODown,
    APOZero,
    BCOPair,
    DiscoPOP,
    EXOPair,
    Hinge,
    KTOPair,
    LongPO,
    NCAPair,
    Robust,
    SimPO,
    SoLoDPO,
    SoLoORPO,
    SoLoSimPO,
    SPPOHard,
    find_objective,
    resolve_objective,
)
from longpo_ops.ops.registered import rebuild

from .preference_cases import Case, check_case

EXAMPLES = [
    LongPO(),
    DPO(beta=0.3, label_smoothing=0.2),
    DPO(beta=2.0, average=True),
    Robust(beta=0.2),
    Hinge(beta=0.5),
    IPO(beta=0.2),
    IPO(average=True),
    EXOPair(label_smoothing=0.1),
    NCAPair(),
    BCOPair(),
    SPPOHard(beta=0.4),
    APOZero(),
    APODown(),
    DiscoPOP(tau=0.5),
    KTO(beta=0.2, kl=0.7, desirable_weight=1.5),
    KTOPair(beta=0.4),
    AOT(label_smoothing=0.1),
    AOT(paired=False),
    CPO(nll_weight=0.5),
    SimPO(label_smoothing=0.1),
    LOGO(),
    ORPO(lam=0.3),
    SoLoDPO(alpha=0.7, label_smoothing=0.1),
    SoLoSimPO(beta=1.5),
    SoLoORPO(lam=0.3, alpha=4.0),
]


def draw(objective, pair=(0, 1, 2, 3), spread=3.0) -> Answers:
    """Four pairs; for answers alone as many groups as answers."""
    double = lambda n: -8 + spread * torch.randn(n, dtype=torch.float64).clamp(-2.5, 2.5)  # noqa: E731
    k, role = 4 + len(pair), torch.tensor([0] * 4 + [1] * len(pair))
    group, count = torch.tensor([0, 1, 2, 3, *pair]), 4
    if "anchor" in objective.forms[0]:
        role, group = torch.cat([role, torch.full((4,), ANCHOR)]), torch.cat([group, torch.arange(4)])
        k += 4
    if isinstance(objective, KTO):
        group, count = torch.arange(k), k
    refs = double(k) if objective.needs_reference else None
    return Answers.of(double(k), torch.randint(1, 9, (k,)).double(), refs, group, role, count)


def layouts(objective):
    return [(0, 1, 2, 3)] if objective.one_rejected else [(0, 1, 2, 3), (3, 0, 0, 1, 2, 2, 2)]


@pytest.mark.quick
@pytest.mark.parametrize("objective", EXAMPLES, ids=repr)
def test_slopes_are_the_derivatives(objective):
    for pair in layouts(objective):
        for _ in range(3):
            answers = draw(objective, pair)
            decision = decide(objective, answers)
            logps = answers.logps.clone().requires_grad_()
            losses = objective.losses(replace(answers, logps=logps))
            (truth,) = torch.autograd.grad(losses.sum(), logps)
            torch.testing.assert_close(decision.slopes, truth, rtol=1e-10, atol=1e-13)
            assert torch.equal(decision.losses, losses.detach()) and losses.shape == (answers.count,)
            assert decision.rewards.shape == logps.shape and not decision.rewards.requires_grad


@pytest.mark.parametrize("name", ["logps", "ref_logps"])
@pytest.mark.parametrize("objective", EXAMPLES, ids=repr)
def test_a_number_that_is_none_stays_none(objective, name):
    """A log-prob, and a reference on a device, where it cannot be refused without waiting."""
    answers = draw(objective)
    if getattr(answers, name) is None:
        return
    spoilt = replace(answers, **{name: getattr(answers, name).index_fill(0, torch.tensor([1]), math.nan)})
    decision = decide(objective, spoilt)
    assert decision.losses[1].isnan() or not objective.separable
    assert decision.losses.isnan().any() and decision.slopes.isnan().any()
    if objective.separable:
        assert decision.losses.isnan().sum() == 1


@pytest.mark.parametrize("objective", [o for o in EXAMPLES if not isinstance(o, DiscoPOP)], ids=repr)
@pytest.mark.parametrize("size", [0.0, 1e4, -1e4])
def test_far_apart_log_probs_give_finite_slopes(objective, size):
    answers = draw(objective)
    apart = torch.where(answers.role == 0, -abs(size) - size - 1, -abs(size) - 1).double()
    for value in decide(objective, replace(answers, logps=apart)):
        assert value.isfinite().all()


def test_orpo_at_certain_answers():
    """exp(S/n) = 1 is where the odds end: the loss stays finite and the slope beyond the clamp is the NLL's alone."""
    ones = torch.ones(2, dtype=torch.float64)
    answers = Answers.of(torch.tensor([0.0, -1.0]).double(), ones, None, torch.zeros(2).long(), torch.tensor([0, 1]), 1)
    decision = decide(ORPO(), answers)
    assert decision.losses.isfinite().all() and decision.slopes[0] == -1


@pytest.mark.parametrize("objective", [o for o in EXAMPLES if PAIR in o.forms], ids=repr)
def test_within_the_error_budget_on_every_backend(objective, backend, device):
    """Answers alone, KTO's, are test_objective.py's."""
    check_case(Case(objective, torch.float32, device), DRAWS, backend=backend)


# -- the official LongPO losses, from full logits, written without the library ---------------------------------------


def conversations(turns=2, B=3, H=12, V=29, T=20):
    """Chosen and rejected sequences with several answers each; NLL on most of the chosen sequence."""
    double = dict(dtype=torch.float64)
    hidden = torch.randn(2, B, T, H, **double)
    weight = torch.randn(V, H, **double, requires_grad=True)
    tokens = torch.randint(V, (2, B, T))
    answers, nll = torch.full_like(tokens, -100), tokens[0].clone()
    for turn in range(turns):
        start = 4 + 8 * turn
        answers[:, :, start : start + 4] = tokens[:, :, start : start + 4]
        answers[1, :, start + 4] = tokens[1, :, start + 4]  # rejected answers are longer
        nll[:, start - 2] = -100  # a role marker
    refs = -13 * turns + torch.randn(2, B, **double)
    return hidden.requires_grad_(), weight, tokens, answers, nll, refs


def official(kind, hidden, weight, answers, nll, refs, beta, lam):
    """Sums of shifted log-softmax, the loss of Eq. 12 (or its siblings), plus the mean NLL of each chosen sequence."""
    logp = F.log_softmax(hidden[:, :, :-1] @ weight.T, -1)

    def summed(which, labels):
        mask = labels != -100
        return (logp[which].gather(-1, labels.clamp(min=0)[..., None])[..., 0] * mask).sum(-1), mask.sum(-1)

    (s_w, _), (s_l, _) = summed(0, answers[0][:, 1:]), summed(1, answers[1][:, 1:])
    r_w, r_l = refs
    logits = (s_w - s_l) - (r_w - r_l)
    if kind == "sigmoid":
        losses = -F.logsigmoid(beta * logits)
    elif kind == "hinge":
        losses = torch.relu(1 - beta * logits)
    elif kind == "ipo":
        losses = (logits - 1 / (2 * beta)) ** 2
    else:
        kl_w, kl_l = (s_w - r_w).mean().clamp(min=0), (s_l - r_l).mean().clamp(min=0)
        losses = torch.cat([1 - F.sigmoid(beta * ((s_w - r_w) - kl_l)), 1 - F.sigmoid(beta * (kl_w - (s_l - r_l)))], 0)
    nll_sum, count = summed(0, nll[:, 1:])
    return lam * losses.mean() + (-nll_sum / count).mean()


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize(
    "kind, objective", [("sigmoid", LongPO), ("hinge", Hinge), ("ipo", IPO), ("kto_pair", KTOPair)]
)
def test_the_official_longpo_losses_from_full_logits(kind, objective, turns):
    from longpo_ops import fused_preference_loss

    hidden, weight, _, answers, nll, refs = conversations(turns)
    out = fused_preference_loss(
        hidden[0], hidden[1], weight, answers[0], answers[1], ref_chosen_logps=refs[0], ref_rejected_logps=refs[1],
        nll_labels=nll, objective=objective(beta=0.2, preference_weight=0.05),
    )  # fmt: skip
    truth = official(kind, hidden, weight, answers, nll, refs, 0.2, 0.05)
    torch.testing.assert_close(out.loss, truth, rtol=1e-12, atol=0)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (out.loss, truth))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_longpo_is_dpo_with_another_weight():
    answers = draw(LongPO())
    for a, b in zip(decide(LongPO(beta=0.3), answers), decide(DPO(beta=0.3), answers)):
        assert torch.equal(a, b)
    assert LongPO().preference_weight == 0.01 and DPO().preference_weight == 1


@pytest.mark.parametrize(
    "objective, formula",
    [
        (SimPO(beta=2.5, gamma=0.7), lambda w, l: -F.logsigmoid(2.5 * (w - l) - 0.7)),
        (ORPO(lam=0.4), lambda w, l: -w - 0.4 * F.logsigmoid(_log_odds(w) - _log_odds(l))),
        (LOGO(beta=3.0, gamma=0.9), lambda w, l: -F.logsigmoid(3 * (w - l) - 0.9) - 0.1 * w),
    ],
    ids=["simpo", "orpo", "logo"],
)
def test_reference_free_objectives_against_their_papers(objective, formula):
    answers = draw(objective)
    means = answers.logps / answers.lengths
    torch.testing.assert_close(objective.losses(answers), formula(means[:4], means[4:]))


@pytest.mark.parametrize("pair", [(0, 1, 2, 3), (0, 0, 1, 2, 2, 3)])
@pytest.mark.parametrize(
    "objective, base, reward",
    [
        (SoLoDPO(beta=0.3, alpha=2.0), DPO(beta=0.3), lambda s, r, n: 0.3 * (s - r)),
        (SoLoSimPO(beta=1.5, alpha=2.0), SimPO(beta=1.5), lambda s, r, n: 1.5 * s / n),
        (SoLoORPO(lam=0.4, alpha=2.0), ORPO(lam=0.4), lambda s, r, n: _log_odds(s / n)),
    ],
    ids=["dpo", "simpo", "orpo"],
)
def test_solopo_is_its_base_on_the_short_input_and_the_distance_of_the_chosen_answers_rewards(
    objective, base, reward, pair
):
    """Its slope by the anchor is +- alpha r', and 0 by it and by that part of the chosen one where the rewards are equal."""
    answers, k = draw(objective, pair), 4 + len(pair)
    cut = lambda values: values if values is None else values[:k]  # noqa: E731
    numbers = answers.logps, answers.lengths, answers.ref_logps
    alone = Answers.of(
        *map(cut, numbers), torch.tensor([0, 1, 2, 3, *pair]), torch.tensor([0] * 4 + [1] * len(pair)), 4
    )
    refs = torch.zeros(k + 4).double() if answers.ref_logps is None else answers.ref_logps
    rewards = reward(answers.logps, refs, answers.lengths)
    expected = base.losses(alone) + 2 * (rewards[:4] - rewards[k:]).abs()
    torch.testing.assert_close(objective.losses(answers), expected, rtol=1e-12, atol=1e-12)
    equal = [torch.cat([x[:k], x[:4]]) if x is not None else None for x in numbers]
    slopes = decide(objective, Answers.of(*equal, answers.group, answers.role, 4)).slopes
    torch.testing.assert_close(slopes[:k], decide(base, alone).slopes, rtol=1e-12, atol=1e-12)
    assert not slopes[k:].any()


def _log_odds(mean):
    return torch.log(mean.exp() / (1 - mean.exp()))


def test_logo_averages_rejected_answers_inside_and_the_others_outside():
    answers = draw(LOGO(), (0, 0, 1, 1, 2, 2, 3, 3))
    means = answers.logps / answers.lengths
    w, l = means[:4], means[4:].view(4, 2)
    torch.testing.assert_close(LOGO().losses(answers), -F.logsigmoid(10 * (w - l.mean(1)) - 3) - 0.1 * w)
    torch.testing.assert_close(SimPO().losses(answers), -F.logsigmoid(2 * (w[:, None] - l) - 1).mean(1))


def test_sums_and_means_go_by_group_in_any_order():
    values = torch.arange(7.0).double()
    answers = Answers.of(
        values, values, None, torch.tensor([1, 0, 1, 1, 0, 2, 2]), torch.tensor([1, 0, 0, 1, 1, 3, 0]), 3
    )
    assert answers.sums(values).tolist() == [5, 5, 11] and answers.chosen(values).tolist() == [1, 2, 6]
    assert answers.anchors(values).tolist() == [5]
    answers = replace(draw(DPO(), (3, 0, 0, 1, 2, 2, 2)), logps=torch.arange(11.0).double())
    chosen, rejected = answers.pairs(answers.logps)  # by group
    assert chosen.tolist() == [0, 0, 1, 2, 2, 2, 3] and rejected.tolist() == [5, 6, 7, 8, 9, 10, 4]
    assert answers.mean_over_rejected(rejected).tolist() == [5.5, 7, 9, 4]


# -- the objects themselves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective", [DPO(beta=1), DPO(beta=torch.tensor(1.0).numpy()[()]), IPO(average=torch.tensor(True).numpy()[()])]
)
def test_numbers_of_an_objective_are_plain(objective):
    assert {type(getattr(objective, field.name)) for field in fields(objective)} <= {float, bool}
    assert rebuild(objective.name, objective.parameters()) == objective


@pytest.mark.parametrize("objective", EXAMPLES, ids=repr)
def test_an_objective_survives_the_way_through_an_operator(objective):
    assert rebuild(objective.name, objective.parameters()) == objective
    assert resolve_objective(objective) is objective


def test_names_are_those_of_the_table():
    assert {type(objective) for objective in EXAMPLES} == set(OBJECTIVES.values())
    for name, cls in OBJECTIVES.items():
        assert resolve_objective(name) == cls() and cls.name == name


def test_objectives_are_frozen_and_named():
    with pytest.raises(FrozenInstanceError):
        DPO().beta = 2
    with pytest.raises(TypeError):
        DPO(0.1)
    assert find_objective("dpo") is find_objective("longpo_ops.ops.objectives:DPO") is DPO
    assert {f.name for f in fields(LOGO)} == {"preference_weight", "beta", "gamma", "nll_weight"}


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: DPO(beta=0), ["DPO", "beta=0", "beta > 0"]),
        (lambda: LongPO(beta=-0.1), ["LongPO", "beta=-0.1", "beta > 0"]),
        (lambda: SimPO(gamma=math.nan), ["SimPO", "gamma=nan", "finite"]),
        (lambda: IPO(beta="0.1"), ["IPO", "beta='0.1'", "finite number"]),
        (lambda: DPO(label_smoothing=0.5), ["label_smoothing=0.5", "< 0.5"]),
        (lambda: DPO(label_smoothing=-0.1), ["label_smoothing=-0.1", "0 <="]),
        (lambda: ORPO(preference_weight=-1), ["ORPO", "preference_weight=-1", ">= 0"]),
        (lambda: ORPO(lam=-0.1), ["ORPO", "lam=-0.1", ">= 0"]),
        (lambda: LOGO(nll_weight=-1.0), ["LOGO", "nll_weight=-1.0", ">= 0"]),
        (lambda: SoLoDPO(alpha=-1.0), ["SoLoDPO", "alpha=-1.0", ">= 0"]),
        (lambda: resolve_objective("ppo"), ["objective='ppo'", "longpo", "orpo"]),
        (lambda: resolve_objective(DPO), ["objective=", "expected one of"]),
        (lambda: Objective(), ["Objective()", "subclass"]),
        (lambda: EXOPair(label_smoothing=0.0), ["EXOPair", "label_smoothing=0.0", "0 <"]),
        (lambda: DiscoPOP(tau=0.0), ["tau=0.0", "tau > 0"]),
        (lambda: KTO(kl=-1.0), ["kl=-1.0", ">= 0"]),
        (lambda: find_objective("ppo"), ["objective='ppo'", "longpo", "module:Class"]),
        (lambda: find_objective("no_such_module:A"), ["no_such_module", "module:Class"]),
        (lambda: find_objective("math:pi"), ["math:pi", "subclass of longpo_ops.Objective"]),
    ],
)
def test_bad_objectives_are_refused(make, words):
    with pytest.raises(ValueError) as failure:
        make()
    assert all(word in str(failure.value) for word in words), failure.value
