"""Per-token losses against full logits and TRL's GRPO, wherever they are called; what is refused."""

from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longpo_ops import ClippedPolicy, TokenObjective, fused_policy_loss, fused_token_loss
from longpo_ops.ops import tokens, truth
from tests.budget import check_budget

N, V, H = 40, 29, 8
LABELS = torch.where(torch.arange(N) % 7 == 3, -100, torch.arange(N) * 7 % V)
WEIGHTS = torch.linspace(0, 1, N)


@dataclass(frozen=True, kw_only=True)
class Focal(TokenObjective):
    takes: ClassVar = ("sharpness",)
    power: float = 2.0

    def losses(self, logps: Tensor, sharpness: Tensor) -> Tensor:
        return -((1 - logps.exp()) ** self.power) * logps * sharpness


POLICY = ClippedPolicy(epsilon_high=0.3, beta=0.04, delta=3.0)
OBJECTIVES = {"focal": Focal(power=1.5), "policy": POLICY, "first step": ClippedPolicy()}


DRAW = torch.Generator().manual_seed(1)
KNOWN = {"advantages": torch.randn(N, generator=DRAW), "sharpness": torch.rand(N, generator=DRAW)}
KNOWN |= {name: -3.4 + 0.5 * torch.randn(N, generator=DRAW) for name in ("old_logps", "ref_logps")}


def numbers(objective, device="cpu") -> dict[str, Tensor]:
    taken = (*objective.takes, *(objective.may_take if objective == POLICY else ()))
    return {name: KNOWN[name].to(device) for name in taken}


def leaves(dtype=torch.float64, device="cpu", seed=0):
    torch.manual_seed(seed)
    return [
        (size * torch.randn(shape)).to(device, dtype).requires_grad_()
        for shape, size in (((N, H), 1), ((V, H), 0.3), ((V,), 0.3))
    ]


def ours(objective, inputs, **more):
    hidden, weight, bias = inputs
    given = dict(row_weights=WEIGHTS, bias=bias, numbers=numbers(objective, hidden.device)) | more
    return fused_token_loss(hidden, weight, LABELS, objective=objective, **given)


def plain(objective, inputs, reduction="mean", weights=WEIGHTS, **map):
    hidden, weight, bias = inputs
    labels, weights = LABELS.to(hidden.device), weights.to(hidden.device).double()
    logps = truth.logprobs(hidden, weight, labels, bias=bias, **map).double()
    given = {name: value.double() for name, value in numbers(objective, hidden.device).items()}
    losses = torch.where(labels == -100, 0.0, objective.losses(logps, **given)) * weights
    return losses.sum() / (weights[labels != -100].sum() if reduction == "mean" else 1)


