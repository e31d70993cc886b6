// Arithmetic on a block: up to kBlock neighbouring columns of one row, small enough to stay in the first-level cache.
//
//   logits   l = f(z + bias),  f(x) = scale * x  or  softcap * tanh(scale * x / softcap)
//   sums     peak = max l,  sum = sum exp(l - peak), raised block by block (online logsumexp)
//
// Accuracy: a block is summed in 4 * Vec::size() float chains of at most kBlock / (4 * Vec::size()) terms, the blocks
// in double. Every function gives the same bits whatever the number of threads: a row is always one thread's.

#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace longpo {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kBlock = 1024;
constexpr int kChains = 4;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// f(column, n) for each block of a row.
template <class F>
inline void for_blocks(int64_t columns, const F& f) {
  for (int64_t column = 0; column < columns; column += kBlock) {
    f(column, std::min(kBlock, columns - column));
  }
}

// f(chain, j, count) for each vector of a block; `count` folds to a constant everywhere but in the ragged end.
template <class F>
[[gnu::always_inline]] inline void for_vectors(int64_t n, const F& f) {
  constexpr int64_t w = Vec::size();
  int64_t j = 0;
  for (; j + kChains * w <= n; j += kChains * w) {
    f(0, j, w);
    f(1, j + w, w);
    f(2, j + 2 * w, w);
    f(3, j + 3 * w, w);
  }
  for (; j + w <= n; j += w) {
    f(0, j, w);
  }
  if (j < n) {
    f(0, j, n - j);
  }
}

// The first `count` lanes of x, `rest` in the others.
inline Vec keep(Vec x, Vec rest, int64_t count) {
  return count == Vec::size() ? x : Vec::set(rest, x, count);
}

// e^x - base for x <= 88 and a base of 0 or 1. e^x is within 1.12 ulp down to 2^-126 and exactly 0 below; e^x - 1 keeps the
// digits of a small x. NaN stays NaN.
#ifdef CPU_CAPABILITY_AVX512
// x = (n + j/16) ln2 + r. Adding 1.5 * 2^23 to 16 x / ln2 rounds it to 16 n + j and leaves that number in the low bits: four
// choose 2^(j/16) from a register, the others are added to its exponent. |r| <= ln2 / 32 needs three terms of e^r - 1.
[[gnu::always_inline]] inline Vec exp_minus(Vec x, Vec base) {
  const __m512 powers = _mm512_setr_ps(1.0f, 1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f, 1.29683955f,
                                       1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f, 1.68179283f,
                                       1.75625216f, 1.83400809f, 1.91520656f);
  const Vec magic(12582912.0f);
  const Vec shifted = at::vec::fmadd(x, Vec(23.0831207f), magic);
  const Vec n = shifted - magic;
  const Vec r = at::vec::fmadd(n, Vec(1.19040888e-10f), at::vec::fmadd(n, Vec(-0.0433216989f), x));
  const __m512i bits = _mm512_castps_si512(shifted);
  const __m512i exponent = _mm512_and_si512(_mm512_slli_epi32(bits, 19), _mm512_set1_epi32(-(1 << 23)));
  const __m512i power = _mm512_castps_si512(_mm512_permutexvar_ps(bits, powers));
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.3365f), _CMP_NLT_UQ);
  const __m512 two_n = _mm512_castsi512_ps(_mm512_maskz_add_epi32(normal, power, exponent));
  const Vec p = at::vec::fmadd(r * r, at::vec::fmadd(r, Vec(0.166666667f), Vec(0.5f)), r);
  return _mm512_mask3_fmadd_ps(p, two_n, Vec(two_n) - base, normal);
}
#else
// x = n ln2 + r. Adding 1.5 * 2^23 + 127 rounds x / ln2 to n and leaves n + 127, the exponent bits of 2^n, in the low
// bits; at the clamp n is -127 and those bits are the number 0. The polynomial is the relative minimax of e^r for
// |r| <= ln2 / 2.
[[gnu::always_inline]] inline Vec exp_minus(Vec x, Vec base) {
  using Int = at::vec::Vectorized<int32_t>;
  using at::vec::fmadd;
  const Vec magic(12583039.0f);
  x = at::vec::clamp_min(x, Vec(-88.0f));
  const Vec shifted = fmadd(x, Vec(1.44269504f), magic);
  const Vec n = shifted - magic;
  // ln2 in two parts, n times the first being exact: processors without fused multiply-add would lose r otherwise.
  const Vec r = fmadd(n, Vec(2.12194440e-4f), fmadd(n, Vec(-0.693359375f), x));
  const Vec two_n = at::vec::cast<float>(at::vec::cast<int32_t>(shifted) << Int(23));
  Vec p = fmadd(r, Vec(1.38145e-3f), Vec(8.36875e-3f));
  p = fmadd(r, p, Vec(4.166839e-2f));
  p = fmadd(r, p, Vec(0.1666652f));
  p = fmadd(r, p, Vec(0.49999993f));
  p = fmadd(r, p, Vec(1.0f));
  return fmadd(r * p, two_n, two_n - base);
}
#endif

