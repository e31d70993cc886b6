"""Every Triton kernel against float64, interpreted: TRITON_INTERPRET=1 pytest tests/kernels/test_interpreter.py

The error budget is that of benchmarks/budget.py beside the PyTorch form.
"""

import importlib.util
import math
import mmap
import os
import time
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported, in a process of its own", allow_module_level=True)
if importlib.util.find_spec("triton") is None and os.environ.get("CI") != "true":
    pytest.skip("triton is not installed", allow_module_level=True)

if Version(version("numpy")) >= Version("2.5") and Version(version("triton")) < Version("3.7"):
    found = f"triton {version('triton')} cannot interpret with numpy {version('numpy')}"
    pytest.fail(f"{found}: expected numpy below 2.5 for these tests", pytrace=False)

from longpo_ops.kernels.launch import MatmulConfig, linear_logps_config, row_config
from longpo_ops.kernels.linear_logps import linear_logps, search
from longpo_ops.kernels.products import _splits
from longpo_ops.kernels.tiles import TritonTiles
from longpo_ops.ops.tiles import Divergence, LogitMap, TorchTiles
from longpo_ops.ops.truth import divergence as plain_divergence
from tests.beside import ASKED, check_beside, check_plain_member, class_weights, extreme_rows
from tests.budget import check_budget

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # numpy on NaN and infinities
TRITON, TORCH = TritonTiles(), TorchTiles()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAPS = ("plain", "bias", "capped")
TINY = MatmulConfig(16, 64, 32, 2, 4, 1, False)
MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.13 on


def logit_map(name: str, V: int, seed: int = 7) -> LogitMap:
    bias = torch.randn(V, generator=torch.Generator().manual_seed(seed))
    return {
        "plain": LogitMap(),
        "bias": LogitMap(bias.bfloat16(), 0.7),
        "capped": LogitMap(bias, 1.3, 5.0),
    }[name]


def tile(n: int, V: int, gap: int = 0, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    """(n, V) float32 with `gap` NaNs between rows."""
    memory = torch.full((n, V + gap), math.nan)
    memory[:, :V] = spread * torch.randn(n, V, generator=torch.Generator().manual_seed(seed))
    return memory[:, :V]


def row_inputs(n: int, V: int) -> tuple[torch.Tensor, torch.Tensor]:
    """labels (n,), g (n,)"""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, V, (n,), generator=generator), torch.randn(n, generator=generator)


def assert_in_budget(ours, plain, truth) -> None:
    """Rows are draws."""
    assert ours.dtype == plain.dtype
    check_budget("rows", ours, plain, truth, draws=True)


def double(z: torch.Tensor) -> torch.Tensor:
    return z.double().clone()


def check_rows(z, labels, g, map, dtype) -> None:
    """logps, gradient_ and logps_gradient_ on one tile."""
    wide = LogitMap(None if map.bias is None else map.bias.double(), map.scale, map.softcap)
    true_logps, true_stats = TORCH.logps(double(z), labels, wide)
    true_dz = TORCH.gradient_(double(z), labels, true_stats, g.double(), wide, torch.float64)
    plain_logps, plain_stats = TORCH.logps(z.clone(), labels, map)
    plain_dz = TORCH.gradient_(z.clone(), labels, plain_stats, g, map, dtype)

    before = z.clone()
    logps, stats = TRITON.logps(z, labels, map)
    assert torch.equal(z.view(torch.int32), before.view(torch.int32))
    assert_in_budget(logps, plain_logps, true_logps)
    finite = true_stats.isfinite().all(1)
    assert_in_budget(stats[finite].sum(1), plain_stats[finite].sum(1), true_stats[finite].sum(1))

    copy = torch.empty_strided(z.shape, z.stride()).copy_(z)
    dz = TRITON.gradient_(copy, labels, stats, g, map, dtype)
    assert dz.data_ptr() == copy.data_ptr()
    assert_in_budget(dz, plain_dz, true_dz)

    fused_logps, fused_dz = TRITON.logps_gradient_(z, labels, g, map, dtype)
    assert fused_dz.data_ptr() == z.data_ptr()
    assert_in_budget(fused_logps, plain_logps, true_logps)
    assert_in_budget(fused_dz, plain_dz, true_dz)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("map_name", MAPS)
