"""Exponentials of a tile of logits in 16 bits, from the epilogue of our own product: no logit reaches memory.

    l = f(h W^T + bias)    x = l log2(e)    K an integer offset of the row, near x_y
    E_j = bfloat16(2^(x_j - K) f'_j), j != y        E_y = bfloat16(-S' f'_y)        f'_j = 1, or 1 - (l_j / softcap)^2
    S' = sum over j != y of 2^(x_j - K)             S = S' + 2^(x_y - K)            logp = (l_y - K ln 2) - log S

so that the gradient by the products is dz_j = r E_j with one number a row, r = -g inner / S, inner the scale
(docs/mathematics.md has the derivation, the bounds and the time that is expected). S', S and logp are of float32
exponentials, not of rounded ones.

h (n, H) any pitch, W (V, H), both bfloat16, float16 or float32; labels (n,) int64; E (n, V) bfloat16, any pitch; logps, S
(n,), stats (n, 2) float32. Operations 2 n H V. Bytes: 2 n V written, 4 n H for the offsets, 16 n ceil(V / VOCAB) of partial
results, which are the scratch, too (half of it).

Three launches:
    offset_kernel  a row's l_y, a dot product of its hidden state and its label's row of W, and K = round(x_y)
    exps_kernel    the product, tile by tile as in linear_logps.py. A tile whose greatest x lies more than REACH above K is
                   scaled by K' = ceil(of it) instead. Stores E, and of every row and tile the peak and the sum
    finish_kernel  S', S, logp and stats of a row; moves its tiles to the greatest of their offsets, if any differ, by powers
                   of two; and writes E_y

Not covered: any other result dtype (float16's exponents do not reach), what is asked for beside a log-prob. A row whose
logits all lie below -2.9e6, or one above 2.9e6, can have NaN.

Tests: tests/kernels/test_scaled_exps.py, tests/kernels/test_compile.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from longpo_ops.kernels.launch import PER_CALL, check_rows, on_device, scaled_exps_config
from longpo_ops.kernels.logits import LOWEST, apply_map, load_bias, map_arguments
from longpo_ops.kernels.products import check_operands, place, plan_launch, tile_products

# ln 2 in two parts: K times the first, of 9 bits, is exact for |K| < 2^15, so l = 1e4 loses nothing in l - K ln 2.
HIGH = tl.constexpr(0.693359375)
LOW = tl.constexpr(-2.1219444005469057e-4)
LOG2E = tl.constexpr(1.4426950408889634)
REACH = tl.constexpr(48.0)  # powers of two above K that a tile may have: bfloat16 and float32 sums hold 127
FARTHEST = tl.constexpr(4194304.0)  # of K: whole numbers with room for REACH in float32


@triton.jit
def _offset(peak, own):
    """The offset of a tile, or of a row: its own, unless its greatest logit is out of reach."""
    least = tl.ceil(peak * LOG2E)
    return tl.where(least > own + REACH, least, own)


@triton.jit
def _cells(tiles, rows, n):
    """Of (tiles, n) numbers, rows int64."""
    return (tl.zeros_like(rows) + tiles) * n + rows


@triton.jit
def _below(logits, offset):
    """-> l - K ln 2."""
    return (logits - offset * HIGH) - offset * LOW


@triton.jit
def _log_share(below, others, own, log_sum):
    """log(own / (others + own)), below = log(own): to the last place where own is the most of it, too, and never above 0."""
    q = others / own
    near = 1.0 + q  # log(1 + q) = log(near) q / (near - 1): the second factor holds the digits that near has lost
    log_near = tl.where(near == 1.0, q, tl.log(near) * (q / (near - 1.0)))
    return tl.where(q < 1.0, 0.0 - log_near, below - log_sum)


@triton.jit
def _power_of_two(x):
    """2^x for whole x <= 0, exact; 0 below 2^-126."""
    return ((tl.maximum(x, -127.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _bend(logits, cap, CAPPED: tl.constexpr):
    """f' but for the scale."""
    if CAPPED:
        bent = logits / cap
        return 1.0 - bent * bent
    else:
        return 1.0


