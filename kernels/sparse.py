"""The hidden gradient from the columns that matter (equations: longpo_ops/ops/sparse.py), without a wait for the GPU.

    dz (n, V)  ->  1 / s_t  ->  peaks_j = max_t |dz_tj| / s_t  ->  kept columns, their number K  ->  r_t  ->  c_g and shares
               ->  dh_t = sum over kept j of dz_tj W_j  +  share_t (c_g W)

dz in float32, bfloat16 or float16, W (V, H) in dz's dtype, dh (n, H) in dz's dtype, sums in float32. K never leaves the
device: the product's loop ends at a number that it loads. Where all columns are to be kept, the list has all of them, r and
c are 0, and the same product is the exact one. No atomics, every sum in one fixed order: bitwise repeatable.

16-bit dz is the first half of float32 rows, so elements [V, 2 V) of a row are free: kept columns are moved there, where no
kernel reads what another thread of it writes. For float32 dz, and where the pitch has no such half, the product gathers dz
as it gathers W.

Operations 2 n K H and 2 G V H (that one is the vendor's). Bytes from HBM, B the size of a number of dz: B n V for the scales
(their second look finds the row in L2), as much for each of peaks, r and c, and for r the moved 2 B n K. Scratch: 12 V + B G V
bytes, 12 n, B G H. A weight whose columns are not neighbours gets the dense product. No float64.

Tests: tests/kernels/test_sparse.py, tests/kernels/test_compile.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from longpo_ops.kernels.launch import capability, check_rows, on_device

PER_CALL = ("n", "size")
SCALES, LIST = (4096, 8), (4096, 16)  # columns at a time, warps
REST = (4, 1024, 8)  # rows, columns at a time, warps: rows share what is read of the columns
COLUMNS = (32, 128, 4)  # the same, of the kernels that go down the rows


class Product(NamedTuple):
    """One program per tile of dh, summing over `inner` kept columns at a time."""

    rows: int
    units: int
    inner: int
    group: int  # row tiles that run side by side over the same units
    warps: int
    stages: int


# By architecture: 16-bit operands. Registers: tests/kernels/test_compile.py.
_AMPERE = Product(128, 128, 32, 8, 8, 4)
_BLACKWELL = Product(128, 128, 64, 8, 8, 3)  # twice the units spill there
PRODUCTS = {80: _AMPERE, 90: Product(128, 256, 64, 8, 8, 3), 100: _BLACKWELL, 120: _AMPERE}
EXACT = Product(64, 64, 16, 8, 4, 3)  # float32 operands


class Kept(NamedTuple):
    """What stands for dz, all of it on the device."""

    count: torch.Tensor  # (1,) int32, K
    columns: torch.Tensor  # (V,) int32: the first K are the kept ones, increasing
    sums: torch.Tensor  # (G, V) c_g in dz's dtype, 0 in kept columns
    shares: torch.Tensor  # (n,) float32, r_t / rho_g
    shift: int | None  # elements from dz's columns to where the kept ones lie, unless K = V; None: they were not moved


@triton.jit
def scale_kernel(dz_ptr, inverse_ptr, V, pitch, floor, BLOCK: tl.constexpr):
    """1 / s_t of one row; 0 of a row of zeros, NaN of one that is not finite. In units of the row's largest number, so that
    nothing overflows, and without it from the start, so that nothing cancels."""
    row = tl.program_id(0).to(tl.int64)
    dz_ptr += row * pitch
    lanes = tl.arange(0, BLOCK)
    tops = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(dz_ptr + start + lanes, mask=start + lanes < V, other=0.0).to(tl.float32)
        tops = tl.maximum(tops, tl.abs(x))
    top = tl.max(tops, 0)
    unit = 1.0 / top
    squares = tl.zeros((BLOCK,), tl.float32)
    equals = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.abs(tl.load(dz_ptr + start + lanes, mask=start + lanes < V, other=0.0).to(tl.float32))
        is_top = x == top
        part = x * unit
        squares += tl.where(is_top, 0.0, part * part)
        equals += tl.where(is_top, 1.0, 0.0)
    rest = tl.sum(squares, 0) + (tl.sum(equals, 0) - 1.0)
    inverse = tl.where(top > 0, 1.0 / (top * tl.maximum(tl.sqrt(rest), floor)), 0.0)
    finite = (rest == rest) & (top < float("inf"))  # a NaN is no top: it ends in rest
    tl.store(inverse_ptr + row, tl.where(finite, inverse, float("nan")))


@triton.jit(do_not_specialize=PER_CALL)
def peak_kernel(dz_ptr, inverse_ptr, peaks_ptr, n, V, pitch, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """max_t |dz_tj| / s_t of some columns j."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < V
    peaks = tl.zeros((ROWS, COLUMNS), tl.float32)
    for row0 in range(0, n, ROWS):
        rows = row0 + tl.arange(0, ROWS).to(tl.int64)
        at = dz_ptr + rows[:, None] * pitch + columns[None, :]
        x = tl.load(at, mask=(rows < n)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + rows, mask=rows < n, other=0.0)
        peaks = tl.maximum(peaks, tl.abs(x) * inverse[:, None])
    tl.store(peaks_ptr + columns, tl.max(peaks, 0), mask=inside)


