"""The three matrix products of a chunk of n rows, and nothing else.

    Z  = h W^T        (n, V)   float32 out of 16-bit operands (a bf16 logits tile costs 0.04-0.12 nats per token)
    dh = dZ W         (n, H)
    dW += dZ^T h      (V, H)   accumulated in float32

and dh of some of dZ's columns, which meet as many rows of W (sparse.py).

CUDA with 16-bit operands: the vendor's products with a float32 result. CPU with the C++ back-end: csrc/cpu/products.cpp for
bfloat16 where the processor multiplies it, and for float32 each product by that or by torch's (logits by slices of the head, a
thread each), whichever this processor is faster with (fastest.py). Elsewhere torch's products, 16-bit inputs in float32 (a bf16
product runs at 0.3 GFLOP/s on AVX2) with a weight upcast block by block of UPCAST_BYTES.

Tests: tests/ops/test_products.py, tests/ops/test_fastest.py.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .fastest import HEAD, HIDDEN, LOGITS, products_by_blocks

UPCAST_BYTES = 8 << 20
SLICE_BYTES = 4 << 20  # of a float32 weight per product on a CPU: 190 instead of 167 GFLOP/s at 384 rows, two threads
SOME_ROWS = 32  # below this torch's products on a CPU may add in one chain as long as the depth; csrc/cpu's never do
FEW_ROWS = 4  # below this the CPU's products add one number after another: ten times the rounding error at V = 128K


def multiplies_natively(weight: Tensor, dtype: torch.dtype, backend: str) -> bool:
    """Whether csrc/cpu multiplies this weight by operands of `dtype`: float32 at the processor's full rate, bfloat16 at
    twice that with AVX-512 BF16 or AMX, where pairs of columns are multiplied."""
    if backend != "cpu" or weight.dtype != dtype or weight.stride(1) != 1 or not _multiplies(dtype):
        return False
    return dtype == torch.float32 or (weight.shape[1] % 2 == 0 and weight.stride(0) % 2 == 0)


def is_row_major(matrix: Tensor) -> bool:
    """Whether a matrix' columns are neighbours and its rows do not overlap."""
    (rows, columns), (pitch, step) = matrix.shape, matrix.stride()
    return (step == 1 or columns == 1) and (pitch >= columns or rows == 1)


def row_major(matrix: Tensor) -> Tensor:
    """The matrix itself, or a copy that is row-major: what kernels read."""
    return matrix if is_row_major(matrix) else matrix.clone(memory_format=torch.contiguous_format)


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    return torch.ops.longpo_cpu.multiplies(dtype)


