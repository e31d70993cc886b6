"""AdamW and RMSprop with an exact master: bits, bitwise equality with float32 training, resume, and what is refused."""

import gc
import io
import subprocess
import sys
import weakref
from collections import defaultdict
from functools import partial

import pytest
import torch
from torch import nn

from longpo_ops.memory import optimizer as module
from longpo_ops.memory import pieces
from longpo_ops.memory.optimizer import AdamW, RMSprop, float32_gradients, join, refuse_step_in_backward, split

from .trained import equal, gradients, network, train

torchao = pytest.importorskip("torchao")


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """Small pieces, so that weights have several; torchao's step eager, as compiling it takes longer than all the tests."""
    monkeypatch.setattr(module, "PIECE", 4096)
    with torch.compiler.set_stance("force_eager"):
        yield


# -- the residue -----------------------------------------------------------------------------------------------------


def round_trip(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight, residue = torch.empty_like(values, dtype=torch.bfloat16), torch.empty_like(values, dtype=torch.int16)
    split(values.clone(), weight, residue)
    return weight, residue, join(weight, residue)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_every_low_half_of_every_kind_of_number():
    """All 65,536 low halves beside high halves of zeros, subnormals, ones, carries into the exponent, and the largest."""
    low = torch.arange(1 << 16, dtype=torch.int32)
    highs = [0x0000, 0x0001, 0x007F, 0x0080, 0x3F7F, 0x3F80, 0x3FFF, 0x4000, 0x7F7E, 0x7F7F]
    for high in [*highs, *(h - 0x8000 for h in highs)]:  # both signs
        values = (low + (high << 16)).view(torch.float32)
        weight, _, back = round_trip(values)
        assert same_bits(values, back), hex(high)
        finite = values.to(torch.bfloat16).isfinite() & weight.isfinite()
        error = (weight.double() - values.double()).abs()[finite]
        nearest = (values.to(torch.bfloat16).double() - values.double()).abs()[finite]
        assert torch.equal(error, nearest), hex(high)


def test_random_bits():
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 20,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    values = bits.view(torch.float32)
    values = values[~values.isnan()]
    assert same_bits(values, round_trip(values)[2])


def test_infinite_and_nan_stay_what_they_are():
    nans = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    weight, _, back = round_trip(torch.cat([nans, torch.tensor([torch.inf, -torch.inf])]))
    assert weight[:4].isnan().all() and back[:4].isnan().all()
    assert weight[4:].tolist() == back[4:].tolist() == [torch.inf, -torch.inf]


# -- training --------------------------------------------------------------------------------------------------------


OPTIONS = [
    dict(states=states, master=master, host=host)
    for states in ("float32", "8bit")
    for master in ("residue", "float32")
    for host in (False, True)
]


TORCHS = {AdamW: partial(torch.optim.AdamW, fused=True), RMSprop: torch.optim.RMSprop}


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("master", ["residue", "float32"])
@pytest.mark.parametrize("algorithm", TORCHS)
def test_is_bitwise_torchs_on_a_float32_copy(algorithm, master, decay, host, monkeypatch):
    monkeypatch.setattr(pieces, "BLOCK", 1000)
    model, wide = network(), network().float()
    train(model, algorithm(model.parameters(), lr=1e-3, weight_decay=decay, master=master, host=host))
    reference = TORCHS[algorithm](wide.parameters(), lr=1e-3, weight_decay=decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(reference, lambda step: 1 / (1 + step))
    for step in range(50):
        gradients(model, step)  # rounded to bfloat16, as the 16-bit model's are
        for p, q in zip(wide.parameters(), model.parameters(), strict=True):
            p.grad = q.grad.float()
        reference.step()
        scheduler.step()
    assert not equal(network(), model)
    for p, q in zip(model.parameters(), wide.parameters(), strict=True):
        weight, _, _ = round_trip(q.detach().flatten())
        assert torch.equal(p.flatten(), weight if master == "residue" else q.flatten().bfloat16())


def masters_of(model: nn.Module, optimizer) -> list[torch.Tensor]:
    """(n,) float32 of each weight."""
    found = []
    for weight in model.parameters():
        state = optimizer.state[weight]
        found.append(
            join(weight.detach().flatten(), state["residue"].flatten().view(torch.int16))
            if "residue" in state
            else state["master"].flatten()
        )
    return found


@pytest.mark.parametrize("states", ["float32", "8bit"])
def test_residue_and_float32_master_agree_wherever_they_live(states):
    """Rounding halves differs (away from zero, to even), so the masters are compared: bit by bit."""
    masters = []
    for options in (o for o in OPTIONS if o["states"] == states):
        model = network()
        optimizer = AdamW(model.parameters(), lr=1e-3, **options)
        train(model, optimizer)
        masters.append(torch.cat(masters_of(model, optimizer)))
    assert all(same_bits(masters[0], other) for other in masters[1:])


@pytest.mark.parametrize("master", ["residue", "float32"])
def test_small_steps_move_weights_that_plain_bfloat16_leaves(master):
    """2000 steps of 5e-7 all one way come to 1e-3, about one unit in the last place of a bfloat16 weight of 1/8."""

    def moved(make) -> float:
        model = nn.Linear(64, 64, bias=False).bfloat16()
        before = model.weight.detach().clone()
        optimizer = make(model.parameters(), lr=5e-7, weight_decay=0.0)
        for _ in range(2000):
            model.weight.grad = torch.ones_like(before)
            optimizer.step()
        return (model.weight.double() - before.double()).mean().item()

    torch.manual_seed(0)
    assert abs(moved(torch.optim.AdamW)) < 0.1 * 1e-3
    assert abs(moved(lambda *a, **k: AdamW(*a, **k, master=master)) + 1e-3) < 0.1 * 1e-3


RESUMED = [(AdamW, options) for options in OPTIONS] + [(RMSprop, o | {"alpha": 0.9}) for o in OPTIONS[:4]]


@pytest.mark.parametrize(("algorithm", "options"), RESUMED)
def test_resume_is_bitwise(algorithm, options):
    whole = network()
    train(whole, algorithm(whole.parameters(), lr=1e-3, **options), range(20))

    first = network()
    optimizer = algorithm(first.parameters(), lr=1e-3, **options)
    schedule = lambda step: 1 / (1 + step)  # noqa: E731
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    file = io.BytesIO()
    for step in range(20):
        if step == 10:  # a new process would go on from here
            torch.save([first.state_dict(), optimizer.state_dict(), scheduler.state_dict()], file)
            file.seek(0)
            weights, state, schedule_state = torch.load(file, weights_only=True)
            first = network(seed=1)
            first.load_state_dict(weights)
            optimizer = algorithm(first.parameters(), lr=1e-3, **options)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
            scheduler.load_state_dict(schedule_state)
            optimizer.load_state_dict(state)
        gradients(first, step)
        optimizer.step()
        scheduler.step()
    assert equal(whole, first)


def test_loaded_state_is_a_copy():
    model, twin = network(), network()
    optimizer, copy = (AdamW(m.parameters(), lr=1e-3) for m in (model, twin))
    train(model, optimizer, range(3))
    twin.load_state_dict(model.state_dict())
    copy.load_state_dict(optimizer.state_dict())
    before = [w["exp_avg"].clone() for w in optimizer.state_dict()["state"].values()]
    train(twin, copy, range(3, 6))
    after = [w["exp_avg"] for w in optimizer.state_dict()["state"].values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_states_of_8_bits_take_two_bytes_a_weight():
    model = nn.Linear(256, 256, bias=False).bfloat16()
    optimizer = AdamW(model.parameters(), lr=1e-3, states="8bit")
    gradients(model, 0)
    optimizer.step()
    state = optimizer.state_dict()["state"][0]
    kept = [state[f"{name}_{part}"] for name in ("exp_avg", "exp_avg_sq") for part in ("codes", "scale")]
    assert sum(t.nbytes for t in kept) == 2 * 256 * 256 * (1 + 4 / 256)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("algorithm", TORCHS)
def test_float32_weights_are_their_own_master(algorithm, decay):
    ours, torchs = network(torch.float32), network(torch.float32)
    optimizer = algorithm(ours.parameters(), lr=1e-3, weight_decay=decay)
    reference = TORCHS[algorithm](torchs.parameters(), lr=1e-3, weight_decay=decay)
    train(ours, optimizer)
    train(torchs, reference)
    assert equal(ours, torchs)
    for weight, state in zip(optimizer.state_dict()["state"].values(), reference.state.values(), strict=True):
        for name in weight:
            assert torch.equal(weight[name], state[name])


def test_rmsprop_keeps_one_number_a_weight():
    model = network()
    optimizer = RMSprop(model.parameters(), lr=1e-3)
    train(model, optimizer, range(1))
    kept = optimizer.state_dict()["state"].values()
    assert [weight.keys() for weight in kept] == [{"step", "residue", "square_avg"}] * 4
    assert sum(weight["square_avg"].nbytes for weight in kept) == 4 * sum(p.numel() for p in model.parameters())


def test_compiled_8_bit_steps_as_trained():
    """Without the shortcut of this file: torchao as it runs for users, in a process of its own."""
    code = """
import torch
from longpo_ops.memory.optimizer import AdamW, join
weight = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
optimizer = AdamW([weight], lr=1e-3, states="8bit")
for _ in range(3):
    weight.grad = torch.ones_like(weight)
    optimizer.param_groups[0]["lr"] /= 2
    optimizer.step()
master = join(weight.detach().flatten(), optimizer.state[weight]["residue"].flatten().view(torch.int16))
assert (master - (1 - 1e-3 * 0.875)).abs().max() < 1e-5, master
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


# -- stepping in backward, accumulation, clipping --------------------------------------------------------------------


def backward(model: nn.Module, step: int) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(step), dtype=torch.float32).bfloat16()
    model(x).float().square().mean().backward()


@pytest.mark.parametrize(
    ("algorithm", "options"), [(AdamW, OPTIONS[0]), (AdamW, OPTIONS[5]), (RMSprop, OPTIONS[0]), (RMSprop, OPTIONS[1])]
)
def test_stepping_in_backward_is_stepping_after_it(algorithm, options):
    results = []
    for early in (False, True):
        model = network()
        optimizer = algorithm(model.parameters(), lr=1e-3, step_in_backward=early, **options)
        optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does: the groups are others from here on
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(5):
            backward(model, step)
            assert early == all(p.grad is None for p in model.parameters())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        results.append(model)
    assert equal(*results) and not equal(results[0], network())


def test_no_two_gradients_live_together():
    model = network()
    optimizer = AdamW(model.parameters(), lr=1e-3, step_in_backward=True)
    most = []
    for p in model.parameters():  # runs before the optimizer's own hook of the same weight frees the gradient
        p.register_hook(lambda grad: most.append(sum(q.grad is not None for q in model.parameters())))
    backward(model, 0)
    assert most == [0, 0, 0, 0] and optimizer


def test_stepping_in_backward_looks_at_each_weight_once():
    """Each hook looked for the states of all weights: a model of n weights took n * n look-ups a step."""

    class Watched(defaultdict):
        looked_up = 0

        def __contains__(self, parameter):
            self.looked_up += 1
            return super().__contains__(parameter)

    model = network()
    optimizer = AdamW(model.parameters(), lr=1e-3, step_in_backward=True)
    backward(model, 0)
    optimizer.step()
    optimizer.state = Watched(dict, optimizer.state)
    backward(model, 1)
    assert optimizer.state.looked_up == len(list(model.parameters())) == 4


def test_weights_go_with_their_model_and_optimizer():
    """A hook that held the optimizer kept both alive for ever: a model's memory was never given back."""
    model = network()
    optimizer = AdamW(model.parameters(), lr=1e-3, step_in_backward=True)
    backward(model, 0)
    optimizer.step()
    alive = [weakref.ref(p) for p in model.parameters()]
    del model, optimizer
    gc.collect()
    assert [p for p in alive if p() is not None] == []


def test_accumulation_with_stepping_in_backward_is_an_error():
    model = network()
    optimizer = AdamW(model.parameters(), lr=1e-3, step_in_backward=True)
    backward(model, 0)
    with pytest.raises(RuntimeError, match="second backward pass before step"):
        backward(model, 1)
    assert optimizer


def test_a_weight_used_after_its_step_is_an_error_of_autograd():
    model = nn.Linear(64, 64, bias=False).bfloat16()
    optimizer = AdamW(model.parameters(), lr=1e-3, step_in_backward=True)
    x = torch.randn(4, 64, requires_grad=True).bfloat16()
    first, second = model(x).sum(), model(x).sum()
    first.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()
    assert optimizer


def test_accumulation_and_clipping_without_it():
    """Four rows with float32 gradients and clipping: bitwise what a float32 copy does with the same gradients."""
    model, wide = network(), network().float()
    float32_gradients(model.parameters())
    ours = AdamW(model.parameters(), lr=1e-3)
    reference = torch.optim.AdamW(wide.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    for step in range(5):
        for row in range(4):
            backward(model, 4 * step + row)
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        for p, q in zip(wide.parameters(), model.parameters(), strict=True):
            p.grad = q.grad.clone()
        norms = [nn.utils.clip_grad_norm_(m.parameters(), 0.01) for m in (model, wide)]
        assert norms[0] == norms[1] > 0.01
        ours.step()
        reference.step()
        ours.zero_grad()
    for p, q in zip(model.parameters(), wide.parameters(), strict=True):
        assert torch.equal(p.flatten(), round_trip(q.detach().flatten())[0])


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("norm", [0.0, 1.0])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_every_combination_is_allowed_or_refused_with_a_reason(accumulation, norm, processes, precision):
    if (accumulation, norm, processes, precision) == (1, 0.0, 1, "bf16"):
        refuse_step_in_backward(accumulation, norm, processes, precision)
        return
    reasons = {
        "gradient_accumulation_steps=4": accumulation > 1,
        "max_grad_norm=1.0": norm > 0,
        "2 processes": processes > 1,
        "fp16 scales the loss": precision == "fp16",
    }
    first = next(text for text, holds in reasons.items() if holds)
    with pytest.raises(ValueError, match=first):
        refuse_step_in_backward(accumulation, norm, processes, precision)


# -- bad input -------------------------------------------------------------------------------------------------------


def test_refusals():
    def refuses(match, model, algorithm=AdamW, **options):
        with pytest.raises(ValueError, match=match):
            algorithm(model.parameters() if isinstance(model, nn.Module) else model, **options)

    refuses("states='4bit': expected one of float32, 8bit", network(), states="4bit")
    refuses("master='none': expected one of residue, float32", network(), master="none")
    refuses("lr=-0.1: expected a finite number >= 0", network(), lr=-0.1)  # which would climb
    refuses("lr='1e-3': expected a finite number", network(), lr="1e-3")
    refuses("eps=nan", network(), eps=float("nan"))
    refuses("weight_decay=inf", network(), weight_decay=float("inf"))
    for betas in ((0.9, 1.0), (0.9,), 0.9, ("0.9", 0.99), (float("nan"), 0.9)):
        refuses("betas=.*: expected two numbers, each 0 <= beta < 1", network(), betas=betas)
    for alpha in (1.0, -0.1):
        refuses(f"alpha={alpha}: expected a number, 0 <= alpha < 1", network(), RMSprop, alpha=alpha)
    refuses("alpha=nan", network(), RMSprop, alpha=float("nan"))
    refuses("states='8bit': RMSprop has float32 states only", network(), RMSprop, states="8bit")
    refuses("lr=-0.1: expected a finite number >= 0", network(), RMSprop, lr=-0.1)
    refuses("host=1: expected True or False", network(), host=1)
    refuses(r"params: expected several, each a parameter", torch.ones(3))
    refuses(r"params\[0\]: expected a parameter", ["weight"])
    refuses("use master='float32'", network(torch.float16))
    refuses("not contiguous", [nn.Parameter(torch.randn(4, 8).t())])


def test_state_of_other_settings_or_weights_is_refused():
    model = network()
    saved = AdamW(model.parameters()).state_dict()
    with pytest.raises(ValueError, match="go on with the settings it began with"):
        AdamW(model.parameters(), states="8bit").load_state_dict(saved)
    with pytest.raises(ValueError, match=r"state of .*'AdamW'.*: expected .*'RMSprop'"):
        RMSprop(model.parameters()).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"state of .*'RMSprop'.*: expected .*'AdamW'"):
        AdamW(model.parameters()).load_state_dict(RMSprop(model.parameters()).state_dict())
    with pytest.raises(ValueError, match="state of None"):
        RMSprop(model.parameters()).load_state_dict(torch.optim.RMSprop(model.parameters()).state_dict())
    trained = AdamW(model.parameters())
    train(model, trained, range(1))
    other = nn.Sequential(nn.Linear(32, 96), nn.Tanh(), nn.Linear(96, 8)).bfloat16()
    with pytest.raises(
        ValueError, match=r"residue of \(96, 64, 2\).*expected \(96, 32, 2\) torch.uint8, for a weight of shape"
    ):
        AdamW(other.parameters()).load_state_dict(trained.state_dict())


def test_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ValueError, match="pip install 'longpo_ops\\[memory\\]'"):
        AdamW(network().parameters(), states="8bit")


def test_a_compiled_step_with_wrong_numbers_is_refused(monkeypatch):
    """Code for vectors twice as long leaves every second vector out: what inductor's cache gave on another processor."""
    weight = torch.nn.Parameter(torch.randn(64, 64).bfloat16())
    optimizer = AdamW([weight], lr=1e-3, states="8bit")
    monkeypatch.setattr(pieces, "_COMPARED", set())
    inner, weight.grad = optimizer._steps.inner(torch.empty(0)), torch.randn_like(weight)
    whole, (stand_in,) = inner.step, inner.param_groups[0]["params"]
    calls = []

    def halves():
        before = stand_in.data.clone()
        whole()
        calls.append(1)
        if len(calls) == 2:  # the first is the uncompiled one
            stand_in.data.copy_(torch.where(torch.arange(4096) % 32 >= 16, before, stand_in.data))

    before = optimizer.state_dict()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="compiled step of 8-bit states differs"):
        patch.setattr(inner, "step", halves)
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"a step raised midway.*: load the weights and the optimizer's state"):
        optimizer.step()
    optimizer.load_state_dict(before)
    optimizer.step()  # and the code of this machine is right
    assert {(4096, torch.float32, torch.device("cpu"), True)} == pieces._COMPARED


@pytest.mark.parametrize("lr", [0.0, 1e-9, 5e-7])
def test_a_small_step_that_rounds_otherwise_is_right(monkeypatch, lr):
    """At the paper's rates a step is of the size of a weight's own rounding, which compiled code does in its own order."""
    weight = torch.nn.Parameter(4 * torch.randn(64, 64))
    optimizer = AdamW([weight], lr=lr, states="8bit")
    monkeypatch.setattr(pieces, "_COMPARED", set())
    inner, weight.grad = optimizer._steps.inner(weight), torch.randn_like(weight)
    whole, (stand_in,) = inner.step, inner.param_groups[0]["params"]

    calls = []

    def rounded():
        whole()
        calls.append(1)
        if len(calls) == 2:  # the first is the uncompiled one
            stand_in.data.copy_(torch.nextafter(stand_in.data, torch.tensor(torch.inf)))

    monkeypatch.setattr(inner, "step", rounded)
    optimizer.step()