def with_gradients(loss, inputs):
    return loss.detach(), *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rows", [3, 100])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_against_full_logits(name, rows, reduction, workspace):
    objective, inputs = OBJECTIVES[name], leaves()
    scratch = workspace(inputs[1], rows)
    out = ours(objective, inputs, reduction=reduction, workspace_bytes=scratch, softcap=4.0, temperature=0.7)
    loss = plain(objective, inputs, reduction, softcap=4.0, temperature=0.7)
    for a, b in zip(with_gradients(out.loss, inputs), with_gradients(loss, inputs)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    logps = truth.logprobs(inputs[0], inputs[1], LABELS, bias=inputs[2], softcap=4.0, temperature=0.7)
    torch.testing.assert_close(out.logps, torch.where(WEIGHTS > 0, logps.detach(), 0.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_within_the_error_budget_on_every_backend(name, dtype, backend, device):
    objective, runs = OBJECTIVES[name], []
    for seed in range(8):
        inputs = leaves(dtype, device, seed)
        wide = [x.detach().double().requires_grad_() for x in inputs]
        results = (
            with_gradients(ours(objective, inputs, backend=backend).loss, inputs),
            with_gradients(plain(objective, inputs), inputs),
            with_gradients(plain(objective, wide), wide),
        )
        runs.append(results)
    for part, *results in zip(("loss", "hidden", "weight", "bias"), *(zip(*part) for part in zip(*runs))):
        check_budget(part, *results)


PLACES = {
    "autocast": (lambda f: f, lambda: torch.autocast("cpu", torch.bfloat16)),
    "checkpoint": (lambda f: lambda *x: checkpoint(f, *x, use_reentrant=False), torch.enable_grad),
    "save_on_cpu": (lambda f: f, torch.autograd.graph.save_on_cpu),
    "compile": (lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"), torch.enable_grad),
}


@pytest.mark.parametrize("place", PLACES)
def test_wherever_it_is_called(place):
    torch._dynamo.reset()
    wrap, context = PLACES[place]
    inputs = leaves()
    with context():
        found = with_gradients(wrap(lambda *x: ours(POLICY, x).loss)(*inputs), inputs)
    for a, b in zip(found, with_gradients(plain(POLICY, inputs), inputs)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_values_without_gradients(off):
    with off():
        inputs = [x.detach() for x in leaves()]
        torch.testing.assert_close(ours(POLICY, inputs).loss, plain(POLICY, inputs), rtol=1e-12, atol=0)


def test_frozen_parts_cost_no_gradient():
    hidden, weight, _ = leaves()
    out = ours(POLICY, (hidden, weight.detach(), None))
    (found,) = torch.autograd.grad(out.loss, hidden)
    (wanted,) = torch.autograd.grad(plain(POLICY, (hidden, weight, None)), hidden)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)


def test_opcheck():
    hidden, weight, bias = leaves(torch.float32)
    given = list(numbers(POLICY).values())
    torch.library.opcheck(
        tokens.token_sweep_op,
        (
            [hidden], weight, bias, LABELS, WEIGHTS[None], torch.tensor(3.0), given, "advantages,old_logps,ref_logps",
            "clipped_policy", POLICY.parameters(), -100, 1.0, 0.0, 64 << 20, torch.float32, [True] * 3, "torch",
        ),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip


# -- TRL's GRPO ------------------------------------------------------------------------------------------------------

B, P, T = 3, 2, 9  # answers, tokens of their prompts, longest answer


def by_trl(hidden, weight, kind, beta, delta, old):
    """The loss of TRL's GRPOTrainer by its own method, whose model is our head."""
    trainer = pytest.importorskip("trl").GRPOTrainer
    ids, mask, advantages, refs = grpo_batch()

    def logps_of(model, input_ids, attention_mask, logits_to_keep, **_):
        logits = (hidden @ weight.T)[:, P - 1 : -1]
        logps = logits.log_softmax(-1).gather(-1, input_ids[:, P:, None]).squeeze(-1)
        return logps, torch.zeros_like(logps), None

    whole = SimpleNamespace(reduce=lambda x, reduction: x, gather=lambda x: x, num_processes=1)
    args = SimpleNamespace(delta=delta or None, use_bias_correction_kl=False, steps_per_generation=1)
    theirs = SimpleNamespace(
        _get_per_token_logps_and_entropies=logps_of, aux_loss_enabled=False, top_entropy_quantile=1.0, beta=beta,
        off_policy_mask_threshold=None, importance_sampling_level="token", loss_type=kind, epsilon_low=0.2,
        epsilon_high=0.3, use_vllm=False, model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1,
        max_completion_length=T, accelerator=whole, args=args, _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    inputs = dict(
        prompt_ids=ids[:, :P], prompt_mask=torch.ones(B, P).long(), completion_ids=ids[:, P:], completion_mask=mask,
        advantages=advantages, num_items_in_batch=mask.sum(), ref_per_token_logps=refs,
    )  # fmt: skip
    return trainer._compute_loss(theirs, None, inputs | ({"old_per_token_logps": refs + 0.1} if old else {}))


def grpo_batch():
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(V, (B, P + T), generator=draw)
    mask = (torch.arange(T) < torch.tensor([9, 4, 6])[:, None]).long()
    return ids, mask, torch.tensor([1.3, -0.7, 0.4]), -3.4 + 0.5 * torch.randn(B, T, generator=draw)


@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize(("beta", "delta", "old"), [(0.0, 0.0, False), (0.04, 0.0, True), (0.04, 1.5, True)])
def test_equals_trls_grpo_on_the_same_batch(kind, beta, delta, old):
    torch.manual_seed(0)
    hidden, weight = torch.randn(B, P + T, H, requires_grad=True), (0.5 * torch.randn(V, H)).requires_grad_()
    ids, mask, advantages, refs = grpo_batch()
    wanted = with_gradients(by_trl(hidden, weight, kind, beta, delta, old), (hidden, weight))
    row_weights, reduction = {
        "grpo": ((1 / mask.sum(1, keepdim=True)).expand(B, T), "mean"),
        "bnpo": (None, "mean"),
        "dapo": (torch.full((B, T), 1 / mask.sum()), "sum"),
        "dr_grpo": (torch.full((B, T), 1 / (B * T)), "sum"),
    }[kind]
    out = fused_policy_loss(
        hidden[:, P - 1 : -1].flatten(0, 1), weight, torch.where(mask.bool(), ids[:, P:], -100).flatten(),
        advantages=advantages.repeat_interleave(T), old_logps=(refs + 0.1).flatten() if old else None,
        ref_logps=refs.flatten() if beta else None, epsilon_high=0.3, beta=beta, delta=delta,
        row_weights=None if row_weights is None else row_weights.flatten(), reduction=reduction,
    )  # fmt: skip
    for a, b in zip(with_gradients(out.loss, (hidden, weight)), wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# -- what is refused -------------------------------------------------------------------------------------------------

MADE: list[type] = []


def objective(losses):
    namespace = {"losses": losses, "__module__": __name__, "__qualname__": f"Made{len(MADE)}"}
    MADE.append(type("Made", (TokenObjective,), namespace))
    return MADE[-1]


@pytest.mark.parametrize(
    "losses, words",
    [
        (lambda s, x: x.sum(), ["its losses of 9 rows have the shape ()"]),
        (lambda s, x: x / 0, ["its losses are", "finite"]),
        (lambda s, x: x - x.mean(), ["its loss of row 0 changes with other rows"]),
        (lambda s, x: x.detach(), ["do not depend on the log-probs"]),
        (lambda s, x: 1, ["expected a floating-point tensor, got int"]),
    ],
)
def test_what_is_no_loss_of_a_row_is_refused_when_it_is_made(losses, words):
    with pytest.raises(ValueError) as failure:
        objective(losses)()
    assert all(word in str(failure.value) for word in words), failure.value


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(numbers={}), ["none came", "focal", "sharpness"]),
        (dict(numbers={"sharpness": WEIGHTS, "weight": WEIGHTS}), ["sharpness, weight came"]),
        (dict(numbers={"sharpness": WEIGHTS[:3]}), ["numbers['sharpness'].shape=(3,)", "(40,)"]),
        (dict(numbers={"sharpness": WEIGHTS.clone().requires_grad_()}), ["sharpness requires a gradient", "detach"]),
        (dict(objective="focal"), ["objective", "a TokenObjective"]),
        (dict(reduction="none"), ["reduction='none'", "mean, sum"]),
    ],
)
def test_wrong_arguments_are_refused(change, words):
    hidden, weight, _ = leaves()
    given = dict(objective=Focal(), numbers=numbers(Focal())) | change
    with pytest.raises(ValueError) as failure:
        fused_token_loss(hidden, weight, LABELS, **given)
    assert all(word.lower() in str(failure.value).lower() for word in words), failure.value


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(beta=0.1), ["beta=0.1", "ref_logps missing"]),
        (dict(ref_logps=WEIGHTS), ["beta=0.0", "ref_logps given"]),
        (dict(epsilon_low=1.5), ["epsilon_low=1.5", "<= 1"]),
        (dict(delta=-1.0), ["delta=-1.0", ">= 0"]),
    ],
)
def test_wrong_options_of_a_policy_are_refused(options, words):
    hidden, weight, _ = leaves()
    with pytest.raises(ValueError) as failure:
        fused_policy_loss(hidden, weight, LABELS, advantages=WEIGHTS, **options)
    assert all(word in str(failure.value) for word in words), failure.value