@pytest.mark.parametrize(("V", "gap"), [(1, 0), (7, 3), (100, 28), (1000, 1), (40000, 5)])
def test_rows(V, gap, map_name, dtype):
    n = 12 if V < 40000 else 2
    z = tile(n, V, gap)
    check_rows(z, *row_inputs(n, V), logit_map(map_name, V), dtype)
    if gap:
        memory = torch.as_strided(z, (n - 1, gap), (V + gap, 1), V)
        assert memory.isnan().all(), "a kernel wrote between the rows"


@pytest.mark.parametrize("map_name", MAPS)
@pytest.mark.parametrize(("V", "gap"), [(1, 0), (100, 28), (1000, 1), (20000, 5)])
def test_what_is_asked_for_beside_and_affine_gradients(V, gap, map_name):
    n, map = 12 if V < 20000 else 8, logit_map(map_name, V)
    z, labels = tile(n, V, gap), row_inputs(n, V)[0]
    if V > 500:
        extreme_rows(z, labels)
    check_beside(TRITON, z, labels, map, ASKED["all"], torch.bfloat16)
    for asked in ("mean", "predicted", "total"):
        check_beside(TRITON, z, labels, map, ASKED[asked]._replace(classes=class_weights(V)))


@pytest.mark.parametrize("V", [1000, 20000])
def test_the_plain_gradient_is_one_of_the_family(V):
    check_plain_member(TRITON, tile(4, V), row_inputs(4, V)[0], LogitMap())


