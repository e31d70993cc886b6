// The mathematics of the row epilogue, for nvcc and for any C++17 compiler.
//
//     l       = f(z + bias),  f(x) = scale * x  or  softcap * tanh(scale * x / softcap)
//     (m, s)  = (max_j l_j, log sum_j exp(l_j - m))
//     logp    = (l_y - m) - s
//     dz_j    = g * (1[j == y] - exp((l_j - m) - s)) * f'(z_j)
//
// and where asked for, mean = sum p_j (l_j - m), total = sum c_j (l_j - m), predicted = the first j with l_j = m, and
//
//     dz_j    = (alpha * 1[j == y] + p_j * (beta + gamma * (l_j - m)) + delta * c_j) * f'(z_j)
//
// Everything is float32. fmaf is written out where a product is added, so that the order and number of roundings do not
// depend on what a compiler contracts. No state, no memory beyond the arguments.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define ROW_MATH __host__ __device__ inline
#else
#define ROW_MATH inline
#endif

namespace row_math {

// ---- from products to logits, and the slope back ------------------------------------------------------------------

struct LogitMap {
    float scale;        // f'(0)
    float softcap;      // 0: none
    float slope;        // scale / softcap
    float inverse_cap;  // 1 / softcap
};

inline LogitMap make_logit_map(double scale, double softcap) {
    const bool capped = softcap != 0.0;
    return {float(scale), float(softcap), capped ? float(scale / softcap) : 0.0f, capped ? float(1.0 / softcap) : 0.0f};
}

ROW_MATH float to_logit(float x, const LogitMap& map) {
    return map.softcap != 0.0f ? map.softcap * tanhf(map.slope * x) : map.scale * x;
}

// f'(z) from l = f(z): scale * (1 - t^2) = scale * (1 - t) * (1 + t), t = tanh(..) = l / softcap
ROW_MATH float slope_at(float l, const LogitMap& map) {
    if (map.softcap == 0.0f) return map.scale;
    const float t = l * map.inverse_cap;
    return map.scale * fmaf(-t, t, 1.0f);
}

// ---- max and sum of exponentials, online --------------------------------------------------------------------------

// sum = sum exp(l - peak) over the logits seen. Starts at (-inf, 0). Where every logit is -inf the exponent would be
// (-inf) - (-inf) = NaN, so exponents are taken against `floor_of(peak)`: a NaN in the sum then comes from a NaN or
// +inf logit only, and survives every later rescaling.
struct OnlineSum {
    float peak;
    float sum;
};

ROW_MATH OnlineSum empty_sum() { return {-INFINITY, 0.0f}; }

ROW_MATH float floor_of(float peak) { return peak == -INFINITY ? 0.0f : peak; }

template <int N>
ROW_MATH void add_logits(OnlineSum& a, const float (&l)[N]) {
    float peak = a.peak;
    for (int i = 0; i < N; ++i) peak = fmaxf(peak, l[i]);
    const float origin = floor_of(peak);
    float sum = 0.0f;
    for (int i = 0; i < N; ++i) sum += expf(l[i] - origin);
    a.sum = fmaf(a.sum, expf(a.peak - origin), sum);
    a.peak = peak;
}

ROW_MATH OnlineSum combine(const OnlineSum& a, const OnlineSum& b) {
    const float peak = fmaxf(a.peak, b.peak);
    const float origin = floor_of(peak);
    return {peak, fmaf(a.sum, expf(a.peak - origin), b.sum * expf(b.peak - origin))};
}

// ---- and what is asked for beside ---------------------------------------------------------------------------------

// Against the floor of the peak so far, like the sum: a higher one moves mean and total by what it is higher.
struct OnlineRow {
    OnlineSum base;
    float mean;     // sum exp(l - peak) * (l - peak)
    float total;    // sum c * (l - peak)
    float classes;  // sum c
    int predicted;  // where the peak is first; INT32_MAX in an empty row
};

ROW_MATH OnlineRow empty_row() { return {empty_sum(), 0.0f, 0.0f, 0.0f, INT32_MAX}; }

ROW_MATH void raise_to(OnlineRow& a, float peak) {
    const float up = floor_of(a.base.peak) - floor_of(peak), shrink = expf(a.base.peak - floor_of(peak));
    a.mean = fmaf(up, a.base.sum, a.mean) * shrink;
    if (a.classes != 0.0f) a.total = fmaf(up, a.classes, a.total);
    a.base.sum *= shrink;
    a.base.peak = peak;
}

// Logits of places from j on with their class weights: 0 where there is no such place.
template <int N>
ROW_MATH void add_logits(OnlineRow& a, const float (&l)[N], const float (&c)[N], int j) {
    float peak = a.base.peak;
    for (int i = N - 1; i >= 0; --i) {
        if (l[i] >= peak && l[i] > a.base.peak) a.predicted = j + i;
        peak = fmaxf(peak, l[i]);
    }
    if (peak > a.base.peak) raise_to(a, peak);
    const float origin = floor_of(peak);
    for (int i = 0; i < N; ++i) {
        const float e = expf(l[i] - origin);
        a.base.sum += e;
        if (e != 0.0f) a.mean = fmaf(e, l[i] - origin, a.mean);
        if (c[i] != 0.0f) a.total = fmaf(c[i], l[i] - origin, a.total);
        a.classes += c[i];
    }
}

ROW_MATH OnlineRow combine(OnlineRow a, OnlineRow b) {
    const float peak = fmaxf(a.base.peak, b.base.peak);
    const bool first = a.base.peak > b.base.peak || (a.base.peak == b.base.peak && a.predicted < b.predicted);
    const int predicted = first ? a.predicted : b.predicted;
    raise_to(a, peak);
    raise_to(b, peak);
    return {{peak, a.base.sum + b.base.sum}, a.mean + b.mean, a.total + b.total, a.classes + b.classes, predicted};
}

// ---- results of a row ---------------------------------------------------------------------------------------------

struct Stats {
    float peak;     // m
    float log_sum;  // s
};

ROW_MATH Stats stats_of(const OnlineSum& a) { return {a.peak, logf(a.sum)}; }

ROW_MATH float log_probability(float l, const Stats& stats) { return (l - stats.peak) - stats.log_sum; }

ROW_MATH float gradient_element(float l, bool is_label, const Stats& stats, float g, const LogitMap& map) {
    const float p = expf(log_probability(l, stats));
    return g * ((is_label ? 1.0f : 0.0f) - p) * slope_at(l, map);
}

struct Affine {
    float alpha, beta, gamma, delta;
};

ROW_MATH float affine_element(float l, float c, bool is_label, const Stats& stats, const Affine& g, const LogitMap& map) {
    const float shifted = l - stats.peak, p = expf(shifted - stats.log_sum);
    const float spread = p == 0.0f ? g.beta : fmaf(g.gamma, shifted, g.beta);
    return fmaf(p, spread, fmaf(g.delta, c, is_label ? g.alpha : 0.0f)) * slope_at(l, map);
}

// ---- two 16-bit results in one word, the first in the low half; round to nearest even -----------------------------

enum Dtype { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

inline uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

inline uint16_t host_bfloat16(float x) {
    const uint32_t u = bits_of(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline uint16_t host_float16(float x) {
    const uint32_t u = bits_of(x), magnitude = u & 0x7fffffffu;
    const uint16_t sign = uint16_t((u >> 16) & 0x8000u);
    if (magnitude > 0x7f800000u) return 0x7fff;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // 65520 and up round to infinity
    if (magnitude < 0x38800000u) {                       // below 2^-14: a multiple of 2^-24; rintf rounds to even
        return sign | uint16_t(rintf(fabsf(x) * 16777216.0f));
    }
    const uint32_t rebased = magnitude - (112u << 23);  // exponent bias 127 to 15
    return sign | uint16_t((rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13);
}

ROW_MATH uint32_t pack_pair(float low, float high, Dtype dtype) {
#ifdef __CUDA_ARCH__
    if (dtype == kFloat16) {
        const __half2 pair = __floats2half2_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&pair);
    }
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
#else
    const bool half = dtype == kFloat16;
    const uint32_t a = half ? host_float16(low) : host_bfloat16(low);
    const uint32_t b = half ? host_float16(high) : host_bfloat16(high);
    return a | b << 16;
#endif
}

// ---- who visits what ----------------------------------------------------------------------------------------------

// A block of T threads visits a row in turns; in turn i thread t has the W elements from W * (i * T + t) on. Both
// passes keep to this order: sums are repeatable, and a thread meets its own elements again.
// Places within a row are 32-bit (V <= kMaxV leaves room for a turn past the end); offsets of rows are 64-bit.
constexpr int64_t kMaxV = int64_t(1) << 30;

ROW_MATH int first_element(int turn, int thread, int threads, int width) { return width * (turn * threads + thread); }

ROW_MATH int turns_of(int V, int threads, int width) { return (V + threads * width - 1) / (threads * width); }

// Small rows take small blocks, so that several share a multiprocessor; 1024 threads is the most a block can have.
inline int threads_for(int V) {
    if (V <= 4096) return 128;
    if (V <= 8192) return 256;
    return V <= 16384 ? 512 : 1024;
}

// ---- 16-bit results over their own float32 row --------------------------------------------------------------------

// Result j lies in bytes 2j and 2j+1 of the row, on top of float j/2. With E = T * W elements a turn, turn i writes
// over floats E * i / 2 to E * (i + 1) / 2, which belong to turn i / 2 (rounded down), and turns go upwards. So nothing
// unread is overwritten as long as every thread of the block has read turn i / 2 before any thread writes turn i. A
// barrier between the reads and the writes of turn r makes that true for all turns up to 2r+1; turn 2r+2 reaches into
// turn r+1 and needs the next one. In a row of which nothing was read before, barriers come at turns 0, 2, 6, 14, ...
ROW_MATH bool must_wait(int turn, int last_turn_read_by_all) { return turn > 2 * last_turn_read_by_all + 1; }

}  // namespace row_math