def operand_dtype(device: torch.device, dtype: torch.dtype, native: bool = False) -> torch.dtype:
    """What h, W and dZ are multiplied in for inputs of `dtype`."""
    if device.type == "cpu" and dtype.itemsize == 2 and not native:
        return torch.float32
    return dtype


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits, sums and losses of inputs of `dtype` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Products:
    """The products with one head weight (V, H), for inputs that count as `dtype`."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, backend: str = "torch"):
        self.native = multiplies_natively(weight, dtype, backend)
        self.by_blocks = products_by_blocks(dtype) if self.native else ()  # those of csrc/cpu
        self.dtype = operand_dtype(weight.device, dtype, self.native)
        self.tile_dtype = result_dtype(dtype)
        self.blockwise = weight.device.type == "cpu" and weight.dtype.itemsize < self.dtype.itemsize
        self.weight = weight if self.blockwise else weight.to(self.dtype)
        self.wide = self.dtype != self.tile_dtype  # 16-bit operands, float32 results

    def _by_blocks(self, product: str, rows: int) -> bool:
        return product in self.by_blocks or (self.native and rows < SOME_ROWS)

    def _blocks(self, columns: Tensor | None = None):
        """Row blocks of the weight in the operands' dtype, of all rows or of those that are named: which of them, and they."""
        vocab, width = self.weight.shape
        count = vocab if columns is None else columns.shape[0]
        on_cpu = self.weight.device.type == "cpu"
        room = UPCAST_BYTES if self.blockwise else SLICE_BYTES
        rows = max(1, room // (width * self.dtype.itemsize)) if on_cpu else max(1, count)
        shape = min(rows, count), width
        wide = self.weight.new_empty(shape, dtype=self.dtype) if self.blockwise else None
        gathered = None if columns is None else self.weight.new_empty(shape)  # one for all blocks
        for start in range(0, count, rows):
            block = slice(start, min(start + rows, count))
            weight = self.weight[block] if columns is None else gathered[: block.stop - start]
            if columns is not None:
                torch.index_select(self.weight, 0, columns[block], out=weight)
            yield block, wide[: weight.shape[0]].copy_(weight) if self.blockwise else weight

    def logits_(self, h: Tensor, out: Tensor) -> Tensor:
        """h (n, H) -> out (n, V) in tile_dtype."""
        if self._by_blocks(LOGITS, h.shape[0]):
            torch.ops.longpo_cpu.logits_(h, self.weight, out)
            return out
        if self.native:
            torch.ops.longpo_cpu.logits_by_slices_(h, self.weight, out)
            return out
        if self.wide:
            return torch.ops.aten.mm.dtype_out(h, self.weight.t(), torch.float32, out=out)
        h, n = _enough(h), h.shape[0]
        z = out if h.shape[0] == n else out.new_empty(h.shape[0], out.shape[1])
        for columns, weight in self._blocks():
            torch.mm(h, weight.t(), out=z[:, columns])
        return out if z is out else out.copy_(z[:n])

    def hidden_gradient(self, dz: Tensor, columns: Tensor | None = None, wide: bool = False) -> Tensor:
        """dz (n, V) -> (n, H) in the operands' dtype or in float32; with columns (K,) dz (n, K) meets those rows of W;
        `wide`: of all columns, in tile_dtype."""
        if wide and self.wide:
            dh = dz.new_empty(dz.shape[0], self.weight.shape[1], dtype=self.tile_dtype)
            return torch.ops.aten.mm.dtype_out(dz, self.weight, self.tile_dtype, out=dh)
        if self._by_blocks(HIDDEN, dz.shape[0]):
            dh = torch.empty(dz.shape[0], self.weight.shape[1])
            torch.ops.longpo_cpu.hidden_gradient_(dz, self.weight, columns, dh)
            return dh
        dz, n = _enough(dz), dz.shape[0]
        if not self.blockwise and columns is None:
            return (dz @ self.weight)[:n]
        dh = dz.new_zeros(dz.shape[0], self.weight.shape[1])
        for block, weight in self._blocks(columns):
            dh.addmm_(dz[:, block], weight)
        return dh[:n]

    def add_weight_gradient_(self, dw: Tensor, dz: Tensor, h: Tensor, first: bool = False) -> None:
        """dw (V, H) in tile_dtype += dz^T h; with `first` dw holds nothing yet, and a pass over it less is made."""
        if self._by_blocks(HEAD, dz.shape[0]):
            torch.ops.longpo_cpu.add_weight_gradient_(dw, dz, h, first)
            return
        dz, beta = dz.t(), float(not first)
        if not self.wide:
            torch.addmm(dw, dz, h, beta=beta, out=dw)
        elif _addmm_takes_float32(dz.device, dz.dtype):
            torch.ops.aten.addmm.dtype_out(dw, dz, h, torch.float32, beta=beta, out=dw)
        elif first:
            torch.ops.aten.mm.dtype_out(dz, h, torch.float32, out=dw)
        else:
            dw.add_(torch.mm(dz, h, out_dtype=torch.float32))


def _enough(rows: Tensor) -> Tensor:
    """On the CPU at least FEW_ROWS rows, the added ones zero."""
    missing = FEW_ROWS - rows.shape[0] if rows.device.type == "cpu" else 0
    return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]) if missing > 0 else rows


@functools.cache
def _addmm_takes_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether addmm accumulates 16-bit products into a float32 matrix: torch versions differ, so try it once."""
    a, c = torch.ones(16, 16, device=device, dtype=dtype), torch.ones(16, 16, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(c, a, a, torch.float32, out=c)
    except RuntimeError:
        return False
    return bool((c == 17).all())
