"""A tile of products h W^T on the tensor cores, and what a launch over such tiles needs: shared by linear_logps, scaled_exps.

    acc (ROWS, VOCAB) = sum over H of h (ROWS, INNER) W^T (INNER, VOCAB),  float32

h (n, H) any pitch, W (V, H), both bfloat16, float16 or float32. A program takes a tile of rows and every S-th tile of the
vocabulary.

Order of programs: `group` row tiles run side by side over the same vocabulary tiles, all starting at the same time and
taking equally long. So a tile of W comes from HBM once per group and is read by the others from L2, and the group's
hidden states (16 tiles of 128 rows, H = 4096: 16 MiB) stay in L2. S is chosen so that the last wave of programs is
nearly full.

Tests: tests/kernels/test_interpreter.py, tests/kernels/test_compile.py.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from longpo_ops.kernels.launch import MatmulConfig, capability, check, check_map, check_rows, is_mapped, processors


@triton.jit
def place(n, splits, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """-> this program's first row, and its part of the vocabulary."""
    row_tiles = tl.cdiv(n, ROWS)
    group = tl.program_id(0) // (GROUP * splits)
    within = tl.program_id(0) % (GROUP * splits)
    members = min(row_tiles - group * GROUP, GROUP)
    return (group * GROUP + within % members) * ROWS, within // members


@triton.jit
def tile_products(
    hidden, weight, row0, rows, column0, columns, n, V, H, hidden_pitch, weight_pitch,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, VOCAB: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """hidden, weight: descriptors, or pointers -> (ROWS, VOCAB) float32; beyond n and V zeros were read."""
    units = tl.arange(0, INNER)
    acc = tl.zeros((ROWS, VOCAB), tl.float32)
    for unit in range(0, H, INNER):
        if DESCRIPTORS:
            a = hidden.load([row0, unit])
            b = weight.load([column0, unit])
        else:
            left = unit + units < H
            at_a = hidden + rows[:, None] * hidden_pitch + (unit + units)[None, :]
            at_b = weight + columns.to(tl.int64)[:, None] * weight_pitch + (unit + units)[None, :]
            a = tl.load(at_a, mask=(rows < n)[:, None] & left[None, :], other=0.0)
            b = tl.load(at_b, mask=(columns < V)[:, None] & left[None, :], other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc


class Launch(NamedTuple):
    """How the tiles of some operands are launched."""

    config: MatmulConfig
    operands: tuple  # hidden, weight and what is written, if anything: as descriptors, or tensors
    row_tiles: int
    vocab_tiles: int
    splits: int
    options: dict  # arguments that every kernel over these tiles takes

    @property
    def grid(self) -> tuple[int]:
        return (self.row_tiles * self.splits,)


def check_operands(hidden, weight, labels, map) -> None:
    """Raises ValueError unless hidden is (n, H), weight (V, H) of its dtype, labels (n,) int64 and the map's bias (V,)."""
    check_rows("hidden", hidden)
    check_rows("weight", weight)
    if hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"hidden: expected bfloat16, float16 or float32, got {hidden.dtype}")
    (n, H), V = hidden.shape, weight.shape[0]
    if (weight.shape[1], weight.dtype, weight.device) != (H, hidden.dtype, hidden.device):
        raise ValueError(
            f"weight: expected {hidden.dtype} (V, {H}) on {hidden.device}, "
            f"got {weight.dtype} {tuple(weight.shape)} on {weight.device}"
        )
    check("labels", labels, (n,), torch.int64, hidden.device)
    check_map("map", map, hidden.device, V)


def plan_launch(hidden, weight, map, choose, config=None, out=None) -> Launch:
    """choose(capability, dtype, mapped, aligned) -> the MatmulConfig of an architecture; `config` replaces it.
    out (n, V): what the kernel writes tile by tile."""
    (n, H), V = hidden.shape, weight.shape[0]
    operands = (hidden, weight) if out is None else (hidden, weight, out)
    aligned = _describable(*operands)
    config = config or choose(capability(hidden.device), hidden.dtype, is_mapped(map), aligned)
    row_tiles, vocab_tiles = triton.cdiv(n, config.rows), triton.cdiv(V, config.vocab)
    splits = _splits(row_tiles, vocab_tiles, processors(hidden.device))
    descriptors = config.descriptors and aligned
    if descriptors:
        blocks = [config.rows, config.inner], [config.vocab, config.inner], [config.rows, config.vocab // config.parts]
        operands = tuple(TensorDescriptor.from_tensor(t, block) for t, block in zip(operands, blocks))
    tf32 = hidden.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    options = {
        "n": n, "V": V, "H": H, "hidden_pitch": hidden.stride(0), "weight_pitch": weight.stride(0), "splits": splits,
        "DESCRIPTORS": descriptors, "PRECISION": "tf32" if tf32 else "ieee", "ROWS": config.rows,
        "VOCAB": config.vocab, "INNER": config.inner, "GROUP": config.group, "FLATTEN": config.flatten,
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip
    return Launch(config, operands, row_tiles, vocab_tiles, splits, options)


@functools.cache
def _splits(row_tiles: int, vocab_tiles: int, processors: int) -> int:
    """Parts of the vocabulary: the least waves-of-programs x tiles-per-program, then the fewest parts.

    At most four waves' worth of programs, so that the partial results stay small whatever n is.
    """
    most = max(1, min(vocab_tiles, 4 * processors // row_tiles))
    return min(range(1, most + 1), key=lambda s: triton.cdiv(row_tiles * s, processors) * triton.cdiv(vocab_tiles, s))


def _describable(*tensors: torch.Tensor) -> bool:
    """TMA reads 16-byte units: base and pitch must be multiples of that."""
    return all(t.data_ptr() % 16 == 0 and t.stride(0) * t.itemsize % 16 == 0 for t in tensors)
