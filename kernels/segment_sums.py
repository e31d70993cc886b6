"""Sums of per-token numbers by sequence, in float64 and in one fixed order.

    out_k += sum of values_t over the rows t with segments_t == k

values (n,) float32, segments (n,) int64 with -1 for rows that belong nowhere, out (K,) float64. One program per segment
walks over all rows; every lane adds up its own rows and the lanes meet in a fixed tree, so the result is bitwise
repeatable and needs neither atomics nor scratch. Reads 12 K n bytes, all but the first 12 n of them from L2; K is the
number of sequences in a batch.

Tests: tests/kernels/test_interpreter.py, tests/kernels/test_compile.py.
"""

import torch
import triton
import triton.language as tl

from longpo_ops.kernels.launch import PER_CALL, check, on_device

BLOCK = 4096


@triton.jit(do_not_specialize=PER_CALL)
def segment_kernel(values_ptr, segments_ptr, out_ptr, n, BLOCK: tl.constexpr):
    segment = tl.program_id(0)
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n, BLOCK):
        rows = start + tl.arange(0, BLOCK).to(tl.int64)
        member = tl.load(segments_ptr + rows, mask=rows < n, other=-1) == segment
        sums += tl.load(values_ptr + rows, mask=member, other=0.0).to(tl.float64)
    tl.store(out_ptr + segment, tl.load(out_ptr + segment) + tl.sum(sums, 0))


def segment_sums(values, segments, out):
    """out (K,) float64 += sums of values (n,) float32 by segments (n,) int64, -1 for rows that belong nowhere.

    Raises ValueError for another dtype, shape, device or layout.
    """
    check("out", out, (out.numel(),), torch.float64, out.device)
    check("values", values, (values.numel(),), torch.float32, out.device)
    check("segments", segments, (values.numel(),), torch.int64, out.device)
    if values.numel() and out.numel():
        with on_device(out):
            segment_kernel[(out.numel(),)](values, segments, out, values.numel(), BLOCK, num_warps=8, num_stages=1)
