"""Steps on the host: bitwise those on the device, however late copies come, and nothing half done."""

import gc
from functools import partial

import pytest
import torch
from torch import nn

from longpo_ops.memory import host_step, optimizer, pieces
from longpo_ops.memory.optimizer import AdamW, join

from .lanes import LateLane

STATES = ("float32", "8bit")
MASTERS = ("residue", "float32")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Weights of several pieces, pieces of several blocks, and torchao's step eager, as compiling it takes long."""
    monkeypatch.setattr(optimizer, "PIECE", 4096)
    monkeypatch.setattr(pieces, "BLOCK", 1024)
    with torch.compiler.set_stance("force_eager"):
        yield


def use(monkeypatch, lane):
    monkeypatch.setattr(optimizer, "lane_of", lambda device: lane)


def network(dtype=torch.bfloat16) -> nn.Sequential:
    """Weights of 3.5 pieces, an odd number of numbers, and one."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 112), nn.Tanh(), nn.Linear(112, 33), nn.Linear(33, 1)).to(dtype)


def set_gradients(model: nn.Module, step: int, dtype: torch.dtype | None = None) -> None:
    random = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad_dtype = dtype or p.dtype
        p.grad = torch.randn(p.shape, generator=random).to(p.grad_dtype)


def spoil(model: nn.Module) -> None:
    """What memory that was given back may hold."""
    for p in model.parameters():
        p.grad.fill_(torch.nan)


def trained(dtype=torch.bfloat16, gradients=None, **options) -> list[torch.Tensor]:
    """Weights, masters and states after three steps."""
    model = network(dtype)
    ours = AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, **options)
    for step in range(3):
        set_gradients(model, step, gradients)
        ours.step()
        spoil(model)
    return numbers_of(model, ours)


def numbers_of(model: nn.Module, ours: AdamW) -> list[torch.Tensor]:
    found = [p.detach().clone() for p in model.parameters()]
    for weight in ours.state_dict()["state"].values():
        found += [value for value in weight.values() if isinstance(value, torch.Tensor)]
    return found


def same(ours, theirs) -> bool:
    return len(ours) == len(theirs) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("master", MASTERS)
def test_copies_that_come_late_change_nothing(states, master, monkeypatch):
    use(monkeypatch, lane := LateLane())
    expected = trained(states=states, master=master)
    assert same(trained(states=states, master=master, host=True), expected)
    assert not lane.queue and lane.done == 3 * 3 * (4 + 1 + 1 + 1 + 1 + 1)  # two in and one out, a piece and step


@pytest.mark.parametrize(
    ("dtype", "gradients"),
    [
        (torch.float32, None),
        (torch.float64, None),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float64),
        (torch.float32, torch.bfloat16),
    ],
)
def test_each_dtype_crosses_as_it_is(dtype, gradients, monkeypatch):
    use(monkeypatch, LateLane())
    assert same(trained(dtype, gradients, host=True), trained(dtype, gradients))


@pytest.mark.parametrize("forgotten", ["wait", "drain"])
def test_a_forgotten_wait_would_be_seen(forgotten, monkeypatch):
    lane = LateLane()
    setattr(lane, forgotten, lambda *_: None)
    use(monkeypatch, lane)
    assert not same(trained(host=True), trained())


@pytest.mark.parametrize("states", STATES)
def test_stepping_in_backward_leaves_nothing_under_way(states, monkeypatch):
    """Each weight is the new one, and the memory of its gradient free, when its hook returns."""
    use(monkeypatch, lane := LateLane())

    def run(**options):
        model = network()
        ours = AdamW(model.parameters(), lr=1e-3, states=states, **options)
        seen = {}

        def after_the_hook(p, gradients):
            gradients.pop().fill_(torch.nan)  # what memory that was given back may hold
            seen[p] = p.detach().clone(), p.grad

        for p in model.parameters() if options else ():
            gradients = []
            p.register_hook(gradients.append)
            p.register_post_accumulate_grad_hook(partial(after_the_hook, gradients=gradients))
        for step in range(2):
            x = torch.randn(4, 128, generator=torch.Generator().manual_seed(step)).bfloat16()
            model(x).float().square().mean().backward()
            assert not lane.queue
            assert all(torch.equal(p, weight) and grad is None for p, (weight, grad) in seen.items())
            if step == 1 and options:
                return numbers_of(model, ours)  # without step(), which has nothing left to do
            ours.step()
            ours.zero_grad()
        return numbers_of(model, ours)

    assert same(run(host=True, step_in_backward=True), run())


@pytest.mark.parametrize("master", MASTERS)
def test_a_step_that_raises_leaves_weights_beside_their_masters(master, monkeypatch):
    use(monkeypatch, lane := LateLane())
    model = network()
    ours = AdamW(model.parameters(), lr=1e-3, master=master, host=True)
    set_gradients(model, 0)
    saved, weights = ours.state_dict(), [p.detach().clone() for p in model.parameters()]
    calls, step = [], ours._steps.step

    def fails(*args):
        calls.append(1)
        if len(calls) == 2 * 4 + 3:  # the third block of the third piece
            raise KeyboardInterrupt
        step(*args)

    monkeypatch.setattr(ours._steps, "step", fails)
    with pytest.raises(KeyboardInterrupt):
        ours.step()
    assert not lane.queue
    state = ours.state[model[0].weight]
    now = model[0].weight.detach().flatten()
    moved = (now != weights[0].flatten()).nonzero().max()
    assert 2 * 4096 < moved < 2 * 4096 + 2 * 1024  # two blocks of the third piece
    if master == "float32":
        assert torch.equal(now, state["master"].flatten().bfloat16())
    else:
        wide = join(now, state["residue"].flatten().view(torch.int16))
        optimizer.split(wide.clone(), again := torch.empty_like(now), torch.empty_like(now, dtype=torch.int16))
        assert torch.equal(again, now) and (wide - weights[0].flatten().float()).abs().max() < 2e-3
    for act in (ours.step, ours.state_dict):
        with pytest.raises(RuntimeError, match="a step raised midway"):
            act()
    monkeypatch.setattr(ours._steps, "step", step)
    for p, before in zip(model.parameters(), weights, strict=True):
        p.data.copy_(before)
    ours.load_state_dict(saved)
    ours.step()
    twin = network()
    other = AdamW(twin.parameters(), lr=1e-3, master=master)
    set_gradients(twin, 0)
    other.step()
    assert same(numbers_of(model, ours), numbers_of(twin, other))


def test_a_host_without_memory_for_the_rooms_is_refused_before_anything_moves(monkeypatch):
    model = network()
    ours = AdamW(model.parameters(), lr=1e-3, host=True)
    set_gradients(model, 0)
    before = [p.detach().clone() for p in model.parameters()]

    def refuses(nbytes, pinned):
        raise RuntimeError("CUDA error: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(host_step, "make_slab", refuses)
        with pytest.raises(MemoryError, match=r"refused 0.0\d+ MiB of memory.*out of memory.*host=False"):
            ours.step()
    assert same([p.detach() for p in model.parameters()], before)
    ours.step()  # nothing had begun
    assert not same([p.detach() for p in model.parameters()], before)


def test_rooms_are_shared_and_freed_with_the_optimizer(monkeypatch):
    made, freed = [], []
    monkeypatch.setattr(host_step, "free_slab", lambda slab, pinned: freed.append(slab.data_ptr()))
    make_slab = host_step.make_slab
    monkeypatch.setattr(host_step, "make_slab", lambda *args: made.append(args[0]) or make_slab(*args))
    model = network()
    ours = AdamW(model.parameters(), lr=1e-3, host=True)
    assert not made  # before the first step
    for step in range(2):
        set_gradients(model, step)
        ours.step()
    assert made == [4096 * (2 + 4)] * 2 and not freed
    del ours
    gc.collect()
    assert len(freed) == 2
