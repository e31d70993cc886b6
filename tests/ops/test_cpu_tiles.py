"""The C++ back-end against float64, and the building of it.

Judged by error budget: a row's greatest error against the float64 PyTorch form is at most twice that of the float32
PyTorch form, plus one ulp of the row's greatest truth, on average over rows (benchmarks/budget.py).
"""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longpo_ops.ops import build
from longpo_ops.ops.tiles import Divergence, LogitMap, TorchTiles
from tests.beside import ASKED, check_beside, check_plain_member, class_weights, extreme_rows
from tests.budget import check_budget
from tests.compiler import cached_compiler

TORCH = TorchTiles()

ROOT = Path(__file__).resolve().parents[2]
SIZES = [(1, 1), (50, 7), (50, 16), (33, 1023), (16, 1024), (17, 1061), (20, 5003), (40, 513)]
OPTIONS = ["plain", "scale", "bias", "softcap", "all"]
KINDS = [Divergence("forward"), Divergence("reverse"), Divergence("jsd", 0.5), Divergence("jsd", 0.1)]
ENDS = [Divergence("jsd", beta) for beta in (1e-6, 1e-4, 0.01, 0.9, 0.999, 0.999999)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def cpu():
    from longpo_ops.ops.cpu_tiles import CpuTiles

    try:
        return CpuTiles()
    except build.BuildError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the C++ back-end cannot be built here: {error}")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def logit_map(option, vocab):
    return {
        "plain": LogitMap(),
        "scale": LogitMap(scale=0.37),
        "bias": LogitMap(torch.randn(vocab).bfloat16()),
        "softcap": LogitMap(softcap=5.0),
        "all": LogitMap(torch.randn(vocab).double(), 1.7, 30.0),
    }[option]


def tile(n, vocab, spread=3.0, pitch=None):
    """(n, V) float32, its rows `pitch` apart in memory that is otherwise NaN."""
    memory = torch.full((n, pitch or vocab), float("nan"))
    memory[:, :vocab] = torch.randn(n, vocab) * spread
    return memory[:, :vocab]


def case(n, vocab, **kw):
    return tile(n, vocab, **kw), torch.randint(0, vocab, (n,)), torch.randn(n)


def rows(tiles, z, labels, g, map, dtype):
    """All three row functions on copies of z: logps, stats, gradient by stats, logps and gradient in one visit."""
    keep = z.clone()
    logps, stats = tiles.logps(z, labels, map)
    assert torch.equal(z.nan_to_num(7.0), keep.nan_to_num(7.0)), "logps must leave the tile as it is"
    gradient = tiles.gradient_(z.clone(), labels, stats, g, map, dtype)
    return logps, stats, gradient, *tiles.logps_gradient_(z.clone(), labels, g, map, dtype)


def check_rows(cpu, z, labels, g, map, dtype=torch.float32):
    ours = rows(cpu, z, labels, g, map, dtype)
    plain = rows(TORCH, z, labels, g, map, dtype)
    truth = rows(TORCH, z.double(), labels, g.double(), map, torch.float64)
    for name, o, p, t in zip(("logps", "stats", "gradient", "logps", "gradient"), ours, plain, truth, strict=True):
        check_budget(name, o, p, t, draws=True)  # a row is a draw


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("n, vocab", SIZES)
def test_rows_keep_the_budget(cpu, n, vocab, option):
    check_rows(cpu, *case(n, vocab), logit_map(option, vocab))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("spread", [1e-3, 30.0, 1e4])
def test_rows_of_any_spread_keep_the_budget(cpu, spread, option):
    check_rows(cpu, *case(20, 3001, spread=spread), logit_map(option, 3001))


def test_a_long_row_keeps_the_budget(cpu):
    """Equal logits: 300,000 equal terms, where one float chain would lose three digits."""
    z, labels, g = case(2, 300_001, spread=0.0)
    check_rows(cpu, z, labels, g, LogitMap())


def test_sure_labels_keep_the_budget(cpu):
    z, labels, g = case(5, 2000)
    z[torch.arange(5), labels] += torch.tensor([10.0, 14.0, 18.0, 30.0, 90.0])
    check_rows(cpu, z, labels, g, LogitMap())


@pytest.mark.parametrize("option", ["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pitched_tiles_keep_the_budget_and_their_neighbours(cpu, dtype, option):
    z, labels, g = case(40, 1301, pitch=1309)
    memory = torch.as_strided(z, (40, 1309), (1309, 1))
    check_rows(cpu, z, labels, g, logit_map(option, 1301), dtype)
    cpu.logps_gradient_(z, labels, g, logit_map(option, 1301), dtype)
    assert memory[:, 1301:].isnan().all()


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("n, vocab", SIZES)
def test_16_bit_gradients_are_the_rounded_float32_ones(cpu, n, vocab, dtype, option):
    z, labels, g = case(n, vocab)
    map = logit_map(option, vocab)
    wide, narrow = (rows(cpu, z, labels, g, map, d) for d in (torch.float32, dtype))
    for i in (2, 4):
        assert torch.equal(narrow[i], wide[i].to(dtype))
        assert narrow[i].dtype == dtype and narrow[i].shape == z.shape
    copy = z.clone()
    out = cpu.logps_gradient_(copy, labels, g, map, dtype)[1]
    assert out.untyped_storage().data_ptr() == copy.untyped_storage().data_ptr()


@pytest.mark.parametrize("option", ["plain", "softcap", "all"])
@pytest.mark.parametrize("n, vocab", [(50, 7), (17, 1061), (20, 5003)])
def test_what_is_asked_for_beside_and_affine_gradients(cpu, n, vocab, option):
    z, labels, _ = case(n, vocab, pitch=vocab + 3)
    if vocab > 500:
        extreme_rows(z, labels)
    for asked in ASKED.values():
        for classes in (None, class_weights(vocab)):
            check_beside(cpu, z, labels, logit_map(option, vocab), asked._replace(classes=classes))
    check_beside(cpu, z, labels, logit_map(option, vocab), asked, torch.bfloat16)


def test_the_plain_gradient_is_one_of_the_family(cpu):
    z, labels, _ = case(8, 3001)
    check_plain_member(cpu, z, labels, logit_map("all", 3001))


@pytest.mark.parametrize("option", ["plain", "bias", "softcap"])
def test_minus_infinity_has_probability_and_gradient_zero(cpu, option):
    z, labels, g = case(4, 4000)
    z[0, :2100] = -float("inf")  # the first two blocks of the row and a part of the third
    z[1, 1:] = -float("inf")
    z[2, labels[2]] = -float("inf")
    z[3, :1100], z[3, 1100:] = -float("inf"), z[3, 1100:] - 1000  # no first peak that exp(-peak) would have room for
    labels[[0, 1, 3]] = torch.tensor([3999, 0, 3999])
    check_rows(cpu, z, labels, g, logit_map(option, 4000))
    if option != "softcap":  # a soft-capped -inf is -softcap
        gradient = cpu.logps_gradient_(z.clone(), labels, g, logit_map(option, 4000), torch.float32)[1]
        assert (gradient[0, :2100] == 0).all() and (gradient[1] == 0).all()


@pytest.mark.parametrize("vocab", [5, 1500])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_logit_spoils_its_row_and_no_other(cpu, bad, vocab):
    for column in range(0, vocab, 97):
        z, labels, g = case(3, vocab)
        z[1, column] = bad
        logps, _, gradient, logps_again, gradient_again = rows(cpu, z, labels, g, LogitMap(), torch.float32)
        for x in (logps[:, None], gradient, logps_again[:, None], gradient_again):
            assert x[1].isnan().all() and x[[0, 2]].isfinite().all()
    z[1] = -float("inf")
    logps, _, gradient, *_ = rows(cpu, z, labels, g, LogitMap(), torch.float32)
    assert logps[1].isnan() and gradient[1].isnan().all() and gradient[[0, 2]].isfinite().all()


def test_a_nan_among_minus_infinities_is_seen(cpu):
    z, labels, g = case(1, 40)
    z[:] = -float("inf")
    z[0, 3], z[0, 39] = float("nan"), 1.0
    logps, _, gradient, *_ = rows(cpu, z, labels, g, LogitMap(), torch.float32)
    assert logps.isnan().all() and gradient.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(cpu, dtype):
    z, labels, g = case(0, 9)
    logps, stats, gradient, _, again = rows(cpu, z, labels, g, LogitMap(), dtype)
    assert logps.shape == (0,) and stats.shape == (0, 2) and gradient.shape == again.shape == (0, 9)
    values, dz, _ = cpu.divergence_(z, z.clone(), g, KINDS[0], LogitMap(), LogitMap(), dtype, True, False)
    assert values.shape == (0,) and dz.shape == (0, 9) and dz.dtype == dtype


def divergence(tiles, z, t, kappa, kind, maps, dtype, needs=(True, True)):
    return tiles.divergence_(z.clone(), t.clone(), kappa, kind, *maps, dtype, *needs)


def check_divergence(cpu, z, t, kappa, kind, maps, dtype=torch.float32, needs=(True, True)):
    ours = divergence(cpu, z, t, kappa, kind, maps, dtype, needs)
    plain = divergence(TORCH, z, t, kappa, kind, maps, dtype, needs)
    truth = divergence(TORCH, z.double(), t.double(), kappa.double(), kind, maps, torch.float64, needs)
    check_budget("values", ours[0], plain[0], truth[0], draws=True)
    for name, o, p, tr, need in zip(("dz", "dz_teacher"), ours[1:], plain[1:], truth[1:], needs, strict=True):
        assert (o is not None) == need
        if need:
            assert o.dtype == dtype
            check_budget(name, o, p, tr, draws=True)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("n, vocab", SIZES)
def test_divergences_keep_the_budget(cpu, n, vocab, option, kind):
    maps = logit_map(option, vocab), logit_map("bias", vocab)
    check_divergence(cpu, tile(n, vocab), tile(n, vocab, pitch=vocab + 3), torch.randn(n), kind, maps)


@pytest.mark.parametrize("kind", KINDS + ENDS, ids=str)
@pytest.mark.parametrize("spread", [1e-3, 30.0, 1e4])
def test_divergences_of_any_spread_keep_the_budget(cpu, spread, kind):
    z = tile(20, 2100, spread)
    for teacher in (tile(20, 2100, spread), z * 1.01):
        check_divergence(cpu, z, teacher, torch.randn(20), kind, (LogitMap(), LogitMap()))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
def test_divergences_write_what_is_needed(cpu, needs, dtype, kind):
    check_divergence(
        cpu, tile(40, 1100), tile(40, 1100), torch.randn(40), kind, (LogitMap(), LogitMap(softcap=8.0)), dtype, needs
    )


@pytest.mark.parametrize("kind", KINDS + ENDS, ids=str)
def test_divergences_where_both_have_no_mass(cpu, kind):
    z, teacher = tile(40, 1500), tile(40, 1500)
    for x in (z, teacher):
        x[::3, 5:1400] = -float("inf")
        x[4, :1100], x[4, 1100:] = -float("inf"), x[4, 1100:] - 1000
    z[2, 7] = teacher[1, 7] = float("nan")
    kappa = torch.randn(40)
    kappa[[1, 2]] = 0  # NaN all the same
    check_divergence(cpu, z, teacher, kappa, kind, (LogitMap(), LogitMap()))


@pytest.mark.parametrize("kind", KINDS + ENDS, ids=str)
def test_divergences_where_one_has_no_mass(cpu, kind):
    z, teacher = tile(40, 1500), tile(40, 1500)
    z[::3, 5:1400] = -float("inf")
    teacher[1::3, 100:1200] = -float("inf")
    for low, none in ((z[2], teacher[2]), (teacher[5], z[5])):  # mass that vanishes only beside the last block's
        low[:1100], none[:1100] = low[:1100] - 2000, -float("inf")
    check_divergence(cpu, z, teacher, torch.randn(40), kind, (LogitMap(), LogitMap()))


def test_segment_sums_are_float64_and_repeatable(cpu):
    values, segments = torch.randn(100_000) * 1e3, torch.randint(-1, 5, (100_000,))
    segments[segments == 3] = -1  # a segment without values
    start = torch.randn(5, dtype=torch.float64)
    outs = [start.clone() for _ in range(3)]
    for out in outs[:2]:
        cpu.segment_sums(values, segments, out)
    TORCH.segment_sums(values, segments, outs[2])
    assert torch.equal(outs[0], outs[1]) and outs[0][3] == start[3]
    torch.testing.assert_close(outs[0], outs[2], rtol=0, atol=1e-6)


def test_bitwise_equal_again_and_with_any_number_of_threads(cpu):
    z, labels, g = case(301, 2003)
    teacher = tile(301, 2003)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            found = [*rows(cpu, z, labels, g, logit_map("softcap", 2003), torch.float32)]
            found += rows(cpu, z, labels, g, LogitMap(), torch.bfloat16)
            found += divergence(cpu, z, teacher, g, KINDS[2], (LogitMap(), LogitMap()), torch.float32)
            results.append(found)
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], found, strict=True))