def test_both_forms_of_the_row_kernel_are_tested():
    assert row_config(1000, False).block >= 1000 and row_config(40000, False).block < 40000
    assert row_config(20000, False).block >= 20000 and row_config(20000, True).block < 20000  # as what is beside is


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("map_name", MAPS)
@pytest.mark.parametrize("V", [1000, 40000])
def test_rows_with_extreme_logits(V, map_name, dtype):
    z = tile(6, V, 4)
    labels, g = row_inputs(6, V)
    z[0, V // 2] = math.nan
    z[1, 3:V:2] = -math.inf
    z[2] += 1e4
    z[3, 5] = math.inf
    z[4] = -math.inf
    z[5] = 1e4 * z[5].sign()
    z[1, labels[1]] = 0.5
    check_rows(z, labels, g, logit_map(map_name, V), dtype)


@pytest.mark.parametrize("V", [100, 40000])
def test_the_largest_float32_negative_is_an_ordinary_logit(V):
    z = torch.full((2, V), torch.finfo(torch.float32).min)
    z[1, 3] = 0
    check_rows(z, torch.tensor([2, 3]), torch.ones(2), LogitMap(), torch.float32)


KINDS = [Divergence("forward"), Divergence("reverse"), Divergence("jsd", 0.3)]


def check_divergence(z, z_t, kappa, divergence, map, map_t, dtype, student, teacher) -> None:
    def run(tiles, real, out):
        maps = [LogitMap(None if m.bias is None else m.bias.to(real), m.scale, m.softcap) for m in (map, map_t)]
        copies = [torch.empty_strided(t.shape, t.stride(), dtype=real).copy_(t) for t in (z, z_t)]
        return tiles.divergence_(*copies, kappa.to(real), divergence, *maps, out, student, teacher)

    truth = run(TORCH, torch.float64, torch.float64)
    for ours, plain, true in zip(run(TRITON, torch.float32, dtype), run(TORCH, torch.float32, dtype), truth):
        assert (ours is None) == (true is None)
        if true is not None:
            assert_in_budget(ours, plain, true)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("student", "teacher"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("divergence", KINDS, ids=lambda d: d.kind)
def test_divergence_gradients(divergence, student, teacher, dtype):
    V = 5000
    maps = logit_map("bias", V), logit_map("capped", V, 8)
    kappa = row_inputs(8, V)[1]
    check_divergence(tile(8, V, 2), tile(8, V, 0, 5), kappa, divergence, *maps, dtype, student, teacher)


@pytest.mark.parametrize("divergence", KINDS, ids=lambda d: d.kind)
@pytest.mark.parametrize("V", [1, 7, 100, 1000])
def test_divergence_of_any_width(V, divergence):
    n = 16 if V < 1000 else 8  # few numbers in a row need many rows
    kappa = row_inputs(n, V)[1]
    for maps in ((LogitMap(), LogitMap()), (logit_map("capped", V), logit_map("bias", V))):
        check_divergence(tile(n, V, V % 3), tile(n, V, 1, 5), kappa, divergence, *maps, torch.bfloat16, True, True)


@pytest.mark.parametrize("beta", [1e-6, 1e-3, 0.1, 0.5, 0.9, 0.999, 0.999999])
def test_jsd_where_the_mixture_nearly_is_one_side_or_underflows(beta):
    """beta q + (1 - beta) p is below the least float32 where both logits lie 100 under their peaks."""
    z, z_t, kappa = tile(16, 300), tile(16, 300, 0, 5), row_inputs(16, 300)[1]
    z[:8, :3], z_t[:8, :3] = torch.tensor([30.0, -103.5, -150.0]), torch.tensor([29.0, -200.0, -103.0])

    def run(real):
        logits = [t.to(real).clone().requires_grad_() for t in (z, z_t)]
        values = plain_divergence(*(t.log_softmax(-1) for t in logits), "jsd", beta)
        return values, *torch.autograd.grad(values, logits, kappa.to(real))

    maps = LogitMap(), LogitMap()
    ours = TRITON.divergence_(z.clone(), z_t.clone(), kappa, Divergence("jsd", beta), *maps, torch.float32, True, True)
    for results in zip(ours, run(torch.float32), run(torch.float64)):
        assert_in_budget(*results)


@pytest.mark.parametrize("divergence", KINDS, ids=lambda d: d.kind)
def test_divergence_with_extreme_logits(divergence):
    z, z_t = tile(5, 5000), tile(5, 5000, 0, 5)
    z[0, 4500] = math.nan
    z_t[1, :2500], z[1, :2500] = -math.inf, -math.inf  # 0 * log 0
    z[2] += 1e4
    z_t[3, 17] = math.nan
    z_t[4] = z[4]
    check_divergence(z, z_t, torch.ones(5), divergence, LogitMap(), LogitMap(), torch.float32, True, True)


def check_linear(hidden, weight, labels, map, config) -> None:
    wide = LogitMap(None if map.bias is None else map.bias.double(), map.scale, map.softcap)
    true_logps, true_stats = TORCH.logps(hidden.double() @ weight.double().T, labels, wide)
    plain_logps, plain_stats = TORCH.logps(hidden.float() @ weight.float().T, labels, map)
    logps, stats = linear_logps(hidden, weight, labels, map, config)
    assert_in_budget(logps, plain_logps, true_logps)
    assert_in_budget(stats.sum(1), plain_stats.sum(1), true_stats.sum(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("map_name", MAPS)
@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize(("n", "V", "H"), [(1, 1, 8), (5, 100, 40), (70, 333, 24), (33, 1000, 64)])
def test_linear_logps(n, V, H, descriptors, map_name, dtype):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.full((n, H + 16), math.nan, dtype=dtype)[:, :H]  # a row pitch
    hidden.copy_(torch.randn(n, H, generator=generator))
    weight = torch.randn(V, H, generator=generator).mul_(3 / H**0.5).to(dtype)
    labels = torch.randint(0, V, (n,), generator=generator)
    check_linear(hidden, weight, labels, logit_map(map_name, V), TINY._replace(descriptors=descriptors))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_linear_logps_as_configured(capability, dtype):
    generator = torch.Generator().manual_seed(4)
    hidden, weight = (torch.randn(r, 72, generator=generator).to(dtype) for r in (150, 700))
    labels = torch.randint(0, 700, (150,), generator=generator)
    check_linear(hidden, weight, labels, LogitMap(scale=0.1), linear_logps_config(capability, dtype, False))


@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
def test_nested_loops_give_the_bits_of_the_flattened_one(descriptors):
    hidden, weight, labels = torch.randn(20, 72), torch.randn(300, 72), torch.arange(20)
    config = TINY._replace(descriptors=descriptors)
    runs = [linear_logps(hidden, weight, labels, LogitMap(), config._replace(flatten=f)) for f in (True, False)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_linear_logps_where_descriptors_cannot_reach():
    """7 bfloat16 units: rows are not 16-byte aligned, so the kernel falls back to pointers."""
    hidden, weight = torch.randn(6, 7).bfloat16(), torch.randn(50, 7).bfloat16()
    check_linear(hidden, weight, torch.arange(6), LogitMap(), TINY._replace(descriptors=True))


def test_linear_logps_with_extreme_logits():
    hidden, weight = torch.zeros(5, 16), torch.randn(90, 16)
    hidden[:, 0] = torch.tensor([1e4, 1.0, math.nan, 1.0, math.inf])
    bias = torch.randn(90)
    bias[:64] = -math.inf  # whole tiles of the vocabulary without probability
    check_linear(hidden, weight, torch.tensor([70, 80, 5, 5, 80]), LogitMap(bias), TINY)


def test_splits_fill_the_waves():
    for row_tiles in (1, 7, 32, 512, 4000):
        splits = _splits(row_tiles, 501, 132)
        assert splits == 1 or row_tiles * splits <= 4 * 132
        steps = math.ceil(row_tiles * splits / 132) * math.ceil(501 / splits)
        assert steps <= 1.05 * max(row_tiles * 501 / 132, 4)


def test_search_orders_configurations():
    hidden, weight = torch.randn(20, 16), torch.randn(64, 16)

    def clock(run):
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    found = search(hidden, weight, torch.arange(20), LogitMap(), [TINY, TINY._replace(vocab=16)], clock)
    assert sorted(c.vocab for _, c in found) == [16, 64] and found[0][0] <= found[1][0]


def test_segment_sums():
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(9000, generator=generator) * 1e3
    segments = torch.randint(-1, 4, (9000,), generator=generator)
    values[segments == -1] = math.nan  # belongs nowhere
    values[7], segments[7] = math.nan, 3
    runs = [torch.full((5,), 10.0, dtype=torch.float64) for _ in range(2)]
    for out in runs:
        TRITON.segment_sums(values, segments, out)
    assert torch.equal(runs[0].view(torch.int64), runs[1].view(torch.int64))
    for k in range(3):
        truth = math.fsum(values[segments == k].tolist()) + 10
        assert abs(runs[0][k].item() - truth) <= 1e-12 * values[segments == k].abs().sum()
    assert runs[0][3].isnan() and runs[0][4] == 10


def test_nothing_to_do():
    z, none = torch.empty(0, 10), torch.empty(0, dtype=torch.int64)
    assert [t.shape for t in TRITON.logps(z, none, LogitMap())] == [(0,), (0, 2)]
    assert TRITON.gradient_(z, none, torch.empty(0, 2), torch.empty(0), LogitMap(), torch.bfloat16).shape == (0, 10)
    assert [t.shape for t in TRITON.logps_gradient_(z, none, torch.empty(0), LogitMap(), torch.float16)] == [
        (0,),
        (0, 10),
    ]
    maps = LogitMap(), LogitMap()
    values, dz, _ = TRITON.divergence_(z, z, torch.empty(0), KINDS[0], *maps, torch.float32, True, False)
    assert values.shape == (0,) and dz.shape == (0, 10)
    logps, stats = TRITON.linear_logps(torch.empty(0, 8), torch.randn(4, 8), none, LogitMap())
    assert logps.shape == (0,) and stats.shape == (0, 2)
    out = torch.ones(2, dtype=torch.float64)
    TRITON.segment_sums(torch.empty(0), none, out)
    assert out.tolist() == [1, 1]


def far_rows(columns: int, dtype: torch.dtype) -> torch.Tensor:
    """(3, columns) whose last row lies beyond 2^31 elements, in address space that is never backed by memory."""
    pitch = 2**30 + 64
    size = (2 * pitch + columns) * dtype.itemsize
    space = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(space, dtype=dtype).as_strided((3, columns), (pitch, 1))


@pytest.mark.parametrize("V", [50, 40000])
def test_row_offsets_beyond_2_to_the_31(V):
    z, near = far_rows(V, torch.float32), tile(3, V)
    labels, g = row_inputs(3, V)
    z.copy_(near)
    logps, dz = TRITON.logps_gradient_(z, labels, g, LogitMap(), torch.bfloat16)
    near_logps, near_dz = TRITON.logps_gradient_(near, labels, g, LogitMap(), torch.bfloat16)
    assert torch.equal(logps, near_logps) and torch.equal(dz, near_dz)


def test_divergence_offsets_beyond_2_to_the_31():
    z, z_t, near, near_t = far_rows(50, torch.float32), far_rows(50, torch.float32), tile(3, 50), tile(3, 50, 0, 5)
    z.copy_(near)
    z_t.copy_(near_t)
    options = torch.ones(3), KINDS[2], LogitMap(), LogitMap(), torch.bfloat16, True, True
    for far, close in zip(TRITON.divergence_(z, z_t, *options), TRITON.divergence_(near, near_t, *options)):
        assert torch.equal(far, close)


@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
def test_linear_offsets_beyond_2_to_the_31(descriptors):
    hidden, weight = far_rows(16, torch.bfloat16), far_rows(16, torch.bfloat16)
    hidden.copy_(torch.randn(3, 16))
    weight.copy_(torch.randn(3, 16))
    config, labels = TINY._replace(descriptors=descriptors), torch.tensor([2, 0, 1])
    far = linear_logps(hidden, weight, labels, LogitMap(), config)
    close = linear_logps(hidden.contiguous(), weight.contiguous(), labels, LogitMap(), config)
    assert all(torch.equal(a, b) for a, b in zip(far, close))


def row_call(**changes):
    inputs = {"z": torch.randn(3, 8), "labels": torch.zeros(3, dtype=torch.int64), "g": torch.ones(3)}
    inputs |= {"map": LogitMap(), "dtype": torch.float32} | changes
    TRITON.logps_gradient_(**inputs)


def linear_call(**changes):
    inputs = {"hidden": torch.randn(3, 8), "weight": torch.randn(9, 8), "labels": torch.zeros(3, dtype=torch.int64)}
    TRITON.linear_logps(**inputs | {"map": LogitMap()} | changes)


def divergence_call(**changes):
    inputs = {"z": torch.randn(3, 8), "z_teacher": torch.randn(3, 8), "kappa": torch.ones(3), "divergence": KINDS[0]}
    inputs |= {"map": LogitMap(), "map_teacher": LogitMap(), "dtype": torch.float32}
    TRITON.divergence_(**inputs | {"need_student": True, "need_teacher": True} | changes)


def segment_call(**changes):
    inputs = {"values": torch.ones(3), "segments": torch.zeros(3, dtype=torch.int64)}
    TRITON.segment_sums(**inputs | {"out": torch.zeros(2, dtype=torch.float64)} | changes)


@pytest.mark.parametrize(
    ("call", "changes", "message"),
    [
        (row_call, {"z": torch.randn(3, 8).double()}, "z: expected a float32 tile"),
        (row_call, {"z": torch.randn(8, 3).T}, "z: expected contiguous rows"),
        (row_call, {"z": torch.randn(1, 8).expand(3, 8)}, "z: expected contiguous rows that do not overlap"),
        (row_call, {"z": torch.randn(24)}, "z: expected two dimensions"),
        (row_call, {"labels": torch.zeros(3, dtype=torch.int32)}, "labels: expected torch.int64"),
        (row_call, {"g": torch.ones(4)}, "g: expected torch.float32"),
        (row_call, {"g": torch.ones(6)[::2]}, "g: expected a contiguous tensor"),
        (row_call, {"map": LogitMap(torch.ones(7))}, "map.bias: expected"),
        (row_call, {"map": LogitMap(torch.ones(8).long())}, "map.bias: expected a floating dtype"),
        (row_call, {"dtype": torch.float64}, "dtype: expected float32, float16 or bfloat16"),
        (linear_call, {"weight": torch.randn(9, 7)}, "weight: expected"),
        (linear_call, {"weight": torch.randn(9, 8).half()}, "weight: expected"),
        (linear_call, {"hidden": torch.randn(3, 8).double()}, "hidden: expected bfloat16"),
        (linear_call, {"hidden": torch.randn(8, 3).T}, "hidden: expected contiguous rows"),
        (linear_call, {"labels": torch.zeros(2, dtype=torch.int64)}, "labels: expected"),
        (divergence_call, {"divergence": Divergence("backward")}, "divergence.kind: expected one of"),
        (divergence_call, {"z_teacher": torch.randn(3, 9)}, "z_teacher: expected z's shape"),
        (divergence_call, {"kappa": torch.ones(2)}, "kappa: expected"),
        (segment_call, {"out": torch.zeros(2)}, "out: expected torch.float64"),
        (segment_call, {"segments": torch.zeros(4, dtype=torch.int64)}, "segments: expected"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, changes, message):
    call()
    with pytest.raises(ValueError, match=message):
        call(**changes)
