"""The row epilogue: a tile of products becomes log-probabilities and, in place, weighted gradients.

    l = f(z + bias)    peak = max_j l_j    log_sum = log sum_j exp(l_j - peak)
    logp = (l_y - peak) - log_sum          dz_j = g * (1[j == y] - exp((l_j - peak) - log_sum)) * f'(z_j)

Where asked for, stats hold mean, total and predicted beside peak and log_sum, and

    dz_j = (alpha * 1[j == y] + p_j * (beta + gamma * (l_j - peak)) + delta * c_j) * f'(z_j)       (ops/tiles.py)

z (n, V) float32, any pitch; labels (n,) int64; g (n,) float32; dz (n, V) float32, float16 or bfloat16 in z's memory.
One program per row. Bytes from HBM, B = 2 or 4 the size of a gradient:
    logps              4 V n             gradient_          (4 + B) V n
    logps_gradient_    (4 + B) V n       where the row is kept: in registers (up to 32768 columns, see launch.py) or, if
                                         longer, in the L2 cache; (8 + B) V n where L2 has dropped it
Scratch: 12 n bytes.

Writing 16-bit results into the float32 row that is still being read. Block k (B columns) lies in bytes [4kB, 4(k+1)B)
and its result goes to bytes [2kB, 2(k+1)B): inside block k // 2, that is into block 0 itself for k = 0 and into an
earlier block for k >= 1, never into a later one. Blocks are taken in increasing order, so all a store can hit is
float32 data of blocks <= k. A program's warps drift apart, though: one warp could store while another still has to load
from the bytes hit. Hence a barrier between every block's load and its store: past it, every warp has loaded all of
blocks 0..k. The barrier orders memory accesses among the program's threads, loads included; the next block's load is
issued before it, so that the wait for memory and the barrier overlap; loading early is always safe. Rows never overlap,
so programs do not meet. The launch asks for num_stages=1: Triton's pipeliner must not move loads across stores in a
loop.

Tests: tests/kernels/test_interpreter.py, tests/kernels/test_compile.py.
"""

import torch
import triton
import triton.language as tl

from longpo_ops.kernels.launch import (
    PAIR,
    ROW,
    check,
    check_map,
    check_tile,
    is_mapped,
    narrow,
    on_device,
    row_config,
)
from longpo_ops.kernels.logits import (
    apply_map,
    beside_stats,
    load_bias,
    load_classes,
    load_label_logit,
    load_logits,
    map_arguments,
    map_slope,
    row_stats,
)


@triton.jit
def _gradient(logits, columns, label, peak, log_sum, g, inner, cap, CAPPED: tl.constexpr):
    hit = tl.where(columns == label, 1.0, 0.0)
    return g * (hit - tl.exp((logits - peak) - log_sum)) * map_slope(logits, inner, cap, CAPPED)


@triton.jit
def _affine(
    logits, columns, inside, label, peak, log_sum, alpha, beta, gamma, delta, classes_ptr, inner, cap,
    CAPPED: tl.constexpr, HAS_CLASSES: tl.constexpr,
):  # fmt: skip
    shifted = logits - peak
    p = tl.exp(shifted - log_sum)
    spread = beta + tl.where(p == 0, 0.0, gamma * shifted)
    smooth = delta * load_classes(classes_ptr, columns, inside, HAS_CLASSES)
    dl = p * spread + tl.where(columns == label, alpha, 0.0) + smooth
    return dl * map_slope(logits, inner, cap, CAPPED)


@triton.jit
def _beside(
    logits, columns, V, peak, log_sum, classes_ptr, HAS_CLASSES: tl.constexpr, MEAN: tl.constexpr, TOTAL: tl.constexpr,
    PREDICTED: tl.constexpr,
):  # fmt: skip
    """-> mean, total and predicted where asked for, else 0, of a row in registers."""
    mean, total, predicted = 0.0, 0.0, 0.0
    shifted = logits - peak
    if MEAN:
        p = tl.exp(shifted - log_sum)
        mean = tl.sum(tl.where(p == 0, 0.0, p * shifted), 0)
    if TOTAL:
        c = load_classes(classes_ptr, columns, columns < V, HAS_CLASSES)
        total = tl.sum(tl.where(c == 0, 0.0, c * shifted), 0)
    if PREDICTED:
        predicted = tl.min(tl.where(logits == peak, columns, V), 0).to(tl.float32)
    return mean, total, predicted


