"""What an optimizer keeps: saved without a trace, taken over from earlier versions, and where the scales of blocks lie."""

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DeviceMesh, DTensor, Shard
from torch.overrides import TorchFunctionMode

from longpo_ops.memory import optimizer as module
from longpo_ops.memory import pieces
from longpo_ops.memory.optimizer import SETTINGS, AdamW, RMSprop
from longpo_ops.memory.states import Blocks, Like

from .trained import equal, gradients, network, train

pytest.importorskip("torchao")


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """Small pieces, so that weights have several; torchao's step eager, as compiling it takes long."""
    monkeypatch.setattr(module, "PIECE", 4096)
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("states", ["float32", "8bit"])
@pytest.mark.parametrize("algorithm", [AdamW, RMSprop])
def test_saving_before_the_first_step_leaves_no_trace(algorithm, states):
    """torch's function steps an optimizer that has no states, with gradients of 0 at a rate of 0."""
    if algorithm is RMSprop and states == "8bit":
        return
    models = [network(), network()]
    optimizers = [algorithm(m.parameters(), lr=1e-3, weight_decay=0.1, states=states) for m in models]
    random = torch.get_rng_state()
    saved = get_optimizer_state_dict(models[0], optimizers[0])
    assert torch.equal(random, torch.get_rng_state())
    assert {float(state["step"]) for state in saved["state"].values()} == {0.0} and equal(models[0], network())
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(3))
    assert equal(*models)


def test_a_first_step_at_a_rate_of_0_counts():
    """As a warm-up's first is: its gradients are averaged, whatever its rate."""
    ours, torchs = network(torch.float32), network(torch.float32)
    optimizers = (
        AdamW(ours.parameters(), lr=0.0),
        torch.optim.AdamW(torchs.parameters(), lr=0.0, weight_decay=0.0, fused=True),
    )
    for model, optimizer in zip((ours, torchs), optimizers, strict=True):
        for step in range(3):
            gradients(model, step)
            optimizer.step()
            optimizer.param_groups[0]["lr"] = 1e-3
    assert equal(ours, torchs) and not equal(ours, network(torch.float32))


def by_pieces(optimizer) -> dict:
    """The state as versions before 2026-11-28 wrote it."""
    saved, names = optimizer.state_dict(), optimizer._steps.averages
    weights = {}
    for (i, state), p in zip(saved["state"].items(), optimizer.state, strict=True):
        n, master = p.numel(), state.get("master", state.get("residue", torch.empty(0)).view(torch.int16))
        pieces = [{"step": state["step"]} for _ in range(0, n, module.PIECE)]
        for name in names:
            values = state[name].flatten() if name in state else eight_bit(state, p, name)
            for piece, start in zip(pieces, range(0, n, module.PIECE), strict=True):
                piece[name] = values[start : start + module.PIECE]
        weights[i] = {"master": master.flatten() if p.itemsize < 4 else None, "pieces": pieces}
    groups = [{k: v for k, v in group.items() if k not in SETTINGS} for group in saved["param_groups"]]
    return {"state": weights, "param_groups": groups, "settings": dict(optimizer.settings)}


def eight_bit(state: dict, weight, name: str):
    from torchao.optim.subclass_8bit import OptimState8bit, get_qmap_signed, get_qmap_unsigned

    levels = torch.tensor(get_qmap_signed() if name == "exp_avg" else get_qmap_unsigned())
    scale = state[f"{name}_scale"].flatten()[Blocks(weight).places(slice(0, weight.numel()))]
    return OptimState8bit(state[f"{name}_codes"].flatten(), scale, levels, name == "exp_avg", dtype=torch.float32)


EARLIER = [
    (AdamW, "float32", "residue"),
    (AdamW, "8bit", "residue"),
    (AdamW, "8bit", "float32"),
    (RMSprop, "float32", "float32"),
]


@pytest.mark.parametrize(("algorithm", "states", "master"), EARLIER)
def test_states_of_earlier_versions_go_on_bitwise(algorithm, states, master):
    def make(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 128), nn.Linear(384, 32)).bfloat16()
        return model, algorithm(model.parameters(), lr=1e-3, states=states, master=master)

    model, optimizer = make(0)
    train(model, optimizer, range(3))
    again, other = make(1)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(by_pieces(optimizer))
    for m, o in ((model, optimizer), (again, other)):
        train(m, o, range(3, 6))
    assert equal(model, again)


