"""Scaled exponentials against float64, interpreted: TRITON_INTERPRET=1 pytest tests/kernels/test_scaled_exps.py

The truth is the PyTorch form on a float64 tile; the budget of benchmarks/budget.py is beside plain PyTorch, whose gradients are
rounded to bfloat16 once, too. Rows are draws.
"""

import importlib.util
import math
import os

import pytest
import torch

import longpo_ops

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported, in a process of its own", allow_module_level=True)
if importlib.util.find_spec("triton") is None and os.environ.get("CI") != "true":
    pytest.skip("triton is not installed", allow_module_level=True)

from longpo_ops.kernels.launch import MatmulConfig, scaled_exps_config
from longpo_ops.kernels.scaled_exps import REACH, scaled_exps
from longpo_ops.kernels.tiles import ScaledTiles
from longpo_ops.ops import operators
from longpo_ops.ops.sweep import workspace_of
from longpo_ops.ops.tiles import LogitMap, TorchTiles
from tests.budget import check_budget

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # numpy on NaN and infinities
TORCH = TorchTiles()
TINY = MatmulConfig(16, 128, 32, 2, 4, 1, False, parts=2)  # tiles of 64 columns
MAPS = {
    "plain": lambda bias: LogitMap(),
    "bias": lambda bias: LogitMap(bias.bfloat16(), 0.7),
    "capped": lambda bias: LogitMap(bias, 1.3, 5.0),
}


