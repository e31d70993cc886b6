"""The divergence epilogue: two tiles of products become KL values and, in place, both gradients.

With p = softmax(l) the student's and q = softmax(l') the teacher's distribution, wp and wq two weights and x a third
one:

    value = wq * Q + wp * P    Q = sum_j q_j (log q_j - log x_j)    P = sum_j p_j (log p_j - log x_j)

    forward  KL(q || p)    x = p, wq = 1, wp = 0          dl = p - q                            dl' = q (log q/x - Q)
    reverse  KL(p || q)    x = q, wq = 0, wp = 1          dl = p (log p/x - P)                  dl' = q - p
    jsd      x = beta q + (1 - beta) p, wq = beta,        dl = wp p (log p/x - P)               dl' = wq q (log q/x - Q)
             wp = 1 - beta
    dz = kappa * dl * f'(z)    dz' = kappa * dl' * f'(z')        0 * log 0 = 0

For jsd, wq <= 1/2: beyond it the launcher exchanges the two sides. With u = log p - log q,

    log x/p = log(1 + wq (e^-u - 1))    log x/q = log x/p + u

Where wq is small, so is log x/p, and p's gradient is made of nothing else: the digits of wq (e^-u - 1) that 1 + wq (e^-u - 1)
has lost are added again. Where wq e^-u > 1, x is q in the main, and the small one is log x/q = log(wq + wp e^u). Neither
exponential can overflow, and x itself, which may underflow to 0 where p and q do not, is never formed.

z, z' (n, V) float32, any pitches; kappa (n,) float32. One program per row, in blocks of columns: first the stats of
both rows, then the value, then the gradients. Where no gradient needs Q or P (student of forward, teacher of reverse),
value and gradients share a pass. Bytes: 8 V n a pass, read from HBM the first time and from L2 where the rows are kept
there, and B V n for every gradient of B bytes. Scratch: 4 n bytes. Writing in place: see row_epilogue.py.

Tests: tests/kernels/test_interpreter.py, tests/kernels/test_compile.py.
"""

import torch
import triton
import triton.language as tl

from longpo_ops.kernels.launch import PAIR, check, check_map, check_tile, narrow, on_device
from longpo_ops.kernels.logits import load_logits, map_arguments, map_slope, row_stats

FORWARD, REVERSE, JSD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
KINDS = {"forward": FORWARD.value, "reverse": REVERSE.value, "jsd": JSD.value}


@triton.jit
def _terms(logits, peak, log_sum, logits_t, peak_t, log_sum_t, wq, wp, KIND: tl.constexpr):
    """-> p, q, log p/x, log q/x, the last two 0 where p or q is."""
    log_p = (logits - peak) - log_sum
    log_q = (logits_t - peak_t) - log_sum_t
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    term_p = log_p - log_q
    term_q = -term_p
    if KIND == FORWARD:
        term_p = 0.0
    elif KIND == REVERSE:
        term_q = 0.0
    else:
        far = term_p < tl.log(wq)
        e = tl.exp(tl.where(far, term_p, term_q))
        x = wq * (e - 1.0)
        near = 1.0 + x
        log = tl.log(tl.where(far, wq + wp * e, near)) + tl.where(far, 0.0, x - (near - 1.0))
        term_p = tl.where(far, term_p, 0.0) - log
        term_q = tl.where(far, 0.0, term_q) - log
    return p, q, tl.where(p == 0, 0.0, term_p), tl.where(q == 0, 0.0, term_q)