@triton.jit(do_not_specialize=PER_CALL)
def offset_kernel(
    hidden_ptr,  # (n, H)
    weight_ptr,  # (V, H)
    labels_ptr,  # (n,) int64
    bias_ptr,  # (V,)
    offsets_ptr,  # (n,) float32
    label_logits_ptr,  # (n,) float32
    H,
    hidden_pitch,
    weight_pitch,
    inner,
    cap,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    sums = tl.zeros((BLOCK,), tl.float32)
    for unit in range(0, H, BLOCK):
        units = unit + tl.arange(0, BLOCK)
        h = tl.load(hidden_ptr + row * hidden_pitch + units, mask=units < H, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + label * weight_pitch + units, mask=units < H, other=0.0).to(tl.float32)
        sums += h * w
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + label).to(tl.float32)
    logit = apply_map(tl.sum(sums, 0), bias, inner, cap, CAPPED)
    tl.store(label_logits_ptr + row, logit)
    x = tl.floor(logit * LOG2E + 0.5)
    x = tl.minimum(tl.maximum(x, -FARTHEST), FARTHEST)
    tl.store(offsets_ptr + row, tl.where(x == x, x, 0.0))


@triton.jit
def _store_exps(
    acc, out, bias_ptr, peaks_ptr, sums_ptr, labels, own, row0, rows, column0, n, V, out_pitch, inner, cap,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, DESCRIPTORS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Products (ROWS, COLUMNS) become E, a peak and a sum of each row."""
    several = tl.arange(0, COLUMNS)
    columns = column0 + several
    inside = columns < V
    logits = apply_map(acc, load_bias(bias_ptr, columns, inside, HAS_BIAS), inner, cap, CAPPED)
    logits = tl.where(inside[None, :], logits, float("-inf"))
    peak = tl.max(logits, 1)
    e = tl.exp2(_below(logits, _offset(peak, own)[:, None]) * LOG2E)
    e = tl.where((labels - column0).to(tl.int32)[:, None] == several[None, :], 0.0, e)
    cells = _cells(column0 // COLUMNS, rows, n)
    tl.store(peaks_ptr + cells, peak, mask=rows < n)
    tl.store(sums_ptr + cells, tl.sum(e, 1), mask=rows < n)
    e = (e * _bend(logits, cap, CAPPED)).to(tl.bfloat16)
    if DESCRIPTORS:
        out.store([row0, column0], e)
    else:
        at = out + rows[:, None] * out_pitch + columns[None, :]
        tl.store(at, e, mask=(rows < n)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=PER_CALL)
def exps_kernel(
    hidden,  # (n, H) descriptor, or pointer
    weight,  # (V, H) descriptor, or pointer
    out,  # (n, V) bfloat16, descriptor of (ROWS, VOCAB / PARTS), or pointer
    labels_ptr,  # (n,) int64
    bias_ptr,  # (V,)
    offsets_ptr,  # (n,) float32
    peaks_ptr,  # (tiles, n) float32, tiles of VOCAB / PARTS columns
    sums_ptr,  # (tiles, n) float32: of all but the label
    n,
    V,
    H,
    hidden_pitch,
    weight_pitch,
    out_pitch,
    splits,
    inner,
    cap,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    VOCAB: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
    PARTS: tl.constexpr,
):
    row0, split = place(n, splits, ROWS, GROUP)
    rows = row0.to(tl.int64) + tl.arange(0, ROWS)
    labels = tl.load(labels_ptr + rows, mask=rows < n, other=0)
    own = tl.load(offsets_ptr + rows, mask=rows < n, other=0.0)
    COLUMNS: tl.constexpr = VOCAB // PARTS
    for tile in tl.range(split, tl.cdiv(V, VOCAB), splits, flatten=FLATTEN):
        column0 = tile * VOCAB
        acc = tile_products(
            hidden, weight, row0, rows, column0, column0 + tl.arange(0, VOCAB), n, V, H, hidden_pitch, weight_pitch,
            DESCRIPTORS, PRECISION, ROWS, VOCAB, INNER,
        )  # fmt: skip
        if PARTS == 1:
            _store_exps(
                acc, out, bias_ptr, peaks_ptr, sums_ptr, labels, own, row0, rows, column0, n, V, out_pitch, inner, cap,
                HAS_BIAS, CAPPED, DESCRIPTORS, COLUMNS,
            )  # fmt: skip
        else:  # half of the products at a time need half of the registers and of the shared memory beside them
            left, right = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, COLUMNS)), (0, 2, 1)))
            _store_exps(
                left, out, bias_ptr, peaks_ptr, sums_ptr, labels, own, row0, rows, column0, n, V, out_pitch, inner, cap,
                HAS_BIAS, CAPPED, DESCRIPTORS, COLUMNS,
            )  # fmt: skip
            _store_exps(
                right, out, bias_ptr, peaks_ptr, sums_ptr, labels, own, row0, rows, column0 + COLUMNS, n, V, out_pitch,
                inner, cap, HAS_BIAS, CAPPED, DESCRIPTORS, COLUMNS,
            )  # fmt: skip


@triton.jit(do_not_specialize=PER_CALL)
def finish_kernel(
    out_ptr,  # (n, V) bfloat16, changed
    labels_ptr,  # (n,) int64
    offsets_ptr,  # (n,) float32
    peaks_ptr,  # (tiles, n) float32
    sums_ptr,  # (tiles, n) float32
    label_logits_ptr,  # (n,) float32
    logps_ptr,  # (n,) float32
    stats_ptr,  # (n, 2) float32
    totals_ptr,  # (n,) float32
    n,
    V,
    out_pitch,
    cap,
    CAPPED: tl.constexpr,
    VOCAB: tl.constexpr,  # columns of a tile
    ROWS: tl.constexpr,
    TILES: tl.constexpr,  # taken at a time
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    own = tl.load(offsets_ptr + rows, mask=inside, other=0.0)
    vocab_tiles = tl.cdiv(V, VOCAB)
    several = tl.arange(0, TILES)

    peak = tl.full((ROWS,), LOWEST, tl.float32)
    for tile in range(0, vocab_tiles, TILES):
        tiles = tile + several
        at = _cells(tiles[:, None], rows[None, :], n)
        part = tl.load(peaks_ptr + at, mask=(tiles < vocab_tiles)[:, None] & inside[None, :], other=LOWEST)
        peak = tl.maximum(peak, tl.max(part, 0))
    offset = _offset(peak, own)  # the greatest of the tiles', as it grows with the peak

    others = tl.zeros((ROWS,), tl.float32)
    for tile in range(0, vocab_tiles, TILES):
        tiles = tile + several
        at = _cells(tiles[:, None], rows[None, :], n)
        here = (tiles < vocab_tiles)[:, None] & inside[None, :]
        part = tl.load(peaks_ptr + at, mask=here, other=LOWEST)
        move = _power_of_two(_offset(part, own[None, :]) - offset[None, :])
        others += tl.sum(tl.load(sums_ptr + at, mask=here, other=0.0) * move, 0)

    if tl.max(tl.where(inside, offset - own, 0.0), 0) > 0:
        for tile in range(0, vocab_tiles):
            part = tl.load(peaks_ptr + _cells(tile, rows, n), mask=inside, other=LOWEST)
            move = _power_of_two(_offset(part, own) - offset)
            if tl.min(tl.where(inside, move, 1.0), 0) < 1.0:
                columns = tile * VOCAB + tl.arange(0, VOCAB)
                cells = out_ptr + rows[:, None] * out_pitch + columns[None, :]
                there = inside[:, None] & (columns < V)[None, :]
                e = tl.load(cells, mask=there, other=0.0).to(tl.float32) * move[:, None]
                tl.store(cells, e.to(out_ptr.dtype.element_ty), mask=there)

    labels = tl.load(labels_ptr + rows, mask=inside, other=0)
    logit = tl.load(label_logits_ptr + rows, mask=inside, other=0.0)
    below = _below(logit, offset)
    mine = tl.exp2(below * LOG2E)
    total = others + mine
    total = tl.where((total > 0) & (total < float("inf")), total, float("nan"))
    log_sum = tl.log(total)
    tl.debug_barrier()  # every warp has moved its columns, the label's among them
    written = (-others * _bend(logit, cap, CAPPED)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows * out_pitch + labels, written, mask=inside)
    tl.store(logps_ptr + rows, _log_share(below, others, mine, log_sum), mask=inside)
    tl.store(totals_ptr + rows, total, mask=inside)
    tl.store(stats_ptr + rows * 2, peak, mask=inside)
    tl.store(stats_ptr + rows * 2 + 1, log_sum - _below(peak, offset), mask=inside)


class ScaledExps(NamedTuple):
    """Of n rows: log-probs (n,), stats (n, 2) as every tile function's, E (n, V) bfloat16 and S (n,)."""

    logps: torch.Tensor
    stats: torch.Tensor
    exps: torch.Tensor
    totals: torch.Tensor


def scaled_exps(hidden, weight, labels, map, out, config=None) -> ScaledExps:
    """hidden (n, H), weight (V, H), labels (n,) int64 in [0, V), LogitMap, out (n, V) bfloat16 -> ScaledExps, E in `out`.

    bfloat16, float16 or float32 operands. `config`, a MatmulConfig, replaces the architecture's own. Raises ValueError for
    another dtype, shape, device or layout.
    """
    check_operands(hidden, weight, labels, map)
    n, V = hidden.shape[0], weight.shape[0]
    check_rows("out", out)
    if (out.shape, out.dtype, out.device) != ((n, V), torch.bfloat16, hidden.device):
        raise ValueError(
            f"out: expected torch.bfloat16 {(n, V)} on {hidden.device}, got {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    logps, stats, totals, offsets, label_logits = (
        torch.empty(shape, dtype=torch.float32, device=hidden.device) for shape in ((n,), (n, 2), (n,), (n,), (n,))
    )
    if n == 0:
        return ScaledExps(logps, stats, out, totals)
    launch = plan_launch(hidden, weight, map, scaled_exps_config, config, out)
    parts = launch.config.parts
    columns = launch.config.vocab // parts
    peaks, sums = (logps.new_empty(launch.vocab_tiles * parts, n) for _ in range(2))
    mapped = map_arguments(map, logps)
    with on_device(hidden):
        offset_kernel[(n,)](
            hidden, weight, labels, offsets_ptr=offsets, label_logits_ptr=label_logits, H=hidden.shape[1],
            hidden_pitch=hidden.stride(0), weight_pitch=weight.stride(0), **mapped, BLOCK=1024, num_warps=4,
        )  # fmt: skip
        exps_kernel[launch.grid](
            *launch.operands, labels_ptr=labels, offsets_ptr=offsets, peaks_ptr=peaks, sums_ptr=sums,
            out_pitch=out.stride(0), **mapped, **launch.options, PARTS=parts,
        )  # fmt: skip
        finish_kernel[(triton.cdiv(n, 16),)](
            out, labels, offsets, peaks, sums, label_logits, logps, stats, totals, n, V, out.stride(0), mapped["cap"],
            mapped["CAPPED"], columns, ROWS=16, TILES=64, num_warps=4,
        )  # fmt: skip
    return ScaledExps(logps, stats, out, totals)