def test_wrong_tiles_are_refused(cpu):
    z, labels, g = case(3, 8)
    map, f32 = LogitMap(), torch.float32
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 8\), got 8"):
        cpu.logps(z, torch.tensor([0, 8, 1]), map)
    with pytest.raises(ValueError, match=r"z must be a .* float32 tile"):
        cpu.logps(z.double(), labels, map)
    with pytest.raises(ValueError, match="contiguous columns"):
        cpu.logps_gradient_(z.t().contiguous().t(), labels, g, map, f32)
    with pytest.raises(ValueError, match="rows that do not overlap"):
        cpu.logps_gradient_(z[:1].expand(3, 8), labels, g, map, f32)
    with pytest.raises(ValueError, match="g must hold 1 Float for each of 3 rows"):
        cpu.logps_gradient_(z, labels, g.double(), map, f32)
    with pytest.raises(ValueError, match="bias must hold 8"):
        cpu.logps(z, labels, LogitMap(torch.zeros(7)))
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16"):
        cpu.logps_gradient_(z, labels, g, map, torch.float64)
    with pytest.raises(ValueError, match="'forward', 'reverse' or 'jsd', got 'sideways'"):
        cpu.divergence_(z, z.clone(), g, Divergence("sideways"), map, map, f32, True, True)