@triton.jit(do_not_specialize=PER_CALL)
def list_kernel(peaks_ptr, inverse_ptr, columns_ptr, places_ptr, count_ptr, n, V, most, epsilon, BLOCK: tl.constexpr):
    """One program: which columns are kept, and the place of each in the list, -1 where it is dropped."""
    lanes = tl.arange(0, BLOCK)
    bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n, BLOCK):
        inverse = tl.load(inverse_ptr + start + lanes, mask=start + lanes < n, other=0.0)
        bad += tl.where(inverse < float("inf"), 0, 1)
    above = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, V, BLOCK):
        peaks = tl.load(peaks_ptr + start + lanes, mask=start + lanes < V, other=0.0)
        above += tl.where(peaks > epsilon, 1, 0)
    everything = (tl.sum(above, 0) > most) | (tl.sum(bad, 0) > 0)
    count = 0
    for start in range(0, V, BLOCK):
        columns = start + lanes
        peaks = tl.load(peaks_ptr + columns, mask=columns < V, other=0.0)
        kept = ((peaks > epsilon) | everything) & (columns < V)
        one = tl.where(kept, 1, 0)
        places = count + tl.cumsum(one, 0) - 1
        tl.store(places_ptr + columns, tl.where(kept, places, -1), mask=columns < V)
        tl.store(columns_ptr + places, columns, mask=kept)
        count += tl.sum(one, 0)
    tl.store(count_ptr, count)


