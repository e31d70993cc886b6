"""Log-probabilities of labels straight from hidden states: no logit ever reaches memory.

    z = h W^T    l = f(z + bias)    logp_t = (l_t[y_t] - peak_t) - log_sum_t

h (n, H) any pitch, W (V, H), both bfloat16, float16 or float32; labels (n,) int64; logps (n,), stats (n, 2) float32.
Operations 2 n H V. Scratch 4 (2 S + 1) n bytes for S parts of the vocabulary; S * n is bounded by the size of the GPU.

A program takes a tile of rows and every S-th tile of the vocabulary (products.py). Each tile of products is folded at
once into the rows' running maximum and sum; the one program that meets a row's label stores its logit. A second kernel
joins the S partial maxima and sums of a row in a fixed order: no atomics, bitwise repeatable.

No gradients: those need the tile (row_epilogue.py) or its exponentials (scaled_exps.py). No float64.

Tests: tests/kernels/test_interpreter.py, tests/kernels/test_compile.py.
"""

import functools

import torch
import triton
import triton.language as tl

from longpo_ops.kernels.launch import PER_CALL, linear_logps_config, on_device
from longpo_ops.kernels.logits import LOWEST, apply_map, load_bias, map_arguments
from longpo_ops.kernels.products import check_operands, place, plan_launch, tile_products


@triton.jit(do_not_specialize=PER_CALL)
def partial_kernel(
    hidden,  # (n, H) descriptor, or pointer
    weight,  # (V, H) descriptor, or pointer
    labels_ptr,  # (n,) int64
    bias_ptr,  # (V,)
    peaks_ptr,  # (S, n) float32
    sums_ptr,  # (S, n) float32
    label_logits_ptr,  # (n,) float32
    n,
    V,
    H,
    hidden_pitch,
    weight_pitch,
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
):
    row0, split = place(n, splits, ROWS, GROUP)
    rows = row0.to(tl.int64) + tl.arange(0, ROWS)
    labels = tl.load(labels_ptr + rows, mask=rows < n, other=0)
    peak = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    label_logit = tl.zeros((ROWS,), tl.float32)

    # Flattened, the two loops are one pipeline: the next tile's operands arrive while this one's logits are folded.
    for tile in tl.range(split, tl.cdiv(V, VOCAB), splits, flatten=FLATTEN):
        column0 = tile * VOCAB
        columns = column0 + tl.arange(0, VOCAB)
        acc = tile_products(
            hidden, weight, row0, rows, column0, columns, n, V, H, hidden_pitch, weight_pitch,
            DESCRIPTORS, PRECISION, ROWS, VOCAB, INNER,
        )  # fmt: skip
        inside = columns < V
        logits = apply_map(acc, load_bias(bias_ptr, columns, inside, HAS_BIAS), inner, cap, CAPPED)
        logits = tl.where(inside[None, :], logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        peak = higher
        here = (labels - column0).to(tl.int32)
        label_logit += tl.sum(tl.where(here[:, None] == tl.arange(0, VOCAB)[None, :], logits, 0.0), 1)

    tl.store(peaks_ptr + split.to(tl.int64) * n + rows, peak, mask=rows < n)
    tl.store(sums_ptr + split.to(tl.int64) * n + rows, total, mask=rows < n)
    met = (labels // VOCAB) % splits == split
    tl.store(label_logits_ptr + rows, label_logit, mask=(rows < n) & met)


@triton.jit(do_not_specialize=PER_CALL)
def join_kernel(peaks_ptr, sums_ptr, label_logits_ptr, logps_ptr, stats_ptr, n, splits, ROWS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    peak = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for _ in range(splits):
        part = tl.load(peaks_ptr + rows, mask=inside, other=0.0)
        higher = tl.maximum(peak, part)
        total = total * tl.exp(peak - higher) + tl.load(sums_ptr + rows, mask=inside, other=0.0) * tl.exp(part - higher)
        peak = higher
        peaks_ptr += n
        sums_ptr += n
    log_sum = tl.log(total)
    label_logit = tl.load(label_logits_ptr + rows, mask=inside, other=0.0)
    tl.store(stats_ptr + rows * 2, peak, mask=inside)
    tl.store(stats_ptr + rows * 2 + 1, log_sum, mask=inside)
    tl.store(logps_ptr + rows, (label_logit - peak) - log_sum, mask=inside)


def linear_logps(hidden, weight, labels, map, config=None):
    """hidden (n, H), weight (V, H), labels (n,) int64 in [0, V), LogitMap -> logps (n,) and stats (n, 2), float32.

    bfloat16, float16 or float32; float32 products are exact to rounding unless torch allows TF32. `config`, a
    MatmulConfig, replaces the architecture's own. Raises ValueError for another dtype, shape, device or layout.
    """
    check_operands(hidden, weight, labels, map)
    n = hidden.shape[0]
    logps, stats = (torch.empty(shape, dtype=torch.float32, device=hidden.device) for shape in ((n,), (n, 2)))
    if n == 0:
        return logps, stats
    launch = plan_launch(hidden, weight, map, linear_logps_config, config)
    peaks, sums = logps.new_empty(launch.splits, n), logps.new_empty(launch.splits, n)
    label_logits = logps.new_empty(n)
    with on_device(hidden):
        partial_kernel[launch.grid](
            *launch.operands, labels, peaks_ptr=peaks, sums_ptr=sums, label_logits_ptr=label_logits,
            **map_arguments(map, logps), **launch.options,
        )  # fmt: skip
        parts = (peaks, sums, label_logits, logps, stats, n, launch.splits)
        join_kernel[(triton.cdiv(n, 128),)](*parts, ROWS=128, num_warps=4)
    return logps, stats


def search(hidden, weight, labels, map, configs, clock=triton.testing.do_bench):
    """-> (milliseconds, config) of each MatmulConfig for these tensors, the fastest first; for use by hand."""
    run = functools.partial(linear_logps, hidden, weight, labels, map)
    return sorted((clock(functools.partial(run, config=config)), config) for config in configs)