def operands(n: int, V: int, H: int, dtype=torch.bfloat16, seed: int = 3, spread: float = 3.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.full((n, H + 16), math.nan, dtype=dtype)[:, :H]  # a row pitch
    hidden.copy_(torch.randn(n, H, generator=generator))
    weight = torch.randn(V, H, generator=generator).mul_(spread / H**0.5).to(dtype)
    return hidden, weight, torch.randint(0, V, (n,), generator=generator), torch.randn(V, generator=generator)


def room(n: int, V: int, gap: int = 0) -> torch.Tensor:
    return torch.full((n, V + gap), -7.0, dtype=torch.bfloat16)[:, :V]


def gradient(found, map: LogitMap, g: torch.Tensor) -> torch.Tensor:
    """dz (n, V) float32 = r E, r = -g scale / S."""
    return (-g * map.scale / found.totals)[:, None] * found.exps.float()


def check(hidden, weight, labels, map, config=TINY, gap=0):
    """Log-probs, stats and the gradient; -> what was found."""
    n, V = hidden.shape[0], weight.shape[0]
    wide = LogitMap(None if map.bias is None else map.bias.double(), map.scale, map.softcap)
    g = torch.linspace(-1, 2, n) if n > 1 else torch.ones(n)
    z = hidden.float() @ weight.float().T
    true_logps, true_dz = TORCH.logps_gradient_(
        hidden.double() @ weight.double().T, labels, g.double(), wide, torch.float64
    )
    true_stats = TORCH.logps(hidden.double() @ weight.double().T, labels, wide)[1]
    plain_stats = TORCH.logps(z, labels, map)[1]
    plain_logps, plain_dz = TORCH.logps_gradient_(z, labels, g, map, torch.bfloat16)
    memory = room(n, V, gap)
    found = scaled_exps(hidden, weight, labels, map, memory, config)
    assert found.exps.data_ptr() == memory.data_ptr()
    if gap:
        assert (torch.as_strided(memory, (n, gap), (V + gap, 1), V) == -7).all(), "a kernel wrote between the rows"
    check_budget("logps", found.logps, plain_logps, true_logps, draws=True)
    finite = true_stats.isfinite().all(1)
    sums = (stats[finite].sum(1) for stats in (found.stats, plain_stats, true_stats))
    check_budget("logsumexp", *sums, draws=True)
    check_budget("dz", gradient(found, map, g).bfloat16(), plain_dz, true_dz, draws=True)
    return found


@pytest.mark.parametrize("map_name", MAPS)
@pytest.mark.parametrize(("descriptors", "parts"), [(True, 2), (False, 2), (False, 1)])
@pytest.mark.parametrize(("n", "V", "H"), [(1, 1, 8), (5, 100, 40), (37, 333, 24), (17, 500, 64)])
def test_any_shape(n, V, H, descriptors, parts, map_name):
    hidden, weight, labels, bias = operands(n, V, H)
    check(hidden, weight, labels, MAPS[map_name](bias), TINY._replace(descriptors=descriptors, parts=parts), gap=V % 3)


@pytest.mark.parametrize(
    ("capability", "dtype", "aligned"),
    [
        *((capability, torch.bfloat16, True) for capability in (80, 90, 100)),
        (90, torch.bfloat16, False),
        (90, torch.float32, True),
    ],
)
def test_as_configured(capability, dtype, aligned):
    hidden, weight, labels, _ = operands(130, 300, 72, dtype)
    config = scaled_exps_config(capability, dtype, False, aligned)
    check(hidden, weight, labels, LogitMap(scale=0.1), config)


def test_labels_at_the_edges_of_tiles():
    hidden, weight, _, _ = operands(8, 150, 32)
    check(hidden, weight, torch.tensor([0, 63, 64, 127, 128, 149, 65, 1]), LogitMap())


def test_the_label_of_a_sure_row_keeps_its_digits():
    """1 - p from 4e-4 to 1e-11, which the difference of a 1 and a p in 8 bits would not know."""
    hidden, weight, labels, bias = operands(8, 200, 32, torch.float32)
    bias.zero_()[labels[0]] = 25.0
    found = check(hidden, weight, labels[:1].expand(8).contiguous(), LogitMap(bias))
    exact = torch.log_softmax(hidden.double() @ weight.double().T + bias.double(), 1)[:, labels[0]]
    assert exact.min() > -1e-3 and ((found.logps - exact) / exact).abs().max() < 1e-4
    own = found.exps[:, labels[0]].double() / found.totals
    assert ((own - exact.expm1()) / exact.expm1()).abs().max() < 2**-8


@pytest.mark.parametrize("large", [100.0, 1e4])
def test_large_logits(large):
    """Labels far below the row's greatest logit: tiles take their own offsets and are moved to one of the row."""
    hidden, weight, labels, _ = operands(12, 300, 32, torch.float32, spread=large)
    labels[:4] = (hidden[:4] @ weight.T).argmax(1)  # and labels that are the greatest
    found = check(hidden, weight, labels, LogitMap())
    assert found.logps.min() < -REACH.value < -1e-3 < found.logps.max()


def test_a_large_offset_costs_no_digits():
    """Logits of 1e4 and eighths, exact in float32, so that nothing but l - K ln 2 can lose any; tiles of three offsets."""
    generator = torch.Generator().manual_seed(8)
    hidden, weight = torch.ones(8, 16), torch.zeros(150, 16)
    weight[:, 0], weight[:, 1] = 1e4, torch.randint(-20, 20, (150,), generator=generator) / 8
    weight[64:128, 1] += 50
    weight[128:, 1] += 53
    labels = torch.tensor([3, 40, 63, 7, 64, 100, 130, 149])
    found = check(hidden, weight, labels, LogitMap())
    exact = (hidden.double() @ weight.double().T).log_softmax(1).gather(1, labels[:, None])[:, 0]
    assert (found.logps - exact).abs().max() < 1e-5


def test_all_tiles_out_of_reach_but_the_labels():
    hidden, weight, labels, bias = operands(20, 400, 32, spread=1.0)
    labels.fill_(10)
    bias.zero_()[64:] = 60.0
    bias[200] = 75.0
    found = check(hidden, weight, labels, LogitMap(bias))
    assert (found.exps[:, 11] > 0).all() and found.totals.max() < 1e3  # 2^-87 and less are kept


def test_rows_that_need_no_move_are_left_as_the_product_wrote_them():
    hidden, weight, labels, _ = operands(17, 333, 24)
    found = check(hidden, weight, labels, LogitMap())
    x = (hidden.double() @ weight.double().T) / math.log(2)
    offsets = x.gather(1, labels[:, None]).round()
    other = torch.arange(333) != labels[:, None]
    ratio = (found.exps.double() / torch.exp2(x - offsets))[other]
    assert (ratio - 1).abs().max() < 2**-8 + 1e-4


@pytest.mark.parametrize("map_name", ["plain", "capped"])
def test_extreme_logits(map_name):
    hidden, weight = torch.zeros(6, 16), torch.randn(200, 16, generator=torch.Generator().manual_seed(5))
    hidden[:, 0] = torch.tensor([1e4, 1.0, math.nan, 1.0, math.inf, 1.0])
    bias = torch.randn(200, generator=torch.Generator().manual_seed(6))
    bias[:64] = -math.inf  # a whole tile without probability
    bias[64:130] = torch.finfo(torch.float32).min  # and one of a mask's numbers
    labels = torch.tensor([170, 180, 5, 5, 180, 66])  # of the fourth row: no probability, log-prob -inf
    map = LogitMap(bias) if map_name == "plain" else LogitMap(bias, 1.3, 5.0)
    check(hidden, weight, labels, map)


def test_infinite_and_missing_logits():
    hidden, weight, labels = torch.ones(4, 8), torch.randn(90, 8), torch.tensor([3, 40, 70, 80])
    bias = torch.zeros(90)
    bias[70] = math.inf
    assert scaled_exps(hidden, weight, labels, LogitMap(bias), room(4, 90), TINY).totals.isnan().all()
    bias.fill_(-math.inf)
    found = scaled_exps(hidden, weight, labels, LogitMap(bias), room(4, 90), TINY)
    assert found.logps.isnan().all() and found.totals.isnan().all()
    huge = scaled_exps(hidden, weight, labels, LogitMap(torch.full((90,), -1e30)), room(4, 90), TINY)
    assert huge.logps.isnan().all()  # and no wrong number


def test_runs_repeat_bit_by_bit_and_nested_loops_give_the_same():
    hidden, weight, labels, _ = operands(20, 300, 72)
    runs = [
        scaled_exps(hidden, weight, labels, LogitMap(), room(20, 300), TINY._replace(flatten=f))
        for f in (True, True, False)
    ]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_nothing_to_do():
    hidden, weight, labels, _ = operands(0, 30, 8)
    found = scaled_exps(hidden, weight, labels, LogitMap(), room(0, 30))
    assert [t.shape for t in found] == [(0,), (0, 2), (0, 30), (0,)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": torch.empty(3, 9)}, "out: expected torch.bfloat16"),
        ({"out": torch.empty(3, 9, dtype=torch.float16)}, "out: expected torch.bfloat16"),
        ({"out": torch.empty(3, 8, dtype=torch.bfloat16)}, "out: expected torch.bfloat16"),
        ({"out": torch.empty(9, 3, dtype=torch.bfloat16).T}, "out: expected contiguous rows"),
        ({"weight": torch.randn(9, 7)}, "weight: expected"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "labels: expected"),
        ({"map": LogitMap(torch.ones(7))}, "map.bias: expected"),
    ],
)
def test_bad_input_is_named(changes, message):
    inputs = {"hidden": torch.randn(3, 8), "weight": torch.randn(9, 8), "labels": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        scaled_exps(**inputs | {"map": LogitMap(), "out": torch.empty(3, 9, dtype=torch.bfloat16)} | changes)


# ---- the sweep that keeps them -----------------------------------------------------------------------------------------


class Rounded(TorchTiles):
    """The PyTorch form with gradients in 8 bits, as a GPU multiplies them."""

    def gradient_(self, *arguments):
        return super().gradient_(*arguments).bfloat16().float()

    def logps_gradient_(self, *arguments):
        logps, dz = super().logps_gradient_(*arguments)
        return logps, dz.bfloat16().float()


class Counting(ScaledTiles):
    """Counts the chunks that keep exponentials."""

    def __init__(self):
        self.chunks = 0

    def scaled_exps(self, *arguments):
        self.chunks += 1
        return scaled_exps(*arguments)


def loss_and_gradients(loss, tensors: dict, tiles, monkeypatch) -> dict:
    """loss(**tensors) with these tiles -> by name the loss, (1,), and every gradient."""
    leaves = {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    with monkeypatch.context() as patch:
        patch.setattr(operators, "choose_backend", lambda *_: tiles)
        value = loss(**leaves)
        value.backward()
    return {"loss": value.detach()[None]} | {name: t.grad for name, t in leaves.items() if t.grad is not None}


def check_loss(loss, tensors: dict, monkeypatch) -> int:
    """Against float64, by the budget beside 8-bit gradients -> chunks that kept exponentials."""
    exact = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    truth = loss_and_gradients(loss, exact, TORCH, monkeypatch)
    plain = loss_and_gradients(loss, tensors, Rounded(), monkeypatch)
    tiles = Counting()
    ours = loss_and_gradients(loss, tensors, tiles, monkeypatch)
    assert ours.keys() == truth.keys()
    for name, true in truth.items():
        check_budget(name, ours[name], plain[name], true, draws=True)
    return tiles.chunks


def head_inputs(n: int = 40, V: int = 150, H: int = 24, frozen: tuple[str, ...] = ()) -> tuple[dict, torch.Tensor]:
    hidden, weight, labels, bias = operands(n, V, H, torch.float32)
    labels[::7] = -100
    tensors = {"hidden": hidden, "weight": weight, "bias": bias}
    return {name: t.clone().requires_grad_(name not in frozen) for name, t in tensors.items()}, labels


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "scale": 1.5}])
@pytest.mark.parametrize("frozen", [("bias",), ("bias", "weight"), ("bias", "hidden")])
def test_a_cross_entropy_in_several_chunks(frozen, options, monkeypatch):
    tensors, labels = head_inputs(frozen=frozen)
    room = workspace_of(12, tensors["weight"], torch.float32)

    def loss(hidden, weight, bias):
        return longpo_ops.linear_cross_entropy(hidden, weight, labels, bias=bias, workspace_bytes=room, **options)

    assert check_loss(loss, tensors, monkeypatch) == 3