# ---- building -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A small library: its sources and a command; an empty cache and no prebuilt libraries."""
    source, header = tmp_path / "seven.cpp", tmp_path / "seven.h"
    header.write_text("#define SEVEN 7\n")
    source.write_text('#include "seven.h"\nextern "C" int seven() { return SEVEN; }\n')
    monkeypatch.setenv("LONGPO_OPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "NATIVE", tmp_path / "native")
    return [source, header], ["g++", "-shared", "-fPIC"]


def seven(path):
    return ctypes.CDLL(str(path)).seven()


def test_a_library_is_compiled_once(small):
    sources, (_, *flags) = small
    path = build.cached_library("seven", *small)
    assert seven(path) == 7
    assert build.cached_library("seven", sources, ["no-such-compiler", *flags]) == path


def test_a_changed_source_header_flag_or_name_is_another_library(small):
    sources, command = small
    paths = {build.cached_library("seven", sources, command)}
    paths.add(build.cached_library("other", sources, command))
    paths.add(build.cached_library("seven", sources, [*command, "-O1"]))
    sources[1].write_text("#define SEVEN 8\n")
    paths.add(changed := build.cached_library("seven", sources, command))
    assert len(paths) == 4 and seven(changed) == 8
    assert build.cached_library("seven", sources, [*command, "-L/elsewhere", "-I/elsewhere"]) == changed


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped"])
def test_a_damaged_library_is_compiled_again(small, damage):
    path = build.cached_library("seven", *small)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "flipped": content}[damage])
    assert seven(build.cached_library("seven", *small)) == 7


