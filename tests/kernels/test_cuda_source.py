"""csrc/cuda without a GPU: what nvcc makes of it, and the very same source run on the CPU, thread by thread.

cuda_on_cpu/cuda_runtime.h lets g++ compile row_epilogue.cu; a block's threads then run as fibers in ascending or
descending order. Results are judged against float64 by error budget (benchmarks/budget.py). Without nvcc or g++ the
tests that need them are skipped, or fail where CI=true.
"""

import ctypes
import os
import re
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import correctness
from benchmarks.gpu.rows import results
from benchmarks.gpu.setting import REHEARSAL
from longpo_ops.ops.build import BuildError, source_folder
from longpo_ops.ops.cuda_tiles import CudaTiles, bind, find_nvcc, load_cuda
from longpo_ops.ops.dispatch import choose_backend
from longpo_ops.ops.tiles import LogitMap, TorchTiles
from tests.beside import ASKED, check_beside, check_plain_member, class_weights, extreme_rows
from tests.budget import check_budget

HERE = Path(__file__).parent
FOLDER = source_folder("cuda")
SOURCE = FOLDER / "row_epilogue.cu"

# Most registers per thread: 64 lets a block have 1024 threads, 32 lets two such blocks share a multiprocessor.
REGISTERS = {"logps": 64, "gradient": 32, "logps_gradient": 64, "beside": 64, "affine": 48, "segments": 32}
STATIC_SHARED = 768  # bytes: six numbers per warp; what else there is holds the row
TARGETS = ["80", "90a", "100a"]


def missing(what: str):
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is not here, and CI must have it")
    pytest.skip(f"{what} is not here")


@pytest.fixture(scope="module")
def nvcc() -> Path:
    return find_nvcc() or missing("nvcc (CUDA_HOME, PATH, /usr/local/cuda or the nvidia-cuda-nvcc package)")


def compile_cpp(arguments: list, out: Path) -> Path:
    compiler = shutil.which("g++") or missing("g++")
    command = [compiler, "-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    command += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]  # a GPU refuses a misaligned access too
    done = subprocess.run([*command, *map(str, arguments), "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


class EmulatedTiles(CudaTiles):
    """CudaTiles on CPU tensors: the library is the one that g++ made."""

    @contextmanager
    def _stream(self, device):
        yield None

    def run_as(self, shared_bytes: int = 227 << 10, descending: bool = False) -> "EmulatedTiles":
        self._library.emulate(shared_bytes, int(descending))
        return self


def emulate(source: Path, out: Path) -> EmulatedTiles:
    library = bind(compile_cpp(["-I", HERE / "cuda_on_cpu", "-I", FOLDER, "-x", "c++", source], out))
    library.emulate.argtypes, library.emulate.restype = [ctypes.c_int64, ctypes.c_int], None
    return EmulatedTiles(library)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory) -> EmulatedTiles:
    return emulate(SOURCE, tmp_path_factory.mktemp("emulated") / "row_epilogue.so")


# ---- what nvcc makes of it -------------------------------------------------------------------------------------------


def kernel_name(mangled: str) -> str:
    if "segment_kernel" in mangled:
        return "segments"
    mode = re.search(r"row_kernelILi\d+ELNS_4ModeE(\d)E", mangled)
    return list(REGISTERS)[int(mode.group(1))]


@pytest.mark.parametrize("target", TARGETS)
def test_registers_spills_and_shared_memory(nvcc, target, tmp_path):
    architecture = f"-gencode=arch=compute_{target},code=sm_{target}"
    command = [nvcc, "-O3", "-std=c++17", architecture, "-Xptxas", "-v", "-cubin", "-o", tmp_path / "out.cubin", SOURCE]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower()
    report = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers[^\n]*",
        done.stderr,
        flags=re.DOTALL,
    )
    assert len(report) == 11  # five modes of two widths, and the segment sums
    for mangled, stack, stores, loads, registers in report:
        name = kernel_name(mangled)
        assert (int(stack), int(stores), int(loads)) == (0, 0, 0), name
        assert int(registers) <= REGISTERS[name], name
    assert max(map(int, re.findall(r"(\d+) bytes smem", done.stderr))) <= STATIC_SHARED


def test_wide_kernels_read_and_write_16_bytes(nvcc, tmp_path):
    command = [nvcc, "-O3", "-std=c++17", "-arch=compute_90a", "-ptx", "-o", tmp_path / "out.ptx", SOURCE]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    ptx = (tmp_path / "out.ptx").read_text()
    bodies = dict(re.findall(r"\.entry (\w*row_kernel\w*)(.*?)\n}", ptx, flags=re.DOTALL))
    wide = {name: body for name, body in bodies.items() if "row_kernelILi8E" in name}
    assert len(wide) == 5
    for name, body in wide.items():
        assert re.search(r"ld\.global(\.nc)?\.v4\.[fb]32", body), name
        assert kernel_name(name) in ("logps", "beside") or re.search(r"st\.global\.v4\.[bu]32", body), name
        assert kernel_name(name) != "logps_gradient" or re.search(r"st\.shared\.v4\.[fb]32", body), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="a launch succeeds here: benchmarks/gpu/check.py judges it")