def test_log_probs_with_any_upstream_gradient(monkeypatch):
    tensors, labels = head_inputs(frozen=("bias",))
    upstream = torch.linspace(-1, 2, len(labels))

    def loss(hidden, weight, bias):
        logps = longpo_ops.linear_logprobs(hidden, weight, labels, bias=bias)
        return (logps * upstream).sum()

    assert check_loss(loss, tensors, monkeypatch) == 1


def test_pairs_are_scored_wait_and_are_pushed(monkeypatch):
    _, weight, _, _ = operands(1, 150, 24, torch.float32)
    generator = torch.Generator().manual_seed(2)
    tensors = {name: torch.randn(2, 10, 24, generator=generator) for name in ("chosen", "rejected")} | {
        "weight": weight
    }
    ids = torch.randint(150, (2, 2, 10), generator=generator)
    answers = torch.where(torch.arange(10) >= 6, ids, -100)
    refs = torch.tensor([-20.0, -22.0])

    def loss(chosen, rejected, weight):
        return longpo_ops.fused_preference_loss(
            chosen, rejected, weight, answers[0], answers[1], ref_chosen_logps=refs, ref_rejected_logps=refs - 1,
            nll_labels=ids[0], objective=longpo_ops.LongPO(beta=0.5, preference_weight=1.0),
        ).loss  # fmt: skip

    assert check_loss(loss, {name: t.requires_grad_() for name, t in tensors.items()}, monkeypatch) == 2


def test_what_needs_logits_takes_the_tile(monkeypatch):
    tensors, labels = head_inputs()

    def with_bias(hidden, weight, bias):
        return longpo_ops.linear_cross_entropy(hidden, weight, labels, bias=bias)

    def smoothed(hidden, weight, bias):
        return (
            longpo_ops.linear_cross_entropy(hidden, weight, labels, label_smoothing=0.1, z_loss_weight=1e-3)
            + 0 * bias[0]
        )

    def entropy(hidden, weight, bias):
        return longpo_ops.linear_logprobs(hidden, weight, labels, outputs=("entropy",))[1].nansum() + 0 * bias[0]

    assert [check_loss(loss, tensors, monkeypatch) for loss in (with_bias, smoothed, entropy)] == [0, 0, 0]