def test_a_prebuilt_library_comes_first(small):
    sources, (_, *flags) = small
    path = build.cached_library("seven", *small)
    build.NATIVE.mkdir()
    path.rename(build.NATIVE / path.name)
    assert build.cached_library("seven", sources, ["no-such-compiler", *flags]).parent == build.NATIVE


def test_what_prevents_a_build_is_told(small, monkeypatch, tmp_path):
    sources, (_, *flags) = small
    with pytest.raises(build.BuildError, match="'no-such-compiler' is not on PATH"):
        build.cached_library("seven", sources, ["no-such-compiler", *flags])
    with pytest.raises(build.BuildError, match=r"failed with status 1: .*no-such-flag"):
        build.cached_library("seven", sources, ["g++", *flags, "-fno-such-flag"])
    assert not list(build.cache_folder().glob("*.so"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LONGPO_OPS_CACHE", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match="set LONGPO_OPS_CACHE"):
        build.cached_library("seven", *small)


def python(code, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_processes_at_once_compile_once(small, tmp_path):
    compiler = tmp_path / "slow-compiler"
    compiler.write_text(f'#!/bin/sh\necho run >> {tmp_path / "runs"}\nsleep 1\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    code = """
import ctypes, sys
from pathlib import Path
from longpo_ops.ops import build
compiler, *sources = sys.argv[1:]
build.NATIVE = Path("none")
print(ctypes.CDLL(build.cached_library("seven", list(map(Path, sources)), [compiler, "-shared", "-fPIC"])).seven())
"""
    both = [python(code, compiler, *small[0], OMP_NUM_THREADS="1") for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert outputs == ["7\n", "7\n"]
    assert (tmp_path / "runs").read_text() == "run\n"


LOAD = """
import sys
from pathlib import Path
import torch
from longpo_ops.ops import build
build.NATIVE = Path("none")
build.load_cpu()
logps, _ = torch.ops.longpo_cpu.logps(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), None, 1.0, 0.0)
print("%.4f" % logps[1])
if sys.platform == "linux":
    maps = Path("/proc/self/maps").read_text().split()
    assert len({Path(word).resolve() for word in maps if "libgomp" in word or "libomp" in word}) == 1
"""


def test_the_back_end_itself_is_built_cached_and_shares_the_openmp_of_torch(cpu, tmp_path, tmp_path_factory):
    for compiler in (str(cached_compiler(tmp_path_factory)), "no-such-compiler"):  # the second finds the first one's
        process = python(LOAD, LONGPO_OPS_CACHE=str(tmp_path), CXX=compiler)
        assert process.communicate(timeout=300)[0] == "-1.3863\n"
    (library,) = tmp_path.glob("*.so")
    assert torch.__version__ in library.name


def test_prebuilding_makes_what_loading_looks_for(cpu, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(build, "_compile", lambda path, sources, command: made.append((path, sources, command)))
    path = build.compile_cpu(tmp_path)
    assert made[0][0] == path == tmp_path / build._file_name(*build._cpu_arguments())


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_processors_keep_the_budget(cpu, capability):
    """The same tests with the code that a processor without AVX-512, or without AVX2, would get."""
    if torch.backends.cpu.get_cpu_capability() in (capability.upper(), "DEFAULT"):
        pytest.skip("covered by the tests above")
    tests = "any_spread or beside or rounded or infinit or bad_logit or needed or bitwise"
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            __file__,
            "-k",
            f"({tests}) and not other",
        ],
        cwd=ROOT,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability, "CI": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-3000:]