def test_library_loads_without_a_gpu_and_a_launch_says_what_is_wrong(nvcc):
    class OnCpuTensors(CudaTiles):
        _stream = EmulatedTiles._stream

    tiles = OnCpuTensors(load_cuda())
    z, labels = torch.randn(3, 50), torch.tensor([1, 2, 3])
    with pytest.raises(RuntimeError, match=r"longpo_logps_gradient on cpu: .*(CUDA|driver|device)"):
        tiles.logps_gradient_(z, labels, torch.ones(3), LogitMap(), torch.bfloat16)
    assert tiles.logps(z[:0], labels[:0], LogitMap())[0].shape == (0,)  # nothing to launch, nothing to fail


def test_a_library_that_is_there_needs_no_nvcc(nvcc, tmp_path, monkeypatch):
    """As on a machine that gpu-pack's library came to: its name holds no path of the compiler's."""
    here = Path(load_cuda()._name)
    monkeypatch.setattr("longpo_ops.ops.cuda_tiles.find_nvcc", lambda: None)
    monkeypatch.setattr("longpo_ops.ops.build.NATIVE", tmp_path / "none")
    monkeypatch.setenv("LONGPO_OPS_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="no nvcc: set CUDA_HOME"):
        load_cuda.__wrapped__()
    shutil.copy(here, tmp_path)
    assert Path(load_cuda.__wrapped__()._name) == tmp_path / here.name


def test_nvcc_is_found_where_it_may_be(tmp_path, monkeypatch):
    places = {"home": tmp_path / "home/bin/nvcc", "wheel": tmp_path / "site/nvidia/cu13/bin/nvcc"}
    for path in places.values():
        path.parent.mkdir(parents=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("longpo_ops.ops.cuda_tiles.USUAL_PLACE", tmp_path / "nowhere/nvcc")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "site"))
    assert find_nvcc() == places["wheel"]
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "home"))
    assert find_nvcc() == places["home"]
    monkeypatch.delenv("CUDA_PATH")
    places["wheel"].unlink()
    assert find_nvcc() is None


# ---- 16-bit packing --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack")
    (folder / "pack.cpp").write_text(
        '#include "row_math.h"\n'
        'extern "C" void pack(const float* x, long n, int dtype, uint32_t* out) {\n'
        "    for (long i = 0; i < n / 2; ++i)\n"
        "        out[i] = row_math::pack_pair(x[2 * i], x[2 * i + 1], row_math::Dtype(dtype));\n"
        "}\n"
    )
    library = ctypes.CDLL(str(compile_cpp(["-I", FOLDER, folder / "pack.cpp"], folder / "pack.so")))
    library.pack.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_void_p]
    return library.pack