inline Vec exp_to_88(Vec x) {
  return exp_minus(x, Vec(0.0f));
}

// log w for normal 0 < w < infinity, within 1 ulp: w = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), and
// log(1 + f) = f - f^2 / 2 + f^3 P(f), P the minimax relative to the logarithm. The bits of sqrt(1/2), taken from those of
// w, leave k above the mantissa; k becomes a float as exp's n does. NaN, whose bits look like a number's, stays NaN by w * 0.
[[gnu::always_inline]] inline Vec log_normal(Vec w) {
  using Int = at::vec::Vectorized<int32_t>;
  using at::vec::fmadd;
  const Int half(0x3f3504f3), bits = at::vec::cast<int32_t>(w) - half;
  const Vec k = at::vec::cast<float>((bits >> Int(23)) + Int(0x4b400000)) - Vec(12582912.0f);
  const Vec f = at::vec::cast<float>((bits & Int(0x7fffff)) + half) - Vec(1.0f);
  Vec p = fmadd(f, Vec(-7.63443783e-2f), Vec(0.127615631f));
  p = fmadd(f, p, Vec(-0.131601974f));
  p = fmadd(f, p, Vec(0.142017603f));
  p = fmadd(f, p, Vec(-0.166233554f));
  p = fmadd(f, p, Vec(0.200012267f));
  p = fmadd(f, p, Vec(-0.250008225f));
  p = fmadd(f, p, Vec(0.333333313f));
  p = fmadd(f, p, Vec(-0.5f));
  return fmadd(w, Vec(0.0f), fmadd(k, Vec(0.693147181f), fmadd(f * f, p, f)));
}

// tanh x within 1.5 ulp: x + x^3 P(x^2) up to |x| = 0.55, P the relative minimax, and beyond, with u = e^(-2|x|),
// 1 - 2u / (1 + u), where little is subtracted from 1. Most vectors of logits need the first alone, a third of the work.
inline Vec tanh(Vec x) {
  using at::vec::fmadd;
  const Vec z = x * x;
  Vec p = fmadd(z, Vec(-6.26669802e-3f), Vec(2.10666562e-2f));
  p = fmadd(z, p, Vec(-5.38511704e-2f));
  p = fmadd(z, p, Vec(0.133325761f));
  p = fmadd(z, p, Vec(-0.333333173f));
  const Vec small = fmadd(x * z, p, x), is_small = z < Vec(0.3025f);
  if (is_small.zero_mask() == 0) {
    return small;
  }
  const Vec sign = x & Vec(-0.0f), two(2.0f), one(1.0f);
  const Vec u = exp_to_88((x | Vec(-0.0f)) * two);
  const Vec large = (one - two * u / (one + u)) | sign;
  return Vec::blendv(large, small, is_small);
}

// How a product becomes a logit.
struct Map {
  const float* bias;  // (V,) or null
  float scale;
  float softcap;  // 0: none

  bool identity() const {
    return bias == nullptr && scale == 1.0f && softcap == 0.0f;
  }

  // The logits of columns [column, column + n): z itself where the map is the identity, else written to `to` (z or a
  // buffer). With a soft-cap also their tanh, where a place for it is given.
  const float* logits(const float* z, float* to, int64_t column, int64_t n, float* tanhs = nullptr) const {
    if (identity()) {
      return z;
    }
    const auto write = [&](const auto& f) {
      for_vectors(n, [=](int, int64_t j, int64_t count) {
        f(Vec::loadu(z + j, count), j, count).store(to + j, count);
      });
    };
    const float* shift = bias + column;
    const auto biased = [=](Vec x, int64_t j, int64_t count) { return x + Vec::loadu(shift + j, count); };
    const Vec inner(softcap > 0 ? scale / softcap : scale), cap(softcap);
    const auto capped = [=](Vec x, int64_t j, int64_t count) {
      const Vec t = tanh(x * inner);
      if (tanhs != nullptr) {
        t.store(tanhs + j, count);
      }
      return t * cap;
    };
    if (softcap > 0 && bias != nullptr) {
      write([=](Vec x, int64_t j, int64_t count) { return capped(biased(x, j, count), j, count); });
    } else if (softcap > 0) {
      write(capped);
    } else if (bias != nullptr) {
      write([=](Vec x, int64_t j, int64_t count) { return biased(x, j, count) * inner; });
    } else {
      write([=](Vec x, int64_t, int64_t) { return x * inner; });
    }
    return to;
  }

