"""An objective of one's own: what it computes wherever it is called, and what is refused when it is made."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from longpo_ops import DPO, KTO, Answers, Objective, fused_preference_loss, packed_objective_loss
from longpo_ops.ops import truth
from longpo_ops.ops.objective import ANCHOR, ANSWER, CHOSEN, REJECTED, decide
from tests.budget import check_budget

N, V, H = 40, 29, 8
LABELS = torch.arange(N) * 7 % V
SEQUENCES = torch.where(torch.arange(N) % 5 == 4, -1, torch.arange(N) // 5 % 6)  # answers 0 to 5, 32 rows
REFS = torch.linspace(-18, -12, 6)


@dataclass(frozen=True, kw_only=True)
class Threes(Objective):
    """A chosen, a rejected and an anchor answer; an int and a bool among the fields."""

    forms: ClassVar = (("chosen", "rejected", "anchor"),)
    one_rejected: ClassVar = True
    beta: float = 0.1
    power: int = 2
    absolute: bool = True

    def losses(self, answers: Answers) -> Tensor:
        chosen, rejected = answers.pairs(self.beta * answers.log_ratios)
        apart = chosen - self.beta * answers.anchors(answers.log_ratios)
        return -F.logsigmoid(chosen - rejected) + (apart.abs() if self.absolute else apart) ** self.power


@dataclass(frozen=True, kw_only=True)
class OnceMore(DPO):
    """DPO again, whose written-out slopes are not of these losses: autograd's are taken."""

    def losses(self, answers: Answers) -> Tensor:
        return 2 * super().losses(answers)


def leaves(dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in ((N, H), (V, H))]


def ours(hidden, weight, objective, **more):
    groups, roles = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([CHOSEN, REJECTED, ANCHOR, REJECTED, ANCHOR, CHOSEN])
    if isinstance(objective, KTO):
        groups, roles = torch.arange(6), torch.tensor([CHOSEN, REJECTED, REJECTED, CHOSEN, CHOSEN, CHOSEN])
    given = dict(
        groups=groups,
        roles=roles,
        num_groups=6 if isinstance(objective, KTO) else 2,
        ref_logps=REFS,
        objective=objective,
    )
    return packed_objective_loss(hidden, weight, LABELS, SEQUENCES, **given | more)


def plain(hidden, weight, objective, nll_weights=None):
    """By full logits and autograd alone."""
    logps = truth.logprobs(hidden, weight, LABELS).double()
    member = torch.arange(6)[:, None] == SEQUENCES
    ratios = torch.where(member, logps, 0.0).sum(1) - REFS.double()
    if isinstance(objective, KTO):
        good = torch.tensor([True, False, False, True, True, True])
        signed = torch.where(good, 1.0, -1.0).double() * objective.beta * (ratios - objective.kl)
        losses = 1 - torch.sigmoid(signed)
    else:
        (w, l, a), (x, y, z) = ratios[:3], ratios[[5, 3, 4]]
        w, l, a = torch.stack([w, x]), torch.stack([l, y]), torch.stack([a, z])
        losses = -F.logsigmoid(objective.beta * (w - l)) + (objective.beta * (w - a)).abs() ** objective.power
    nll = 0.0 if nll_weights is None else (nll_weights * -logps).sum()
    return objective.preference_weight * losses.mean() + nll / len(losses)


def with_gradients(loss, inputs):
    return loss.detach(), *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("rows", [4, 16, 100])  # scored first, some groups or all in one visit