@triton.jit(do_not_specialize=PER_CALL)
def rest_kernel(
    dz_ptr, places_ptr, count_ptr, totals_ptr, n, V, pitch, shift, MOVE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """r_t of some rows, 0 where all columns are kept; with MOVE the kept columns go to places `shift` on."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    stop = tl.where(tl.load(count_ptr) == V, 0, V)
    dz_rows = dz_ptr + rows[:, None] * pitch
    totals = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, stop, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        places = tl.load(places_ptr + columns, mask=columns < V, other=0)
        inside = (rows < n)[:, None] & (columns < V)[None, :]
        x = tl.load(dz_rows + columns[None, :], mask=inside, other=0.0)
        totals += tl.where((places < 0)[None, :], x.to(tl.float32), 0.0)
        if MOVE:
            tl.store(dz_rows + (shift + places)[None, :], x, mask=inside & (places >= 0)[None, :])
    tl.store(totals_ptr + rows, tl.sum(totals, 1), mask=rows < n)


@triton.jit(do_not_specialize=PER_CALL)
def sums_kernel(
    dz_ptr, inverse_ptr, places_ptr, count_ptr, totals_ptr, sums_ptr, shares_ptr, n, size, V, pitch,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """c_g of some columns and one group; the first columns' program makes the group's shares."""
    group = tl.program_id(1)
    first, last = group * size, tl.minimum(group * size + size, n)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    dropped = tl.load(places_ptr + columns, mask=columns < V, other=0) < 0
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for row0 in range(first, tl.where(tl.load(count_ptr) == V, first, last), ROWS):
        rows = row0 + tl.arange(0, ROWS).to(tl.int64)
        total = tl.load(totals_ptr + rows, mask=rows < last, other=0.0)
        inverse = tl.load(inverse_ptr + rows, mask=rows < last, other=0.0)
        at = dz_ptr + rows[:, None] * pitch + columns[None, :]
        x = tl.load(at, mask=(rows < last)[:, None] & dropped[None, :], other=0.0).to(tl.float32)
        sums += x * tl.where(total < 0, -inverse, inverse)[:, None]
    tl.store(sums_ptr + group * V + columns, tl.sum(sums, 0), mask=columns < V)
    if tl.program_id(0) == 0:
        masses = tl.zeros((ROWS,), tl.float32)
        for row0 in range(first, last, ROWS):
            rows = row0 + tl.arange(0, ROWS).to(tl.int64)
            total = tl.load(totals_ptr + rows, mask=rows < last, other=0.0)
            masses += tl.abs(total) * tl.load(inverse_ptr + rows, mask=rows < last, other=0.0)
        mass = tl.sum(masses, 0)
        for row0 in range(first, last, ROWS):
            rows = row0 + tl.arange(0, ROWS).to(tl.int64)
            total = tl.load(totals_ptr + rows, mask=rows < last, other=0.0)
            tl.store(shares_ptr + rows, tl.where(mass > 0, total / mass, 0.0), mask=rows < last)


@triton.jit
def _add_product(acc, at_dz, at_weight, columns_ptr, k, rows_in, units_in, weight_pitch, count,
                 GATHER: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """acc += dz[:, k] W[columns of k]. WHOLE: every k is below count, and loads along them stay as wide as they can be."""
    if WHOLE:
        columns = tl.load(columns_ptr + k)
        dz_in, weight_in = rows_in, units_in
    else:
        columns = tl.load(columns_ptr + k, mask=k < count, other=0)
        dz_in, weight_in = rows_in & (k < count)[None, :], units_in & (k < count)[:, None]
    where = columns if GATHER else k
    a = tl.load(at_dz + where[None, :], mask=dz_in, other=0.0)
    b = tl.load(at_weight + columns.to(tl.int64)[:, None] * weight_pitch, mask=weight_in, other=0.0)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=PER_CALL)
def product_kernel(
    dz_ptr,  # (n, V)
    weight_ptr,  # (V, H)
    columns_ptr,  # (V,) int32
    count_ptr,  # (1,) int32
    shares_ptr,  # (n,) float32
    of_groups_ptr,  # (G, H)
    dh_ptr,  # (n, H)
    n,
    size,  # rows of a group
    V,
    H,
    dz_pitch,
    weight_pitch,
    shift,
    GATHER: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    unit_tiles = tl.cdiv(H, UNITS)
    within = tl.program_id(0) % (GROUP * unit_tiles)
    row_tile = tl.program_id(0) // (GROUP * unit_tiles) * GROUP
    members = min(tl.cdiv(n, ROWS) - row_tile, GROUP)
    rows = (row_tile + within % members).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    units = within // members * UNITS + tl.arange(0, UNITS)
    rows_in, units_in = (rows < n)[:, None], (units < H)[None, :]

    count = tl.load(count_ptr)
    at_dz = dz_ptr + rows[:, None] * dz_pitch + tl.where(count == V, 0, shift)
    at_weight = weight_ptr + units[None, :]
    inner = tl.arange(0, INNER)
    acc = tl.zeros((ROWS, UNITS), tl.float32)
    whole = count // INNER * INNER
    for k0 in range(0, whole, INNER):
        acc = _add_product(
            acc, at_dz, at_weight, columns_ptr, k0 + inner, rows_in, units_in, weight_pitch, count, GATHER, True, PRECISION
        )  # fmt: skip
    acc = _add_product(
        acc, at_dz, at_weight, columns_ptr, whole + inner, rows_in, units_in, weight_pitch, count, GATHER, False, PRECISION
    )  # fmt: skip

    share = tl.load(shares_ptr + rows, mask=rows < n, other=0.0)[:, None]
    at = of_groups_ptr + (rows // size)[:, None] * H + units[None, :]
    of_group = tl.load(at, mask=(share != 0) & units_in, other=0.0).to(tl.float32)
    tl.store(dh_ptr + rows[:, None] * H + units[None, :], acc + share * of_group, mask=rows_in & units_in)


def keep_columns_(dz, rule):
    """dz (n, V), rule (longpo_ops/ops/sparse.py) -> Kept; the second halves of dz's float32 rows are written over."""
    check_rows("dz", dz)
    if dz.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"dz: expected float32, float16 or bfloat16, got {dz.dtype}; the PyTorch back-end takes float64"
        )
    (n, V), pitch, most = dz.shape, dz.stride(0), int(rule.most * dz.shape[1])
    shift = triton.cdiv(V, 16) * 16  # the product reads 16-byte units
    if dz.itemsize != 2 or pitch < 2 * V or shift + most > 2 * V:
        shift = None
    size = triton.cdiv(n, rule.groups)
    inverse, totals, shares, peaks = (torch.empty(k, device=dz.device) for k in (n, n, n, V))
    columns, places, count = (torch.empty(k, device=dz.device, dtype=torch.int32) for k in (V, V, 1))
    sums = dz.new_empty(rule.groups, V)
    rows, width, warps = COLUMNS
    parts = triton.cdiv(V, width)
    with on_device(dz):
        scale_kernel[(n,)](dz, inverse, V, pitch, rule.floor, SCALES[0], num_warps=SCALES[1], num_stages=1)
        peak_kernel[(parts,)](dz, inverse, peaks, n, V, pitch, rows, width, num_warps=warps, num_stages=1)
        list_kernel[(1,)](
            peaks, inverse, columns, places, count, n, V, most, rule.epsilon, LIST[0], num_warps=LIST[1], num_stages=1
        )
        rest_kernel[(triton.cdiv(n, REST[0]),)](
            dz, places, count, totals, n, V, pitch, shift or 0, shift is not None, *REST[:2], num_warps=REST[2],
            num_stages=1,
        )  # fmt: skip
        sums_kernel[(parts, rule.groups)](
            dz, inverse, places, count, totals, sums, shares, n, size, V, pitch, rows, width, num_warps=warps, num_stages=1
        )  # fmt: skip
    return Kept(count, columns, sums, shares, shift)