def test_states_of_earlier_versions_that_do_not_fit_are_refused():
    model = network()
    optimizer = AdamW(model.parameters())
    train(model, optimizer, range(1))
    earlier = by_pieces(optimizer)
    named = earlier | {"settings": {"states": "float32", "master": "residue"}}  # of versions that had AdamW only
    AdamW(model.parameters()).load_state_dict(named)
    with pytest.raises(ValueError, match=r"state of .*'AdamW'.*: expected .*'RMSprop'"):
        RMSprop(model.parameters()).load_state_dict(named)
    with pytest.raises(
        ValueError, match=r"2048 numbers of exp_avg in float32.*held in 8 bits now: go on with that version"
    ):
        of_parts = earlier | {"settings": optimizer.settings | {"states": "8bit"}}
        del of_parts["state"][0]["pieces"][0]["exp_avg"], of_parts["state"][0]["pieces"][0]["exp_avg_sq"]
        of_parts["state"][0]["pieces"] = of_parts["state"][0]["pieces"][1:]
        AdamW(model.parameters(), states="8bit").load_state_dict(of_parts)
    wider = nn.Sequential(nn.Linear(65, 96), nn.Tanh(), nn.Linear(96, 8)).bfloat16()
    with pytest.raises(ValueError, match=r"master of another size for a weight of shape \(96, 65\)"):
        AdamW(wider.parameters()).load_state_dict(by_pieces(optimizer))


class Sent(TorchFunctionMode):
    """Counts tensors made of a host's numbers, which a device waits for."""

    def __init__(self):
        super().__init__()
        self.sent = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.sent += function is torch.tensor
        return function(*args, **(kwargs or {}))


def test_a_step_in_8_bits_neither_reads_from_a_device_nor_sends_numbers_to_it(monkeypatch):
    """A device that holds no numbers has none to be read; each step copied its count to the host, and 256 levels back."""
    model = network().to("meta")
    optimizer = AdamW(model.parameters(), lr=1e-3, states="8bit")
    monkeypatch.setattr(pieces, "_compare", lambda *args, **kwargs: None)  # which reads, once in a process
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        with Sent() as mode:
            optimizer.step()
    assert mode.sent == 0
    assert {(s["step"].device.type, int(s["step"])) for s in optimizer.state.values()} == {("cpu", 2)}


@pytest.mark.parametrize("algorithm", [AdamW, RMSprop])
def test_float32_states_count_where_their_step_reads_it(algorithm):
    model = network().to("meta")
    optimizer = algorithm(model.parameters(), lr=0.0)
    optimizer.step()
    assert {s["step"].device.type for s in optimizer.state.values()} == {"meta"}


@pytest.mark.parametrize("like", [Like(torch.float32), Like(torch.uint8, parts=2), Like(torch.float32, width=2)])
def test_states_on_the_host_of_a_shard_on_a_gpu_never_touch_it(like):
    """There is no GPU here that they could be made on."""
    mesh = DeviceMesh("cuda", [0], _init_backend=False, _rank=0)
    weight = DTensor.from_local(torch.empty(5, 7, device="meta"), mesh, [Shard(0)], run_check=False)
    zeros = like.zeros(weight, torch.device("cpu"))
    assert zeros.shape == like.size(weight.shape) and zeros.placements == weight.placements
    shard = zeros.to_local()
    assert shard.device.type == "cpu" and shard.dtype == like.dtype and not shard.any()


def test_blocks_of_rows_that_no_block_fits():
    """Three blocks of 256 in two rows of 384: each row has room for two scales, the fourth place stays empty."""
    weight = torch.empty(12, 384)
    assert Blocks(weight).places(slice(0, weight.numel())).tolist()[:7] == [0, 1, 2, 4, 5, 6, 8]
    assert Blocks(torch.empty(4, 512)).places(slice(512, 1536)) == slice(2, 6)