@pytest.mark.parametrize("objective", [Threes(beta=0.3), KTO(beta=0.2, kl=0.4)], ids=repr)
def test_groups_of_any_roles_against_full_logits(objective, rows, workspace):
    inputs, weights = leaves(), torch.linspace(0, 1, N, dtype=torch.float64)
    out = ours(*inputs, objective, nll_weights=weights, workspace_bytes=workspace(inputs[1], rows), backend="torch")
    loss = plain(*inputs, objective, weights)
    for a, b in zip(with_gradients(out.loss, inputs), with_gradients(loss, inputs)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert out.logps.shape == out.rewards.shape == (6,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_within_the_error_budget_on_every_backend(dtype, backend, device):
    objective, runs = Threes(), []
    for seed in range(8):
        torch.manual_seed(seed)
        inputs = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in ((N, H), (V, H))]
        wide = [x.detach().double().requires_grad_() for x in inputs]
        results = (
            with_gradients(ours(*inputs, objective, backend=backend).loss, inputs),
            with_gradients(plain(*inputs, objective), inputs),
            with_gradients(plain(*wide, objective), wide),
        )
        runs.append(results)
    for name, *results in zip(("loss", "hidden", "weight"), *(zip(*part) for part in zip(*runs))):
        check_budget(name, *results)


# -- wherever it is called -------------------------------------------------------------------------------------------


class Silent(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def _refuse_to_pack(tensor):
    raise AssertionError("the caller's hooks saw a tensor of the objective")


PLACES = {
    "autocast": (lambda f: f, lambda: torch.autocast("cpu", torch.bfloat16)),
    "checkpoint": (lambda f: lambda *x: checkpoint(f, *x, use_reentrant=False), nullcontext),
    "save_on_cpu": (lambda f: f, torch.autograd.graph.save_on_cpu),
    "dispatch mode": (lambda f: f, Silent),
    "compile": (lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"), nullcontext),
    "thread": (lambda f: lambda *x: ThreadPoolExecutor(1).submit(f, *x).result(), nullcontext),
}


@pytest.mark.parametrize("place", PLACES)
def test_slopes_are_right_wherever_it_is_called(place):
    torch._dynamo.reset()
    wrap, context = PLACES[place]
    inputs = leaves()
    with context():
        out = wrap(lambda h, w: ours(h, w, Threes()).loss)(*inputs)
        found = with_gradients(out, inputs)
    for a, b in zip(found, with_gradients(plain(*inputs, Threes()), inputs)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_values_without_gradients(off):
    with off():
        inputs = [x.detach() for x in leaves()]
        out = ours(*inputs, Threes())
        assert not out.loss.requires_grad
        torch.testing.assert_close(out.loss, plain(*inputs, Threes()), rtol=1e-12, atol=0)


def test_saved_tensors_of_an_objective_pass_no_hooks_of_the_caller():
    answers = Answers.of(
        torch.randn(2).double(), torch.ones(2), torch.zeros(2), torch.zeros(2).long(), torch.arange(2), 1
    )
    with torch.autograd.graph.saved_tensors_hooks(_refuse_to_pack, _refuse_to_pack):
        assert decide(OnceMore(), answers).slopes.any()


def test_slopes_of_a_class_above_are_not_taken_for_other_losses():
    answers = Answers.of(
        torch.randn(2).double(), torch.ones(2), torch.zeros(2), torch.zeros(2).long(), torch.arange(2), 1
    )
    torch.testing.assert_close(decide(OnceMore(), answers).slopes, 2 * decide(DPO(), answers).slopes)


def test_a_second_class_of_a_name_is_refused_and_the_same_one_anew_is_taken():
    def make(**names):
        return type("Mine", (DPO,), {"__module__": __name__, "__qualname__": "Mine", **names})

    make(), make()
    with pytest.raises(ValueError, match="objective 'dpo'"):
        make(name="dpo")


def test_an_objective_of_a_script(tmp_path):
    """__main__ has it, and nobody imports it."""
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom dataclasses import dataclass\nfrom longpo_ops import Objective, fused_preference_loss\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Mine(Objective):\n    beta: float = 0.5\n"
        "    def losses(self, answers):\n        w, l = answers.pairs(answers.log_ratios)\n"
        "        return answers.mean_over_rejected((self.beta * (w - l) - 1).square())\n"
        "h, y, r = torch.randn(2, 1, 4, 8), torch.ones(1, 4).long(), torch.zeros(1)\n"
        "h.requires_grad_()\n"
        "out = fused_preference_loss(h[0], h[1], torch.randn(9, 8), y, y, ref_chosen_logps=r, ref_rejected_logps=r,\n"
        "                            objective=Mine())\n"
        "out.loss.backward()\nprint(Mine.name, bool(h.grad.any()))\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, tmp_path / "mine.py"], capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["__main__:Mine", "True"], done.stderr


# -- what is refused -------------------------------------------------------------------------------------------------


def objective(losses, **names):
    """Made of a function (self, answers)."""
    namespace = {"losses": losses, "__module__": __name__, "__qualname__": f"Made{len(MADE)}", **names}
    MADE.append(type("Made", (Objective,), namespace))
    return MADE[-1]


MADE: list[type] = []
chosen_ratios = lambda a: a.chosen(a.log_ratios)  # noqa: E731


@pytest.mark.parametrize(
    "losses, names, words",
    [
        (lambda s, a: chosen_ratios(a).mean(), {}, ["its losses of 5", "(G,)"]),
        (lambda s, a: a.log_ratios, {}, ["its losses of 5", "have the shape (12,)"]),
        (lambda s, a: chosen_ratios(a) / 0, {}, ["its losses are", "finite"]),
        (lambda s, a: (chosen_ratios(a) - chosen_ratios(a).detach()).sqrt(), {}, ["its slopes are", "finite"]),
        (lambda s, a: torch.ones(a.count), {}, ["do not depend on the log-probs"]),
        (lambda s, a: chosen_ratios(a).detach(), {}, ["do not depend on the log-probs"]),
        (lambda s, a: 3.0, {}, ["expected a floating-point tensor, got float"]),
        (lambda s, a: chosen_ratios(a) - chosen_ratios(a).mean(), {}, ["its loss of a group alone", "separable"]),
        (lambda s, a: chosen_ratios(a) / a.count, {}, ["its loss of a group alone", "separable"]),
        (lambda s, a: chosen_ratios(a), {"slopes": lambda s, a: a.logps}, ["its slopes are", "as autograd has them"]),
        (lambda s, a: chosen_ratios(a), {"rewards": lambda s, a: chosen_ratios(a)}, ["its rewards", "(K,)"]),
        (lambda s, a: chosen_ratios(a), {"forms": (("chosen", "worst"),)}, ["forms has ['worst']", "anchor"]),
    ],
)  # fmt: skip
def test_what_does_not_do_what_it_declares_is_refused_when_it_is_made(losses, names, words):
    with pytest.raises(ValueError) as failure:
        objective(losses, **names)()
    assert all(word in str(failure.value) for word in words), failure.value


def test_what_sees_other_groups_is_taken_when_it_says_so(workspace):
    together = objective(lambda s, a: chosen_ratios(a) - chosen_ratios(a).mean().square(), separable=False)()
    inputs = leaves()
    found = [
        ours(*inputs, together, roles=torch.tensor([0, 1, 1, 1, 1, 0]), workspace_bytes=workspace(inputs[1], rows)).loss
        for rows in (4, 100)
    ]
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            dict(groups=torch.tensor([0, 0, 0, 0, 1, 1])),
            ["group 0 of 2", "1 chosen, 2 rejected, 1 anchor", "chosen + rejected + anchor"],
        ),
        (dict(num_groups=3), ["group 2 of 3 has no sequence"]),
        (dict(groups=torch.tensor([0, 0, 0, 2, 2, 2])), ["groups: 0 to 2", "group < G=2"]),
        (dict(roles=torch.tensor([0, 1, 4, 1, 3, 0])), ["roles: 0 to 4", "3 (anchor)"]),
        (dict(roles=torch.tensor([0, 1, ANSWER, 1, 3, 0])), ["1 chosen, 1 rejected, 1 answer"]),
        (dict(groups=torch.zeros(0).long()), ["groups.shape=(0,)", "(K,)"]),
        (dict(roles=torch.zeros(5).long()), ["roles.shape=(5,)", "(6,)"]),
        (dict(ref_logps=None), ["ref_logps is missing"]),
        (dict(ref_logps=REFS.index_fill(0, torch.tensor([4]), torch.inf)), ["ref_logps: inf at 4"]),
        (dict(objective="longpo"), ["group 0 of 2", "as objective longpo takes"]),
        (dict(denominator=0), ["denominator=0"]),
    ],
)  # fmt: skip
def test_wrong_groups_are_refused(change, words):
    with pytest.raises(ValueError) as failure:
        ours(*leaves(), **{"objective": Threes()} | change)
    assert all(word in str(failure.value) for word in words), failure.value


def test_pairs_are_refused_where_an_objective_takes_none():
    hidden, labels, refs = torch.randn(2, 3, H), torch.ones(2, 3).long(), torch.zeros(2)
    with pytest.raises(ValueError, match="no pairs; use packed_objective_loss"):
        fused_preference_loss(
            hidden,
            hidden,
            torch.randn(V, H),
            labels,
            labels,
            ref_chosen_logps=refs,
            ref_rejected_logps=refs,
            objective="kto",
        )