def product(dz, kept, weight, of_groups, config=None):
    """dz (n, V) after keep_columns_, weight (V, H) and of_groups (G, H) in its dtype -> dh (n, H). `config`, a Product,
    replaces the architecture's own."""
    (n, V), (_, H) = dz.shape, weight.shape
    dh = torch.empty(n, H, device=dz.device, dtype=dz.dtype)
    if config is None:
        config = _config(dz, weight)
    tf32 = dz.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    with on_device(dz):
        product_kernel[(triton.cdiv(n, config.rows) * triton.cdiv(H, config.units),)](
            dz, weight, kept.columns, kept.count, kept.shares, of_groups, dh, n, triton.cdiv(n, of_groups.shape[0]), V, H,
            dz.stride(0), weight.stride(0), kept.shift or 0, GATHER=kept.shift is None,
            PRECISION="tf32" if tf32 else "ieee", ROWS=config.rows, UNITS=config.units, INNER=config.inner,
            GROUP=config.group, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return dh


def _config(dz, weight) -> Product:
    """The newest architecture's that is not newer than the device; sm_80's has room for the addresses of single elements."""
    if dz.dtype == torch.float32:
        return EXACT
    aligned = all(t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0 for t in (dz, weight))
    found = capability(dz.device) if aligned else 80
    return PRODUCTS[max(key for key in PRODUCTS if key <= found)]


def sparse_gradient(dz, products, rule):
    """dz (n, V) -> dh (n, H) from the columns that matter; few rows, and a weight that is not row-major, get the dense product.

    products: hidden_gradient(dz) and weight as longpo_ops/ops/products.py has them; rule: see longpo_ops/ops/sparse.py.
    Raises ValueError for another dtype or layout of dz.
    """
    weight = products.weight
    if dz.shape[0] < rule.least_rows or (weight.stride(1) != 1 and weight.shape[1] > 1):
        return products.hidden_gradient(dz)
    kept = keep_columns_(dz, rule)
    return product(dz, kept, weight, products.hidden_gradient(kept.sums))