@pytest.mark.parametrize("code, dtype", [(1, torch.float16), (2, torch.bfloat16)])
def test_packing_rounds_as_torch_does(pack, code, dtype):
    """Every 16-bit value, the middles between neighbours and one float32 step beside each; NaN of every kind stays."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype).float()
    middles = (values + values.roll(-1)) / 2
    steps = [torch.nextafter(t, torch.tensor(s)) for t in (values, middles) for s in (float("inf"), -float("inf"))]
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -0x007FFFFF, -1], dtype=torch.int32).view(torch.float32)
    x = torch.cat([values, middles, *steps, nans])
    out = torch.empty(x.shape[0], dtype=torch.int16)
    pack(x.data_ptr(), x.shape[0], code, out.data_ptr())
    expected = x.to(dtype)
    assert torch.equal(out.view(dtype).isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(out[number], expected.view(torch.int16)[number])


# ---- the kernels' own source, on the CPU -----------------------------------------------------------------------------


def make(n: int, vocab: int, pitch: int = 0, offset: int = 0, seed: int = 0, spread: float = 4.0):
    """A tile inside a buffer of NaN, `offset` floats from a 64-byte boundary; labels and weights of both signs."""
    generator = torch.Generator().manual_seed(seed)
    pitch = pitch or vocab
    buffer = torch.full((n * pitch + offset + 16,), float("nan"))
    start = offset + (-buffer.data_ptr() // 4) % 16
    z = buffer[start : start + n * pitch].as_strided((n, vocab), (pitch, 1))
    z.copy_(torch.randn(n, vocab, generator=generator) * spread)
    labels = torch.randint(vocab, (n,), generator=generator)
    return z, labels, torch.randn(n, generator=generator)


def check_all(tiles: CudaTiles, z, labels, g, map: LogitMap, dtype: torch.dtype) -> None:
    """logps, gradient_ and logps_gradient_ of one tile against float64, and each other."""
    plain, exact = TorchTiles(), LogitMap(None if map.bias is None else map.bias.double(), map.scale, map.softcap)
    truth_logps, truth_dz = plain.logps_gradient_(z.double(), labels, g.double(), exact, torch.float64)
    plain_logps, plain_dz = plain.logps_gradient_(z.clone(), labels, g, map, dtype)

    before = z.clone()
    logps, stats = tiles.logps(z, labels, map)
    assert torch.equal(z.view(torch.int32), before.view(torch.int32))
    check_budget("logps", logps, plain_logps, truth_logps, draws=True)

    apart = z.new_full((z.shape[0], z.stride(0)), float("nan"))[:, : z.shape[1]].copy_(z)
    dz = tiles.gradient_(apart, labels, stats, g, map, dtype)
    assert dz.dtype == dtype and dz.data_ptr() == apart.data_ptr()
    check_budget("dz", dz, plain_dz, truth_dz, draws=True)

    same_logps, same_dz = tiles.logps_gradient_(z, labels, g, map, dtype)
    assert same_dz.data_ptr() == z.data_ptr()
    assert torch.equal(same_logps, logps) or logps.isnan().any()
    check_budget("dz", same_dz, plain_dz, truth_dz, draws=True)


SHAPES = [  # n, V, pitch, offset in floats: what makes rows aligned, and not
    (3, 1, 0, 0),
    (2, 7, 0, 0),
    (3, 96, 0, 0),
    (5, 1000, 1004, 0),
    (4, 1000, 1001, 0),
    (3, 1003, 1008, 4),
    (3, 3001, 3001, 1),
    (2, 4096, 0, 2),
    (1, 8189, 0, 0),
    (2, 16390, 16392, 8),
]
MAPS = {
    "plain": lambda vocab: LogitMap(),
    "scale": lambda vocab: LogitMap(scale=0.25),
    "softcap": lambda vocab: LogitMap(scale=1.5, softcap=5.0),
    "bias": lambda vocab: LogitMap(torch.linspace(-1, 1, vocab)),
    "all": lambda vocab: LogitMap(torch.linspace(-1, 1, vocab).bfloat16(), 1.5, 8.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n, vocab, pitch, offset", SHAPES)
def test_any_size_and_pitch(tiles, n, vocab, pitch, offset, dtype):
    check_all(tiles.run_as(), *make(n, vocab, pitch, offset), LogitMap(), dtype)


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("vocab", [203, 1000])
def test_logit_maps(tiles, map, vocab):
    for dtype in (torch.float32, torch.bfloat16):
        check_all(tiles.run_as(), *make(3, vocab), MAPS[map](vocab), dtype)


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("n, vocab, pitch, offset", [(40, 7, 0, 0), (8, 1003, 1008, 4), (8, 3001, 3001, 1)])
def test_what_is_asked_for_beside_and_affine_gradients(tiles, n, vocab, pitch, offset, map):
    z, labels, _ = make(n, vocab, pitch, offset)
    if vocab > 500:
        extreme_rows(z, labels)
    for descending, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        for classes in (None, class_weights(vocab)):
            asked = ASKED["all"]._replace(classes=classes)
            check_beside(tiles.run_as(descending=descending), z, labels, MAPS[map](vocab), asked, dtype)


def test_the_plain_gradient_is_one_of_the_family(tiles):
    z, labels, _ = make(4, 1000)
    check_plain_member(tiles.run_as(), z, labels, MAPS["all"](1000))


def test_a_bias_off_its_alignment(tiles):
    bias = torch.linspace(-1, 1, 1001)[1:]
    check_all(tiles.run_as(), *make(3, 1000), LogitMap(bias), torch.bfloat16)


def gradients(tiles, dtype, vocab, pitch, offset):
    z, labels, g = make(2, vocab, pitch, offset)
    _, stats = tiles.logps(z, labels, LogitMap())
    alone = tiles.gradient_(make(2, vocab, pitch, offset)[0], labels, stats, g, LogitMap(), dtype)
    logps, dz = tiles.logps_gradient_(z, labels, g, LogitMap(), dtype)
    return logps.clone(), dz.clone(), alone.clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab, offset", [(4096, 0), (4095, 1), (40000, 0), (130000, 0)])
def test_held_or_read_again_and_in_any_order_of_threads_the_bits_are_the_same(tiles, vocab, offset, dtype):
    """Shared memory for the whole row, a part or nothing; the results written over the row meet no row still unread."""
    expected = gradients(tiles.run_as(), dtype, vocab, vocab, offset)
    for shared_bytes in (227 << 10, 70 << 10, 9 << 10, 0):
        for descending in (False, True):
            again = gradients(tiles.run_as(shared_bytes, descending), dtype, vocab, vocab, offset)
            for a, b in zip(again, expected, strict=True):
                assert torch.equal(a, b), (shared_bytes, descending)


@pytest.mark.parametrize("mistake", ["turn - 1000000", "turn == 0 ? 0 : turn - 1"], ids=["none", "one turn late"])
def test_the_emulation_notices_a_missing_barrier(tmp_path, mistake):
    broken = tmp_path / "broken.cu"
    text, count = re.subn(r"must_wait\(turn, read_by_all\)", f"must_wait({mistake}, read_by_all)", SOURCE.read_text())
    assert count == 1
    broken.write_text(text)
    tiles = emulate(broken, tmp_path / "broken.so")
    outcomes = [gradients(tiles.run_as(0, descending), torch.bfloat16, 4095, 4095, 1) for descending in (False, True)]
    assert not all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_what_lies_between_rows_is_left_alone(tiles):
    z, labels, g = make(3, 1003, 1010, 2)
    gap = z.as_strided((3, 7), (1010, 1), z.storage_offset() + 1003).fill_(7.0)
    for dtype in (torch.bfloat16, torch.float32):
        tiles.run_as().logps_gradient_(z.normal_(), labels, g, LogitMap(), dtype)
        assert (gap == 7.0).all()
    second_half = z.view(torch.bfloat16)[:, 1003 : 2 * 1003]
    z.normal_()
    before = second_half[:, 1:].clone()
    tiles.logps_gradient_(z, labels, g, LogitMap(), torch.bfloat16)
    assert torch.equal(second_half[:, 1:].view(torch.int16), before.view(torch.int16))


EXTREMES = {
    "large": lambda z: z.mul_(2500.0),
    "one wins": lambda z: z.fill_(-1e4).index_fill_(1, torch.tensor([5]), 1e4),
    "all equal": lambda z: z.fill_(1e4),
    "mostly -inf": lambda z: z.masked_fill_(torch.arange(z.shape[1]) % 7 != 0, float("-inf")),
    "nothing finite": lambda z: z.fill_(float("-inf")),
    "a NaN": lambda z: z.index_fill_(1, torch.tensor([z.shape[1] - 1]), float("nan")),
    "only NaN": lambda z: z.fill_(float("nan")),
    "NaN and -inf": lambda z: z.fill_(float("-inf")).index_fill_(1, torch.tensor([3]), float("nan")),
    "+inf": lambda z: z.index_fill_(1, torch.tensor([11]), float("inf")),
}


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("vocab", [997, 1000])
def test_extremes(tiles, extreme, vocab):
    for dtype in (torch.float32, torch.bfloat16):
        z, labels, g = make(4, vocab)
        EXTREMES[extreme](z[1:3])  # the rows beside it must not notice
        labels[1], labels[2] = 0, 5
        check_all(tiles.run_as(), z, labels, g, LogitMap(), dtype)


def test_a_bias_of_minus_infinity_takes_a_token_out(tiles):
    bias = torch.zeros(1000)
    bias[::3] = float("-inf")
    z, labels, g = make(3, 1000)
    check_all(tiles.run_as(), z.clone(), labels // 3 * 3 + 1, g, LogitMap(bias), torch.bfloat16)
    _, dz = tiles.logps_gradient_(z, labels // 3 * 3 + 1, g, LogitMap(bias), torch.bfloat16)
    assert (dz[:, ::3] == 0).all()


def test_what_the_gpu_check_asks_for(tiles, monkeypatch):
    """Its cases for this back-end, here on the emulation: a GPU then starts with a script that fits the kernels."""
    monkeypatch.setattr("longpo_ops.ops.cuda_tiles._divergence_tiles", TorchTiles)
    rows = list(results(correctness.tile_rows(tiles.run_as(), REHEARSAL)))
    assert {row["backend"] for row in rows} == {"cuda"}
    assert [row for row in rows if row["status"] != "passed"] == []


def test_divergences_are_those_of_another_back_end(tiles, monkeypatch):
    """Whose scratch is counted: without triton that of the PyTorch form."""
    monkeypatch.setattr("longpo_ops.ops.dispatch._choose", lambda *_: tiles.run_as())
    monkeypatch.setattr("longpo_ops.ops.cuda_tiles._divergence_tiles", TorchTiles)
    device = torch.device("cuda")
    assert choose_backend(device, torch.float32, "cuda").name == "cuda"
    assert choose_backend(device, torch.float32, "cuda", divergence=True).name == "torch"


def test_no_rows(tiles):
    z = torch.empty(0, 50)
    none = torch.empty(0, dtype=torch.int64)
    assert tiles.run_as().logps(z, none, LogitMap())[1].shape == (0, 2)
    assert tiles.logps_gradient_(z, none, torch.empty(0), LogitMap(), torch.bfloat16)[1].shape == (0, 50)


def test_rows_more_than_2_to_the_31_elements_apart(tiles, tmp_path):
    """The address space of such a tile without its memory: a sparse file, of which two short rows are ever touched."""
    pitch, vocab = (1 << 31) + 8, 1000
    space = torch.from_file(str(tmp_path / "sparse"), shared=True, size=pitch + vocab, dtype=torch.float32)
    far = space.as_strided((2, vocab), (pitch, 1))
    near, labels, g = make(2, vocab)
    far.copy_(near)
    expected = tiles.run_as().logps_gradient_(near, labels, g, LogitMap(), torch.bfloat16)
    again = tiles.logps_gradient_(far, labels, g, LogitMap(), torch.bfloat16)
    assert torch.equal(again[0], expected[0]) and torch.equal(again[1], expected[1])


def test_sizes_that_cannot_be_are_refused(tiles):
    z, labels, _ = make(2, 10)
    for n, vocab, pitch in ((-1, 10, 10), (1, 0, 10), (1, 10, 9), (1, (1 << 30) + 1, 1 << 31), (1 << 31, 10, 10)):
        tile = (z.data_ptr(), n, vocab, pitch, labels.data_ptr(), None, 1.0, 0.0)
        assert tiles._library.longpo_logps(*tile, None, None, None) == 1  # cudaErrorInvalidValue


@pytest.mark.parametrize("n", [0, 1, 31, 5000])
def test_segment_sums(tiles, n):
    generator = torch.Generator().manual_seed(n)
    values, segments = torch.randn(n, generator=generator), torch.randint(-1, 4, (n,), generator=generator)
    out = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)  # nothing belongs to the last
    expected = out.clone()
    TorchTiles().segment_sums(values, segments, expected)
    repeats = [out.clone() for _ in range(2)]
    for result, descending in zip(repeats, (False, True), strict=True):
        tiles.run_as(descending=descending).segment_sums(values, segments, result)
    assert torch.equal(*repeats)
    assert (repeats[0] - expected).abs().max() <= 1e-12
