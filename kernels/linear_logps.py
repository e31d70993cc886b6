"""Log-probabilities of labels straight from hidden states: no logit ever reaches memory.

    z = h W^T    l = f(z + bias)    logp_t = (l_t[y_t] - peak_t) - log_sum_t

h (n, H) any pitch, W (V, H), both bfloat16, float16 or float32; labels (n,) int64; logps (n,), stats (n, 2) float32.
Operations 2 n H V. Scratch 4 (2 S + 1) n bytes for S parts of the vocabulary; S * n is bounded by the size of the GPU.

A program takes a tile of rows and every S-th tile of the vocabulary. Each tile of products is summed over H on the
tensor cores in float32, and folded at once into the rows' running maximum and sum; the one program that meets a row's
label stores its logit. A second kernel joins the S partial maxima and sums of a row in a fixed order: no atomics,
bitwise repeatable.

Order of programs: `group` row tiles run side by side over the same vocabulary tiles, all starting at the same time and
taking equally long. So a tile of W comes from HBM once per group and is read by the others from L2, and the group's
hidden states (16 tiles of 128 rows, H = 4096: 16 MiB) stay in L2. S is chosen so that the last wave of programs is
nearly full. No gradients: those need the tile (row_epilogue.py). No float64.

Tests: tests/kernels/test_interpreter.py, tests/kernels/test_compile.py.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from longpo_ops.kernels.launch import (
    PER_CALL,
    capability,
    check,
    check_map,
    check_rows,
    is_mapped,
    linear_logps_config,
    on_device,
    processors,
)
from longpo_ops.kernels.logits import LOWEST, apply_map, load_bias, map_arguments


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
    row_tiles = tl.cdiv(n, ROWS)
    vocab_tiles = tl.cdiv(V, VOCAB)
    group = tl.program_id(0) // (GROUP * splits)
    within = tl.program_id(0) % (GROUP * splits)
    members = min(row_tiles - group * GROUP, GROUP)
    row0 = (group * GROUP + within % members) * ROWS
    split = within // members

    rows = row0.to(tl.int64) + tl.arange(0, ROWS)
    labels = tl.load(labels_ptr + rows, mask=rows < n, other=0)
    units = tl.arange(0, INNER)
    peak = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    label_logit = tl.zeros((ROWS,), tl.float32)

    # Flattened, the two loops are one pipeline: the next tile's operands arrive while this one's logits are folded.
    for tile in tl.range(split, vocab_tiles, splits, flatten=FLATTEN):
        column0 = tile * VOCAB
        columns = column0 + tl.arange(0, VOCAB)
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


def linear_logps(hidden, weight, labels, map, config=None):
    """hidden (n, H), weight (V, H), labels (n,) int64 in [0, V), LogitMap -> logps (n,) and stats (n, 2), float32.

    bfloat16, float16 or float32; float32 products are exact to rounding unless torch allows TF32. `config`, a
    MatmulConfig, replaces the architecture's own. Raises ValueError for another dtype, shape, device or layout.
    """
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
    logps, stats = (torch.empty(shape, dtype=torch.float32, device=hidden.device) for shape in ((n,), (n, 2)))
    if n == 0:
        return logps, stats

    aligned = _describable(hidden, weight)
    if config is None:  # single elements instead of 16-byte units spill in the larger tiles: sm_80's has room for them
        config = linear_logps_config(capability(hidden.device) if aligned else 80, hidden.dtype, is_mapped(map))
    row_tiles = triton.cdiv(n, config.rows)
    splits = _splits(row_tiles, triton.cdiv(V, config.vocab), processors(hidden.device))
    peaks, sums = logps.new_empty(splits, n), logps.new_empty(splits, n)
    label_logits = logps.new_empty(n)
    descriptors = config.descriptors and aligned
    operands = hidden, weight
    if descriptors:
        operands = (
            TensorDescriptor.from_tensor(hidden, [config.rows, config.inner]),
            TensorDescriptor.from_tensor(weight, [config.vocab, config.inner]),
        )
    tf32 = hidden.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    with on_device(hidden):
        partial_kernel[(row_tiles * splits,)](
            *operands, labels, peaks_ptr=peaks, sums_ptr=sums, label_logits_ptr=label_logits, n=n, V=V, H=H,
            hidden_pitch=hidden.stride(0), weight_pitch=weight.stride(0), splits=splits, **map_arguments(map, logps),
            DESCRIPTORS=descriptors, PRECISION="tf32" if tf32 else "ieee", ROWS=config.rows, VOCAB=config.vocab,
            INNER=config.inner, GROUP=config.group, FLATTEN=config.flatten, num_warps=config.warps,
            num_stages=config.stages,
        )  # fmt: skip
        join_kernel[(triton.cdiv(n, 128),)](peaks, sums, label_logits, logps, stats, n, splits, ROWS=128, num_warps=4)
    return logps, stats


def search(hidden, weight, labels, map, configs, clock=triton.testing.do_bench):
    """-> (milliseconds, config) of each MatmulConfig for these tensors, the fastest first; for use by hand."""
    run = functools.partial(linear_logps, hidden, weight, labels, map)
    return sorted((clock(functools.partial(run, config=config)), config) for config in configs)