@triton.jit
def row_kernel(
    z_ptr,  # (n, V) float32
    out_ptr,  # (n, V) the same memory, in the gradient's dtype
    labels_ptr,  # (n,) int64
    g_ptr,  # (n,) or, if AFFINE, (n, 4) float32    read if GRADIENT
    logps_ptr,  # (n,) float32                 written if SCORE
    stats_ptr,  # (n, COLUMNS) float32         written if SCORE and not GRADIENT, read if not SCORE
    bias_ptr,  # (V,)
    classes_ptr,  # (V,) float32               read if TOTAL or AFFINE, and HAS_CLASSES
    V,
    pitch,
    out_pitch,
    inner,
    cap,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    SCORE: tl.constexpr,
    GRADIENT: tl.constexpr,
    MEAN: tl.constexpr,
    TOTAL: tl.constexpr,
    PREDICTED: tl.constexpr,
    AFFINE: tl.constexpr,  # with GRADIENT and not SCORE
    HAS_CLASSES: tl.constexpr,
    COLUMNS: tl.constexpr,
    RESIDENT: tl.constexpr,  # BLOCK >= V: the row stays in registers
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * pitch
    out_row = out_ptr + row * out_pitch
    label = tl.load(labels_ptr + row)
    columns = tl.arange(0, BLOCK)

    if RESIDENT:
        logits = load_logits(z_row, bias_ptr, columns, V, inner, cap, HAS_BIAS, CAPPED, False)
    if SCORE:
        if RESIDENT:
            peak = tl.max(logits, 0)
            log_sum = tl.log(tl.sum(tl.exp(logits - peak), 0))
        elif COLUMNS > 2:
            peak, log_sum, mean, total, predicted = beside_stats(
                z_row,
                bias_ptr,
                classes_ptr,
                V,
                inner,
                cap,
                HAS_BIAS,
                CAPPED,
                HAS_CLASSES,
                MEAN,
                TOTAL,
                PREDICTED,
                BLOCK,
            )
        else:
            peak, log_sum = row_stats(z_row, bias_ptr, V, inner, cap, HAS_BIAS, CAPPED, GRADIENT, BLOCK)
        label_logit = load_label_logit(z_row, bias_ptr, label, inner, cap, HAS_BIAS, CAPPED)
        tl.store(logps_ptr + row, (label_logit - peak) - log_sum)
        if not GRADIENT:
            tl.store(stats_ptr + row * COLUMNS, peak)
            tl.store(stats_ptr + row * COLUMNS + 1, log_sum)
            if COLUMNS > 2:
                if RESIDENT:
                    mean, total, predicted = _beside(
                        logits, columns, V, peak, log_sum, classes_ptr, HAS_CLASSES, MEAN, TOTAL, PREDICTED
                    )
                tl.store(stats_ptr + row * COLUMNS + 2, mean)
                tl.store(stats_ptr + row * COLUMNS + 3, total)
                if PREDICTED:
                    predicted = tl.where(log_sum >= 0, predicted, -1.0)
                tl.store(stats_ptr + row * COLUMNS + 4, predicted)
    else:
        peak = tl.load(stats_ptr + row * COLUMNS)
        log_sum = tl.load(stats_ptr + row * COLUMNS + 1)

    if GRADIENT:
        if AFFINE:
            alpha = tl.load(g_ptr + row * 4)
            beta = tl.load(g_ptr + row * 4 + 1)
            gamma = tl.load(g_ptr + row * 4 + 2)
            delta = tl.load(g_ptr + row * 4 + 3)
        else:
            g = tl.load(g_ptr + row)
        if RESIDENT:
            if AFFINE:
                dz = _affine(
                    logits, columns, columns < V, label, peak, log_sum, alpha, beta, gamma, delta, classes_ptr, inner, cap,
                    CAPPED, HAS_CLASSES,
                )  # fmt: skip
            else:
                dz = _gradient(logits, columns, label, peak, log_sum, g, inner, cap, CAPPED)
            tl.debug_barrier()
            tl.store(out_row + columns, dz.to(out_ptr.dtype.element_ty), mask=columns < V)
        else:
            z = tl.load(z_row + columns, eviction_policy="evict_first")  # BLOCK < V: no mask
            for start in range(0, V, BLOCK):
                here = start + columns
                ahead = here + BLOCK
                z_ahead = tl.load(z_row + ahead, mask=ahead < V, eviction_policy="evict_first")
                logits = apply_map(z, load_bias(bias_ptr, here, here < V, HAS_BIAS), inner, cap, CAPPED)
                if AFFINE:
                    dz = _affine(
                        logits, here, here < V, label, peak, log_sum, alpha, beta, gamma, delta, classes_ptr, inner, cap,
                        CAPPED, HAS_CLASSES,
                    )  # fmt: skip
                else:
                    dz = _gradient(logits, here, label, peak, log_sum, g, inner, cap, CAPPED)
                tl.debug_barrier()
                tl.store(out_row + here, dz.to(out_ptr.dtype.element_ty), mask=here < V)
                z = z_ahead


def _launch(z, out, labels, g, logps, stats, map, SCORE, GRADIENT, beside=None, classes=None):
    n, V = z.shape
    if n == 0:
        return
    columns = 2 if stats is z else stats.shape[1]
    mean, total, predicted = (False, False, False) if beside is None else beside[:3]
    affine = g is not z and g.dim() == 2
    unaligned = (V | z.stride(0)) % 16 != 0  # what Triton asks for before it reads 16 bytes at a time
    more = affine or mean or total or predicted
    tight = is_mapped(map) or out.dtype == torch.float32 or unaligned or more
    config = row_config(V, tight, PAIR if more else ROW)
    with on_device(z):
        row_kernel[(n,)](
            z, out, labels, g, logps, stats, classes_ptr=z if classes is None else classes, V=V, pitch=z.stride(0),
            out_pitch=out.stride(0), **map_arguments(map, z), SCORE=SCORE, GRADIENT=GRADIENT, MEAN=mean,
            TOTAL=total, PREDICTED=predicted, AFFINE=affine, HAS_CLASSES=classes is not None, COLUMNS=columns,
            RESIDENT=config.block >= V, BLOCK=config.block, num_warps=config.warps, num_stages=1,
        )  # fmt: skip


def _check(z, labels, map, g=None, stats=None, classes=None):
    check_tile("z", z)
    check("labels", labels, (z.shape[0],), torch.int64, z.device)
    check_map("map", map, z.device, z.shape[1])
    if g is not None:
        affine = stats is not None and g.dim() == 2
        check("g", g, (z.shape[0], 4) if affine else (z.shape[0],), torch.float32, z.device)
    if stats is not None:
        columns = 5 if stats.dim() == 2 and stats.shape[1] == 5 else 2
        check("stats", stats, (z.shape[0], columns), torch.float32, z.device)
    if classes is not None:
        check("classes", classes, (z.shape[1],), torch.float32, z.device)


def logps(z, labels, map, beside=None):
    """z (n, V) float32, labels (n,) int64, LogitMap -> logps (n,), stats (n, 2), float32; z is left as it is. With a Beside
    that asks for something stats are (n, 5).

    Raises ValueError for another dtype, shape, device or layout.
    """
    classes, columns = (None, 2) if beside is None else (beside.classes, beside.columns)
    _check(z, labels, map, classes=classes)
    out, stats = z.new_empty(z.shape[0]), z.new_empty(z.shape[0], columns)
    _launch(z, z, labels, z, out, stats, map, True, False, beside, classes)
    return out, stats


def gradient_(z, labels, stats, g, map, dtype, classes=None):
    """z (n, V) float32 and its rows' stats (n, 2 or 5), g (n,) or (n, 4) -> dz (n, V) in `dtype`, in z's memory.

    Raises ValueError for another dtype, shape, device or layout.
    """
    _check(z, labels, map, g, stats, classes)
    dz = narrow(z, dtype)
    _launch(z, dz, labels, g, z, stats, map, False, True, classes=classes)
    return dz


def logps_gradient_(z, labels, g, map, dtype):
    """z (n, V) float32, labels (n,), weights g (n,) -> logps (n,) and dz (n, V) in `dtype`, in z's memory.

    Raises ValueError for another dtype, shape, device or layout.
    """
    _check(z, labels, map, g)
    dz, out = narrow(z, dtype), z.new_empty(z.shape[0])
    _launch(z, dz, labels, g, out, z, map, True, True)
    return out, dz