@triton.jit
def divergence_kernel(
    z_ptr,  # (n, V) float32
    out_ptr,  # (n, V) the same memory, in the gradient's dtype      written if STUDENT
    bias_ptr,  # (V,)
    z_t_ptr,  # (n, V) float32, the teacher's
    out_t_ptr,  # (n, V)                                             written if TEACHER
    bias_t_ptr,  # (V,)
    kappa_ptr,  # (n,) float32
    values_ptr,  # (n,) float32
    V,
    pitch,
    out_pitch,
    pitch_t,
    out_pitch_t,
    inner,
    cap,
    inner_t,
    cap_t,
    wq,
    wp,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    HAS_BIAS_T: tl.constexpr,
    CAPPED_T: tl.constexpr,
    KIND: tl.constexpr,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * pitch
    z_row_t = z_t_ptr + row * pitch_t
    out_row = out_ptr + row * out_pitch
    out_row_t = out_t_ptr + row * out_pitch_t
    columns = tl.arange(0, BLOCK)
    peak, log_sum = row_stats(z_row, bias_ptr, V, inner, cap, HAS_BIAS, CAPPED, True, BLOCK)
    peak_t, log_sum_t = row_stats(z_row_t, bias_t_ptr, V, inner_t, cap_t, HAS_BIAS_T, CAPPED_T, True, BLOCK)
    kappa = tl.load(kappa_ptr + row)

    MEANS_FIRST: tl.constexpr = (STUDENT and KIND != FORWARD) or (TEACHER and KIND != REVERSE)
    mean_p = 0.0
    mean_q = 0.0
    if MEANS_FIRST:
        sums_p = tl.zeros((BLOCK,), tl.float32)
        sums_q = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            here = start + columns
            logits = load_logits(z_row, bias_ptr, here, V, inner, cap, HAS_BIAS, CAPPED, True)
            logits_t = load_logits(z_row_t, bias_t_ptr, here, V, inner_t, cap_t, HAS_BIAS_T, CAPPED_T, True)
            p, q, term_p, term_q = _terms(logits, peak, log_sum, logits_t, peak_t, log_sum_t, wq, wp, KIND)
            sums_p += p * term_p
            sums_q += q * term_q
        mean_p = tl.sum(sums_p, 0)
        mean_q = tl.sum(sums_q, 0)

    values = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        here = start + columns
        inside = here < V
        logits = load_logits(z_row, bias_ptr, here, V, inner, cap, HAS_BIAS, CAPPED, False)
        logits_t = load_logits(z_row_t, bias_t_ptr, here, V, inner_t, cap_t, HAS_BIAS_T, CAPPED_T, False)
        p, q, term_p, term_q = _terms(logits, peak, log_sum, logits_t, peak_t, log_sum_t, wq, wp, KIND)
        if not MEANS_FIRST:
            values += wq * (q * term_q) + wp * (p * term_p)
        if STUDENT or TEACHER:
            tl.debug_barrier()  # every warp has loaded this block of both rows: see row_epilogue.py
        if STUDENT:
            if KIND == FORWARD:
                dl = p - q
            else:
                dl = tl.where(p == 0, 0.0, wp * p * (term_p - mean_p))
            dz = kappa * dl * map_slope(logits, inner, cap, CAPPED)
            tl.store(out_row + here, dz.to(out_ptr.dtype.element_ty), mask=inside)
        if TEACHER:
            if KIND == REVERSE:
                dl_t = q - p
            else:
                dl_t = tl.where(q == 0, 0.0, wq * q * (term_q - mean_q))
            dz_t = kappa * dl_t * map_slope(logits_t, inner_t, cap_t, CAPPED_T)
            tl.store(out_row_t + here, dz_t.to(out_t_ptr.dtype.element_ty), mask=inside)
    if MEANS_FIRST:
        tl.store(values_ptr + row, wq * mean_q + wp * mean_p)
    else:
        tl.store(values_ptr + row, tl.sum(values, 0))


def divergence_(z, z_teacher, kappa, divergence, map, map_teacher, dtype, need_student, need_teacher):
    """z, z_teacher (n, V) float32, kappa (n,) float32, a Divergence and two LogitMaps -> values (n,) and, where needed,
    kappa * d value / dz and kappa * d value / dz_teacher, (n, V) in `dtype`, each in its tile's memory.

    Raises ValueError for another kind, dtype, shape, device or layout.
    """
    if divergence.kind not in KINDS:
        raise ValueError(f"divergence.kind: expected one of {', '.join(KINDS)}, got {divergence.kind!r}")
    check_tile("z", z)
    check_tile("z_teacher", z_teacher)
    if z_teacher.shape != z.shape or z_teacher.device != z.device:
        raise ValueError(
            f"z_teacher: expected z's shape {tuple(z.shape)} on {z.device}, "
            f"got {tuple(z_teacher.shape)} on {z_teacher.device}"
        )
    n, V = z.shape
    check("kappa", kappa, (n,), torch.float32, z.device)
    check_map("map", map, z.device, V)
    check_map("map_teacher", map_teacher, z.device, V)
    if divergence.kind == "jsd" and divergence.beta > 0.5:
        exchanged = divergence._replace(beta=1 - divergence.beta)
        sides = (z_teacher, z, kappa, exchanged, map_teacher, map, dtype, need_teacher, need_student)
        values, dz_t, dz = divergence_(*sides)
        return values, dz, dz_t
    dz, dz_t, values = narrow(z, dtype), narrow(z_teacher, dtype), z.new_empty(n)
    beta = max(divergence.beta, torch.finfo(torch.float32).tiny)  # a weight that float32 makes 0 would meet infinities
    wq, wp = {"forward": (1.0, 0.0), "reverse": (0.0, 1.0)}.get(divergence.kind, (beta, 1 - beta))
    student, teacher = map_arguments(map, z), map_arguments(map_teacher, z)
    if n:
        with on_device(z):
            divergence_kernel[(n,)](
                z, dz, student["bias_ptr"], z_teacher, dz_t, teacher["bias_ptr"], kappa, values, V,
                z.stride(0), dz.stride(0), z_teacher.stride(0), dz_t.stride(0),
                student["inner"], student["cap"], teacher["inner"], teacher["cap"], wq, wp,
                student["HAS_BIAS"], student["CAPPED"], teacher["HAS_BIAS"], teacher["CAPPED"],
                KINDS[divergence.kind], need_student, need_teacher, PAIR.block, num_warps=PAIR.warps, num_stages=1,
            )  # fmt: skip
    return values, dz if need_student else None, dz_t if need_teacher else None
