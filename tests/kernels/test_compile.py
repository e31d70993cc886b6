"""Every Triton kernel compiled ahead of time for sm_80, sm_90a and sm_100a, within written budgets; no GPU is needed.

Run as a process of its own, without TRITON_INTERPRET: pytest tests/kernels/test_compile.py
"""

import functools
import importlib.util
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling ahead of time and TRITON_INTERPRET=1 cannot share a process", allow_module_level=True)
if importlib.util.find_spec("triton") is None and os.environ.get("CI") != "true":
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from longpo_ops.kernels import sparse
from longpo_ops.kernels.divergence import KINDS, divergence_kernel
from longpo_ops.kernels.launch import PAIR, ROW, MatmulConfig, linear_logps_config, row_config, scaled_exps_config
from longpo_ops.kernels.linear_logps import join_kernel, partial_kernel
from longpo_ops.kernels.row_epilogue import row_kernel
from longpo_ops.kernels.scaled_exps import exps_kernel, finish_kernel, offset_kernel, scaled_exps
from longpo_ops.kernels.segment_sums import BLOCK as SEGMENT_BLOCK
from longpo_ops.kernels.segment_sums import segment_kernel
from longpo_ops.kernels.tiles import TritonTiles
from longpo_ops.ops.sparse import RULE
from longpo_ops.ops.tiles import Beside, Divergence, LogitMap

ARCHITECTURES = (80, 90, 100)
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have
MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}

# Registers per thread, as measured with triton 3.6.0: sm_80, sm_90a, sm_100a. More is a regression to look at.
REGISTERS = {
    "rows: logps, long": (32, 32, 32),
    "rows: gradient, long, bf16": (32, 32, 31),
    "rows: gradient, kept, bf16": (63, 55, 58),
    "rows: both, long, bf16": (32, 44, 40),
    "rows: both, long, fp16": (32, 44, 40),
    "rows: both, long, fp32": (32, 42, 44),
    "rows: both, long, bf16, mapped": (45, 43, 48),
    "rows: both, kept, bf16": (64, 64, 63),
    "rows: both, kept, fp16": (64, 64, 63),
    "rows: both, kept, fp32": (32, 32, 32),
    "rows: both, kept, bf16, mapped": (64, 64, 55),
    "rows: both, short, bf16, mapped": (48, 48, 48),
    "rows: both, long, bf16, unaligned": (47, 43, 43),
    "rows: both, kept, bf16, unaligned": (32, 55, 43),
    "rows: both, kept, fp32, unaligned, mapped": (63, 64, 53),
    "rows: predicted, long": (31, 30, 32),
    "rows: all beside, long, mapped": (54, 51, 54),
    "rows: all beside, kept, mapped": (62, 64, 59),
    "rows: affine, long, bf16": (30, 32, 30),
    "rows: affine, long, bf16, mapped": (46, 41, 32),
    "rows: affine, kept, bf16, mapped": (63, 64, 64),
    "rows: affine, kept, fp32, unaligned, mapped": (64, 64, 64),
    "divergence: forward, bf16": (32, 32, 32),
    "divergence: forward, student, bf16": (32, 32, 32),
    "divergence: reverse, fp16, mapped": (41, 41, 42),
    "divergence: jsd, bf16, mapped": (50, 42, 44),
    "divergence: jsd, fp32, mapped": (42, 41, 42),
    "linear: bf16": (229, 255, 158),
    "linear: fp16": (229, 255, 158),
    "linear: bf16, nested": (238, 255, 189),
    "linear: bf16, mapped": (232, 160, 212),
    "linear: fp16, mapped": (232, 160, 212),
    "linear: bf16, unaligned, mapped": (255, 226, 225),
    "linear: fp32, mapped": (168, 168, 158),
    "linear: fp32, tf32": (128, 96, 96),
    "linear: join": (30, 32, 29),
    "exps: bf16": (208, 217, 230),
    "exps: bf16, mapped": (210, 246, 255),
    "exps: bf16, unaligned, mapped": (215, 196, 163),
    "exps: fp32, mapped": (168, 168, 163),
    "exps: offsets": (30, 30, 32),
    "exps: finish": (46, 56, 42),
    "sparse: scales": (56, 62, 56),
    "sparse: peaks": (64, 64, 66),
    "sparse: list": (62, 64, 64),
    "sparse: rest": (93, 96, 95),
    "sparse: sums": (106, 89, 91),
    "sparse: product, bf16": (158, 246, 156),
    "sparse: product, fp32": (96, 96, 94),
    "segment sums": (64, 72, 72),
}

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Compiled(NamedTuple):
    registers: int
    spilled: int  # bytes of stack and local memory
    shared: int
    ttir: str
    ptx: str


