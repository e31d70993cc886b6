"""Reading a row of logits on the device: what every kernel here shares.

    l = f(z + bias),  f(x) = inner * x           (cap == 0)     f'(z) = inner
                      f(x) = cap * tanh(inner * x)  (cap > 0)   f'(z) = inner * cap * (1 - (l / cap)^2)

so inner = scale, or scale / softcap where there is a soft-cap: `map_arguments` turns a LogitMap into the kernels'
arguments. A row's stats are peak = max_j l_j and log_sum = log sum_j exp(l_j - peak), found online: each lane keeps its
own maximum and sum, one exponential per logit, and lanes meet only once, at the row's end. NaN and +inf end in log_sum
= NaN. Everything is float32; a row is visited by one program, columns are int32 and row offsets int64.

Tests: tests/kernels/test_interpreter.py, tests/kernels/test_compile.py.
"""

import triton
import triton.language as tl

# A finite start for the running maximum: -inf would turn a logit of -inf into -inf - -inf = NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


def map_arguments(map, fallback):
    """LogitMap -> the keyword arguments of a kernel that reads logits; `fallback` is any tensor, for an absent bias."""
    return {
        "bias_ptr": fallback if map.bias is None else map.bias,
        "inner": float(map.scale / map.softcap if map.softcap else map.scale),
        "cap": float(map.softcap),
        "HAS_BIAS": map.bias is not None,
        "CAPPED": bool(map.softcap),
    }


@triton.jit
def tanh(x):
    """Within 2 ulp, given exp within 2: an odd polynomial (relative error 1e-9) where 1 - 2 / (exp(2x) + 1) cancels."""
    a = tl.abs(x)
    u = x * x
    p = 0.00258266925 + u * -0.00045546057
    p = -0.0539293016 + u * (0.0216635428 + u * (-0.00826454502 + u * p))
    near = x + x * u * (-0.333333223 + u * (0.133329783 + u * p))
    far = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.9, near, tl.where(x < 0, -far, far))


@triton.jit
def apply_map(z, bias, inner, cap, CAPPED: tl.constexpr):
    """Products (without bias) to logits."""
    if CAPPED:
        return cap * tanh((z + bias) * inner)
    else:
        return (z + bias) * inner


@triton.jit
def map_slope(logits, inner, cap, CAPPED: tl.constexpr):
    """f' at these logits."""
    if CAPPED:
        bent = logits / cap
        return inner * cap * (1.0 - bent * bent)
    else:
        return inner


@triton.jit
def load_bias(bias_ptr, columns, inside, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        return tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    else:
        return 0.0


@triton.jit
def load_logits(
    z_row, bias_ptr, columns, V, inner, cap, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, KEEP: tl.constexpr
):
    """Some columns of a row as logits; columns beyond V get -inf, which no maximum or sum notices.

    KEEP: the row is read again soon, so the cache should rather drop something else.
    """
    inside = columns < V
    z = tl.load(z_row + columns, mask=inside, other=0.0, eviction_policy="evict_last" if KEEP else "evict_first")
    logits = apply_map(z, load_bias(bias_ptr, columns, inside, HAS_BIAS), inner, cap, CAPPED)
    return tl.where(inside, logits, float("-inf"))


@triton.jit
def load_label_logit(z_row, bias_ptr, label, inner, cap, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr):
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + label).to(tl.float32)
    return apply_map(tl.load(z_row + label), bias, inner, cap, CAPPED)


@triton.jit
def row_stats(
    z_row,
    bias_ptr,
    V,
    inner,
    cap,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """-> peak, log_sum of a row, block by block.

    sum_new = sum * exp(m - max) + exp(l - max): one of the two exponents is 0, so exp(-|l - m|) serves both.
    """
    peaks = tl.full((BLOCK,), LOWEST, tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        logits = load_logits(z_row, bias_ptr, start + tl.arange(0, BLOCK), V, inner, cap, HAS_BIAS, CAPPED, KEEP)
        step = logits - peaks
        shrink = tl.exp(-tl.abs(step))
        sums = tl.where(step > 0, sums * shrink + 1.0, sums + shrink)
        peaks = tl.maximum(peaks, logits)
    peak = tl.max(peaks, 0)
    return peak, tl.log(tl.sum(sums * tl.exp(peaks - peak), 0))


@triton.jit
def load_classes(classes_ptr, columns, inside, HAS_CLASSES: tl.constexpr):
    """The class weights c of some columns: ones without classes, 0 beyond the row."""
    if HAS_CLASSES:
        return tl.load(classes_ptr + columns, mask=inside, other=0.0)
    else:
        return tl.where(inside, 1.0, 0.0)


@triton.jit
def beside_stats(
    z_row,
    bias_ptr,
    classes_ptr,
    V,
    inner,
    cap,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    HAS_CLASSES: tl.constexpr,
    MEAN: tl.constexpr,
    TOTAL: tl.constexpr,
    PREDICTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """-> peak, log_sum, and where asked for mean, total and predicted (ops/tiles.py) of a row, block by block; else 0.

    Each lane's terms are taken against its own maximum so far; a higher one moves its sums by what it is higher.
    """
    peaks = tl.full((BLOCK,), LOWEST, tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    means = tl.zeros((BLOCK,), tl.float32)
    totals = tl.zeros((BLOCK,), tl.float32)
    weights = tl.zeros((BLOCK,), tl.float32)
    places = tl.full((BLOCK,), V, tl.int32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = load_logits(z_row, bias_ptr, columns, V, inner, cap, HAS_BIAS, CAPPED, False)
        step = logits - peaks
        shrink = tl.exp(-tl.abs(step))
        raised = step > 0
        if PREDICTED:
            places = tl.where(raised | ((logits == peaks) & (places == V)), columns, places)
        if MEAN:
            moved = tl.where(sums > 0, (means - step * sums) * shrink, 0.0)
            means = tl.where(raised, moved, means + tl.where(shrink > 0, step * shrink, 0.0))
        if TOTAL:
            c = load_classes(classes_ptr, columns, columns < V, HAS_CLASSES)
            moved = tl.where(sums > 0, totals - step * weights, totals)
            totals = tl.where(raised, moved, totals + tl.where(c != 0, c * step, 0.0))
            weights += c
        sums = tl.where(raised, sums * shrink + 1.0, sums + shrink)
        peaks = tl.maximum(peaks, logits)
    peak = tl.max(peaks, 0)
    below = peaks - peak
    share = tl.exp(below)
    total_sum = tl.sum(sums * share, 0)
    mean, total, predicted = 0.0, 0.0, 0.0
    if MEAN:
        mean = tl.sum(tl.where(sums * share > 0, (means + below * sums) * share, 0.0), 0) / total_sum
    if TOTAL:
        total = tl.sum(totals + tl.where(weights != 0, below * weights, 0.0), 0)
    if PREDICTED:
        predicted = tl.min(tl.where(peaks == peak, places, V), 0).to(tl.float32)
    return peak, tl.log(total_sum), mean, total, predicted