  // f' as a function of the logit.
  template <class T>
  T slope(T logit) const {
    if (softcap == 0) {
      return T(scale);
    }
    const T t = logit / T(softcap);  // a reciprocal's rounding would show where the quotient is near 1
    return T(scale) * (T(1.0f) - t * t);
  }
};

// max of a block. A NaN may be dropped here: the sum of exponentials, which every caller also takes, keeps it.
inline float block_max(const float* l, int64_t n) {
  Vec peak[kChains] = {Vec(-kInfinity), Vec(-kInfinity), Vec(-kInfinity), Vec(-kInfinity)};
  for_vectors(n, [&](int chain, int64_t j, int64_t count) {
    peak[chain] = at::vec::clamp_min(keep(Vec::loadu(l + j, count), Vec(-kInfinity), count), peak[chain]);
  });
  const Vec a = at::vec::clamp_min(peak[0], peak[1]);
  const Vec b = at::vec::clamp_min(peak[2], peak[3]);
  alignas(64) float lanes[Vec::size()];
  at::vec::clamp_min(a, b).store(lanes);
  return *std::max_element(lanes, lanes + Vec::size());
}

// Sums over a block in kChains chains of vectors.
class BlockSum {
 public:
  void add(int chain, Vec x, int64_t count) {
    chains_[chain] = chains_[chain] + keep(x, Vec(0.0f), count);
  }
  double total() const {
    alignas(64) float lanes[Vec::size()];
    ((chains_[0] + chains_[1]) + (chains_[2] + chains_[3])).store(lanes);
    double sum = 0;
    for (float lane : lanes) {
      sum += lane;
    }
    return sum;
  }

 private:
  Vec chains_[kChains] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
};

// Online logsumexp of a row.
struct LogSumExp {
  float peak = -kInfinity;
  double sum = 0;

  // Raises the peak to a block's. Returns the shift that its exponentials take: the peak so far, or 0 while all is -inf,
  // where subtracting the peak would turn zeros into NaN.
  float raise(const float* l, int64_t n) {
    const float top = block_max(l, n);
    if (top > peak) {
      sum *= std::exp(static_cast<double>(peak) - top);
      peak = top;
    }
    return peak == -kInfinity ? 0.0f : peak;
  }

  // Adds a block and hands keep(j, e, count) its exponentials exp(l - shift). Returns the shift. `next` is what the row's
  // next block will read from memory: asked for here, where arithmetic leaves the memory idle (a third of the visit's time
  // with a scale or a bias).
  template <class Keep>
  float add(const float* l, int64_t n, const float* next, const Keep& keep) {
    const float shift = raise(l, n);
    BlockSum block;
    for_vectors(n, [&](int chain, int64_t j, int64_t count) {
      __builtin_prefetch(next + j);
      const Vec e = exp_to_88(Vec::loadu(l + j, count) - Vec(shift));
      keep(j, e, count);
      block.add(chain, e, count);
    });
    sum += block.total();
    return shift;
  }

  // What makes probabilities of a block's exponentials: one double factor rounded once, which spares the rounding of
  // (l - peak) - log_sum, several ulps of p where log_sum is near 10. A shift above the peak is that of a block of zeros.
  double factor(float shift) const {
    return (shift == peak ? 1.0 : shift > peak ? 0.0 : std::exp(static_cast<double>(shift) - peak)) / sum;
  }
  double log_sum() const {
    return std::log(sum);
  }
  double log_p(float logit) const {
    return (static_cast<double>(logit) - peak) - log_sum();
  }
};

// A float32 block, n columns from `column` of `row`, to the 16-bit columns of the same row, in its first half. Safe in
// place: column j is written at byte 2j after every byte below 4j has been read, block by block and vector by vector.
template <class T>
inline void narrow_block(float* row, int64_t column, int64_t n) {
  const float* from = row + column;
  T* to = reinterpret_cast<T*>(row) + column;
  constexpr int64_t w = Vec::size();
  for (int64_t j = 0; j < n; j += 2 * w) {
    const int64_t count = std::min(2 * w, n - j);
    const Vec low = Vec::loadu(from + j, std::min(w, count));
    const Vec high = Vec::loadu(from + j + w, std::max<int64_t>(0, count - w));
    at::vec::convert_from_float<T>(low, high).store(to + j, count);
  }
}

using Narrow = void (*)(float* row, int64_t column, int64_t n);

}  // namespace longpo