class Case(NamedTuple):
    """One kernel with the types of its arguments and its constants; ":16" marks a pointer or number divisible by 16."""

    kernel: object
    arguments: dict
    warps: int
    stages: int = 1

    def compile(self, architecture: int) -> Compiled:
        names = self.kernel.arg_names
        constants = {p.name: self.arguments[p.name] for p in self.kernel.params if p.is_constexpr}
        types = {name: "constexpr" if name in constants else self.arguments[name] for name in names}
        signature = {name: kind.removesuffix(":16") for name, kind in types.items()}
        divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].endswith(":16")}
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=divisible)
        options = {"num_warps": self.warps, "num_stages": self.stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        usage = resources(compiled.asm["cubin"])
        spilled = usage["STACK"] + usage["LOCAL"]
        return Compiled(usage["REG"], spilled, compiled.metadata.shared, compiled.asm["ttir"], compiled.asm["ptx"])


def resources(cubin: bytes, folder: Path = Path(triton.__file__).parent / "backends/nvidia/bin") -> dict[str, int]:
    """What cuobjdump says of a cubin's one kernel: REG, STACK, LOCAL, ..."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        read = subprocess.run([folder / "cuobjdump", "-res-usage", file.name], capture_output=True, check=True)
    line = next(line for line in (read.stdout + read.stderr).decode().splitlines() if "REG:" in line)
    return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", line)}


def row_case(V, mapped, dtype, score, gradient, unit=":16", asked=(), affine=False) -> Case:
    """asked: of mean, total and predicted. affine and total have class weights."""
    more = affine or bool(asked)
    config = row_config(V, mapped or dtype == "fp32" or not unit or more, PAIR if more else ROW)
    arguments = {"z_ptr": "*fp32:16", "out_ptr": f"*{dtype}:16", "labels_ptr": "*i64:16", "g_ptr": "*fp32:16"}
    arguments |= {"logps_ptr": "*fp32:16", "stats_ptr": "*fp32:16", "bias_ptr": "*bf16:16", "V": f"i32{unit}"}
    arguments |= {"pitch": f"i32{unit}", "out_pitch": f"i32{unit}", "inner": "fp32", "cap": "fp32"}
    arguments |= {"HAS_BIAS": mapped, "CAPPED": mapped, "SCORE": score, "GRADIENT": gradient, "classes_ptr": "*fp32:16"}
    arguments |= {name: name.lower() in asked for name in ("MEAN", "TOTAL", "PREDICTED")} | {"AFFINE": affine}
    arguments |= {"HAS_CLASSES": affine or "total" in asked, "COLUMNS": 5 if asked else 2}
    return Case(row_kernel, arguments | {"RESIDENT": config.block >= V, "BLOCK": config.block}, config.warps)


def divergence_case(kind, mapped, dtype, student=True, teacher=True) -> Case:
    arguments = {"kappa_ptr": "*fp32:16", "values_ptr": "*fp32:16", "V": "i32:16", "wq": "fp32", "wp": "fp32"}
    for t in ("", "_t"):
        arguments |= {f"z{t}_ptr": "*fp32:16", f"out{t}_ptr": f"*{dtype}:16", f"bias{t}_ptr": "*bf16:16"}
        arguments |= {f"pitch{t}": "i32:16", f"out_pitch{t}": "i32:16", f"inner{t}": "fp32", f"cap{t}": "fp32"}
        arguments |= {f"HAS_BIAS{t.upper()}": mapped, f"CAPPED{t.upper()}": mapped}
    arguments |= {"KIND": KINDS[kind], "STUDENT": student, "TEACHER": teacher, "BLOCK": PAIR.block}
    return Case(divergence_kernel, arguments, PAIR.warps)


def linear_case(architecture, dtype, mapped, aligned=True, precision="ieee", flatten=True) -> Case:
    arguments, config = product_arguments(linear_logps_config, architecture, dtype, mapped, aligned, precision)
    return Case(partial_kernel, arguments | {"FLATTEN": flatten}, config.warps, config.stages)


def exps_case(architecture, dtype, mapped, aligned=True) -> Case:
    arguments, config = product_arguments(scaled_exps_config, architecture, dtype, mapped, aligned, "ieee")
    out = f"tensordesc<bf16[{config.rows}, {config.vocab // config.parts}]>" if config.descriptors else "*bf16:16"
    arguments |= {"offsets_ptr": "*fp32:16", "out": out, "out_pitch": "i32:16"}
    return Case(
        exps_kernel, arguments | {"FLATTEN": config.flatten, "PARTS": config.parts}, config.warps, config.stages
    )


def sparse_case(kernel, warps, dtype="bf16", stages=1, **constants) -> Case:
    """A kernel of kernels/sparse.py: dz and what is made in its dtype, 32-bit numbers beside."""
    own = {"dz_ptr", "weight_ptr", "sums_ptr", "of_groups_ptr", "dh_ptr"}
    whole = {"columns_ptr", "places_ptr", "count_ptr"}
    arguments = {
        name: f"*{dtype}:16" if name in own else "*i32:16" if name in whole else "*fp32:16" for name in kernel.arg_names
    }
    arguments |= dict.fromkeys(("n", "size", "most"), "i32") | dict.fromkeys(("floor", "epsilon"), "fp32")
    arguments |= dict.fromkeys(("V", "H", "pitch", "shift", "dz_pitch", "weight_pitch"), "i32:16")
    return Case(kernel, arguments | constants, warps, stages)


def sparse_product_case(config, dtype) -> Case:
    constants = {"GATHER": dtype == "fp32", "PRECISION": "ieee"}
    constants |= {"ROWS": config.rows, "UNITS": config.units, "INNER": config.inner, "GROUP": config.group}
    return sparse_case(sparse.product_kernel, config.warps, dtype, config.stages, **constants)


def product_arguments(choose, architecture, dtype, mapped, aligned, precision) -> tuple[dict, MatmulConfig]:
    config = choose(architecture, FLOATS[dtype], mapped, aligned)
    unit = ":16" if aligned else ""
    arguments = dict.fromkeys(("hidden", "weight"), f"*{dtype}{unit}")
    if config.descriptors:
        arguments = {
            name: f"tensordesc<{dtype}[{rows}, {config.inner}]>"
            for name, rows in (("hidden", config.rows), ("weight", config.vocab))
        }
    arguments |= {"labels_ptr": "*i64:16", "bias_ptr": "*bf16:16", "peaks_ptr": "*fp32:16", "sums_ptr": "*fp32:16"}
    arguments |= {"label_logits_ptr": "*fp32:16", "n": "i32", "V": f"i32{unit}", "H": f"i32{unit}", "splits": "i32"}
    arguments |= {"hidden_pitch": f"i32{unit}", "weight_pitch": f"i32{unit}", "inner": "fp32", "cap": "fp32"}
    arguments |= {"HAS_BIAS": mapped, "CAPPED": mapped, "DESCRIPTORS": config.descriptors, "PRECISION": precision}
    arguments |= {"ROWS": config.rows, "VOCAB": config.vocab, "INNER": config.inner, "GROUP": config.group}
    return arguments, config


OFFSET = {f"{name}_ptr": "*bf16:16" for name in ("hidden", "weight", "bias")} | {"labels_ptr": "*i64:16"}
OFFSET |= {
    "offsets_ptr": "*fp32:16",
    "label_logits_ptr": "*fp32:16",
    "H": "i32:16",
    "hidden_pitch": "i32:16",
    "weight_pitch": "i32:16",
    "inner": "fp32",
}
OFFSET |= {"cap": "fp32", "HAS_BIAS": True, "CAPPED": True, "BLOCK": 1024}
FINISHED = ("offsets", "peaks", "sums", "label_logits", "logps", "stats", "totals")
FINISH = {f"{name}_ptr": "*fp32:16" for name in FINISHED} | {"out_ptr": "*bf16:16", "labels_ptr": "*i64:16"}
FINISH |= {"n": "i32", "V": "i32:16", "out_pitch": "i32:16", "cap": "fp32", "CAPPED": True, "ROWS": 16, "TILES": 64}
SEGMENT = {"values_ptr": "*fp32:16", "segments_ptr": "*i64:16", "out_ptr": "*fp64:16", "n": "i32"}
JOIN = {f"{name}_ptr": "*fp32:16" for name in ("peaks", "sums", "label_logits", "logps", "stats")}
DOWN = {"ROWS": sparse.COLUMNS[0], "COLUMNS": sparse.COLUMNS[1]}
LONG, KEPT = 128256, 32000  # columns
ALL = ("mean", "total", "predicted")

CASES = {
    "rows: logps, long": lambda _: row_case(LONG, False, "fp32", True, False),
    "rows: gradient, long, bf16": lambda _: row_case(LONG, False, "bf16", False, True),
    "rows: gradient, kept, bf16": lambda _: row_case(KEPT, False, "bf16", False, True),
    "rows: both, long, bf16": lambda _: row_case(LONG, False, "bf16", True, True),
    "rows: both, long, fp16": lambda _: row_case(LONG, False, "fp16", True, True),
    "rows: both, long, fp32": lambda _: row_case(LONG, False, "fp32", True, True),
    "rows: both, long, bf16, mapped": lambda _: row_case(LONG, True, "bf16", True, True),
    "rows: both, kept, bf16": lambda _: row_case(KEPT, False, "bf16", True, True),
    "rows: both, kept, fp16": lambda _: row_case(KEPT, False, "fp16", True, True),
    "rows: both, kept, fp32": lambda _: row_case(KEPT // 2, False, "fp32", True, True),
    "rows: both, kept, bf16, mapped": lambda _: row_case(KEPT // 2, True, "bf16", True, True),
    "rows: both, short, bf16, mapped": lambda _: row_case(1000, True, "bf16", True, True),
    "rows: both, long, bf16, unaligned": lambda _: row_case(LONG, False, "bf16", True, True, unit=""),
    "rows: both, kept, bf16, unaligned": lambda _: row_case(KEPT // 2, False, "bf16", True, True, unit=""),
    "rows: both, kept, fp32, unaligned, mapped": lambda _: row_case(KEPT // 2, True, "fp32", True, True, unit=""),
    "rows: predicted, long": lambda _: row_case(LONG, False, "fp32", True, False, asked=("predicted",)),
    "rows: all beside, long, mapped": lambda _: row_case(LONG, True, "fp32", True, False, asked=ALL),
    "rows: all beside, kept, mapped": lambda _: row_case(KEPT // 2, True, "fp32", True, False, asked=ALL),
    "rows: affine, long, bf16": lambda _: row_case(LONG, False, "bf16", False, True, affine=True),
    "rows: affine, long, bf16, mapped": lambda _: row_case(LONG, True, "bf16", False, True, affine=True),
    "rows: affine, kept, bf16, mapped": lambda _: row_case(KEPT // 2, True, "bf16", False, True, affine=True),
    "rows: affine, kept, fp32, unaligned, mapped": lambda _: row_case(
        KEPT // 2, True, "fp32", False, True, unit="", affine=True
    ),
    "divergence: forward, bf16": lambda _: divergence_case("forward", False, "bf16"),
    "divergence: forward, student, bf16": lambda _: divergence_case("forward", False, "bf16", True, False),
    "divergence: reverse, fp16, mapped": lambda _: divergence_case("reverse", True, "fp16"),
    "divergence: jsd, bf16, mapped": lambda _: divergence_case("jsd", True, "bf16"),
    "divergence: jsd, fp32, mapped": lambda _: divergence_case("jsd", True, "fp32"),
    "linear: bf16": lambda a: linear_case(a, "bf16", False),
    "linear: fp16": lambda a: linear_case(a, "fp16", False),
    "linear: bf16, nested": lambda a: linear_case(a, "bf16", False, flatten=False),
    "linear: bf16, mapped": lambda a: linear_case(a, "bf16", True),
    "linear: fp16, mapped": lambda a: linear_case(a, "fp16", True),
    "linear: bf16, unaligned, mapped": lambda a: linear_case(a, "bf16", True, aligned=False),
    "linear: fp32, mapped": lambda a: linear_case(a, "fp32", True),
    "linear: fp32, tf32": lambda a: linear_case(a, "fp32", False, precision="tf32"),
    "linear: join": lambda _: Case(join_kernel, JOIN | {"n": "i32", "splits": "i32", "ROWS": 128}, 4, 3),
    "exps: bf16": lambda a: exps_case(a, "bf16", False),
    "exps: bf16, mapped": lambda a: exps_case(a, "bf16", True),
    "exps: bf16, unaligned, mapped": lambda a: exps_case(a, "bf16", True, aligned=False),
    "exps: fp32, mapped": lambda a: exps_case(a, "fp32", True),
    "exps: offsets": lambda _: Case(offset_kernel, OFFSET, 4),
    "exps: finish": lambda a: Case(
        finish_kernel, FINISH | {"VOCAB": scaled_exps_config(a, torch.bfloat16, False).vocab}, 4
    ),
    "sparse: scales": lambda _: sparse_case(sparse.scale_kernel, sparse.SCALES[1], BLOCK=sparse.SCALES[0]),
    "sparse: peaks": lambda _: sparse_case(sparse.peak_kernel, sparse.COLUMNS[2], **DOWN),
    "sparse: list": lambda _: sparse_case(sparse.list_kernel, sparse.LIST[1], BLOCK=sparse.LIST[0]),
    "sparse: rest": lambda _: sparse_case(
        sparse.rest_kernel, sparse.REST[2], MOVE=True, ROWS=sparse.REST[0], BLOCK=sparse.REST[1]
    ),
    "sparse: sums": lambda _: sparse_case(sparse.sums_kernel, sparse.COLUMNS[2], **DOWN),
    "sparse: product, bf16": lambda a: sparse_product_case(sparse.PRODUCTS[a], "bf16"),
    "sparse: product, fp32": lambda _: sparse_product_case(sparse.EXACT, "fp32"),
    "segment sums": lambda _: Case(segment_kernel, SEGMENT | {"BLOCK": SEGMENT_BLOCK}, 8),
}


@functools.cache
def compiled(name: str, architecture: int) -> Compiled:
    return CASES[name](architecture).compile(architecture)


@pytest.fixture(autouse=True, scope="module")
def compile_anew():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_ALWAYS_COMPILE", "1")
        yield


def test_every_case_has_a_budget():
    assert REGISTERS.keys() == CASES.keys()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", CASES)
def test_budget(name, architecture):
    case = compiled(name, architecture)
    assert case.spilled == 0, f"{case.spilled} bytes of registers spill"
    if triton.__version__.startswith("3.6."):  # another compiler allocates otherwise; the rest holds for all
        assert case.registers <= REGISTERS[name][ARCHITECTURES.index(architecture)]
    assert case.shared <= SHARED[architecture]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "name", [name for name in CASES if name.split(": ")[0] in ("linear", "exps") and re.search("bf16|fp16", name)]
)
def test_products_run_on_tensor_cores(name, architecture):
    ptx = compiled(name, architecture).ptx
    assert MATRIX[architecture] in ptx
    bulk = "cp.async.bulk.tensor" in ptx  # TMA
    assert bulk == (architecture >= 90 and "unaligned" not in name)
    assert bulk or "unaligned" in name or "cp.async.cg" in ptx


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sparse_product_runs_on_tensor_cores(architecture):
    assert MATRIX[architecture] in compiled("sparse: product, bf16", architecture).ptx


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exact_products_and_tf32(architecture):
    exact = compiled("linear: fp32, mapped", architecture).ptx
    assert not any(instruction in exact for instruction in MATRIX.values())
    assert MATRIX[architecture] in compiled("linear: fp32, tf32", architecture).ptx


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "name", [name for name in CASES if name.startswith("rows") and "16" in name and "unal" not in name]
)
def test_a_barrier_stands_between_loads_and_narrow_stores(name, architecture):
    """16-bit gradients, stored two or four words at a time, land on float32 logits that other warps may not have loaded yet
    (see row_epilogue.py)."""
    events = re.findall(r"ld\.global|bar\.sync|st\.global\.v", compiled(name, architecture).ptx)
    stores = [i for i, event in enumerate(events) if event == "st.global.v"]
    assert stores
    for i in stores:
        before = [event for event in events[:i] if event != "st.global.v"]
        assert before[-1] == "bar.sync", "a load follows the barrier"


@pytest.mark.parametrize(
    "name",
    [
        "rows: both, long, bf16",
        "divergence: jsd, bf16, mapped",
        "linear: bf16, unaligned, mapped",
        "exps: bf16, unaligned, mapped",
    ],
)
def test_row_offsets_are_64_bit(name):
    """Pitches are 32-bit arguments here: they must be widened before anything is multiplied with them."""
    uses = [line for line in compiled(name, 80).ttir.splitlines() if re.match(r"\s*%\w+ = .*%\w*pitch", line)]
    assert uses and all("arith.extsi" in line and "i32 to i64" in line for line in uses)


@pytest.fixture
def variants(monkeypatch) -> set[str]:
    """What Triton compiles for the launches of a test, which do not take place: kernel, types and specialisation."""
    seen = set()
    backend = make_backend(GPUTarget("cuda", 90, 32))

    def run(kernel, *arguments, grid, warmup, **options):
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        seen.add(f"{kernel.fn.__name__} {bind(*arguments, **options)[1:]}")

    monkeypatch.setattr(JITFunction, "run", run)
    return seen


def launch_all(n: int, V: int = 4096, H: int = 64) -> None:
    """Every kernel once, on n rows of larger memory, as chunks are, and n sequences."""
    tiles, room = TritonTiles(), 512
    z, z_teacher = torch.empty(room, V)[:n], torch.empty(room, V)[:n]
    labels, g, maps = torch.zeros(n, dtype=torch.int64), torch.ones(n), (LogitMap(), LogitMap())
    _, stats = tiles.logps(z, labels, maps[0])
    tiles.gradient_(z, labels, stats, g, maps[0], torch.bfloat16)
    _, stats = tiles.logps(z, labels, maps[0], Beside(True, True, True))
    tiles.gradient_(z, labels, stats, torch.ones(n, 4), maps[0], torch.bfloat16)
    tiles.logps_gradient_(z, labels, g, maps[0], torch.bfloat16)
    tiles.divergence_(z, z_teacher, g, Divergence("jsd"), *maps, torch.bfloat16, True, True)
    tiles.linear_logps(torch.empty(n, H).bfloat16(), torch.empty(V, H).bfloat16(), labels, maps[0])
    exps = torch.empty(n, V, dtype=torch.bfloat16)
    scaled_exps(torch.empty(n, H).bfloat16(), torch.empty(V, H).bfloat16(), labels, maps[0], exps)
    dz, weight = z.view(torch.bfloat16)[:, :V], torch.empty(V, H).bfloat16()
    sparse.product(dz, sparse.keep_columns_(dz, RULE), weight, torch.empty(RULE.groups, H).bfloat16())
    tiles.segment_sums(g, labels, torch.zeros(n, dtype=torch.float64))


def test_the_number_of_rows_compiles_nothing_anew(variants):
    counts = []
    for n in (1, 15, 16, 130, 4096 // 8):
        launch_all(n)
        counts.append(len(variants))
    # five of rows, divergence, segments, two of linear_logps, three of scaled_exps, six of the sparse hidden gradient
    assert counts == [18] * len(counts)
