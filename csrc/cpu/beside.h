// What a row tells beside its log-probability, and the affine family of its gradients.
//
//   mean = sum p_j (l_j - m),  total = sum c_j (l_j - m),  predicted = the first j with l_j = m
//   dz_j = (alpha 1[j == y] + p_j (beta + gamma (l_j - m)) + delta c_j) f'(z_j)
//
// Where p_j = 0 and l_j = -inf, p_j (l_j - m) is 0; where c_j = 0, so is c_j (l_j - m). Accuracy: as in blocks.h, blocks in
// float chains and their sums in double. Nothing is visited for a column of stats that was not asked for.

#pragma once

#include "blocks.h"

namespace longpo {

// The label of a row, and its logit once that has been met.
struct Label {
  int64_t column;
  float logit = 0;

  bool in(int64_t begin, int64_t n) const {
    return begin <= column && column < begin + n;
  }
};

constexpr int64_t kColumns = 5;  // of stats: peak, log_sum, mean, total, predicted

// c of some columns; ones without classes.
Vec classes_at(const float* classes, int64_t column, int64_t count) {
  return classes == nullptr ? Vec(1.0f) : Vec::loadu(classes + column, count);
}

// l - m as a factor of e^(l - m): finite where that is 0. NaN stays in the exponential.
Vec finite(Vec shifted) {
  return at::vec::clamp_min(shifted, Vec(-1e3f));
}

struct Asked {
  bool mean, total, predicted;
  const float* classes;  // (V,) or null

  bool any() const {
    return mean || total || predicted;
  }
};

// Raised block by block beside LogSumExp, whose shift is that of all terms so far: a higher one moves the sums by what it
// is higher.
struct BesideSums {
  Asked asked;
  double mean = 0, total = 0, classes = 0;
  int64_t predicted = -1;

  void raise(float from, float to, double sum) {
    if (sum > 0) {
      const double up = static_cast<double>(from) - to;
      mean = (mean + up * sum) * std::exp(up);
    }
    if (classes != 0) {
      total += (static_cast<double>(from) - to) * classes;
    }
  }

  // A block of logits and their exponentials by `shift`; `raised` says that its peak is the highest so far.
  void add(const float* l, const float* e, int64_t column, int64_t n, float shift, bool raised) {
    if (asked.predicted && raised) {
      predicted = column + (std::find(l, l + n, shift) - l);
    }
    if (asked.mean) {
      BlockSum block;
      for_vectors(n, [&](int chain, int64_t j, int64_t count) {
        block.add(chain, Vec::loadu(e + j, count) * finite(Vec::loadu(l + j, count) - Vec(shift)), count);
      });
      mean += block.total();
    }
    if (asked.total) {
      BlockSum block, weights;
      const float* c = asked.classes;
      for_vectors(n, [&](int chain, int64_t j, int64_t count) {
        const Vec x = Vec::loadu(l + j, count) - Vec(shift), weight = classes_at(c, column + j, count);
        block.add(chain, Vec::blendv(weight * x, Vec(0.0f), weight == Vec(0.0f)), count);
        weights.add(chain, weight, count);
      });
      total += block.total();
      classes += weights.total();
    }
  }

  void write(float* stats, const LogSumExp& sums) const {
    const bool scored = sums.log_sum() >= 0;
    stats[2] = asked.mean ? static_cast<float>(mean / sums.sum) : 0.0f;
    stats[3] = static_cast<float>(total);
    stats[4] = asked.predicted ? static_cast<float>(scored ? predicted : -1) : 0.0f;
  }
};

// Sums a row as tiles.cpp's first_pass does, and what is asked for beside.
LogSumExp beside_pass(float* z, int64_t columns, const Map& map, Label& label, BesideSums& beside) {
  LogSumExp stats;
  alignas(64) float logits[kBlock], exps[kBlock];
  for_blocks(columns, [&](int64_t column, int64_t n) {
    const float* l = map.logits(z + column, logits, column, n);
    if (label.in(column, n)) {
      label.logit = l[label.column - column];
    }
    const float before = stats.peak;
    const double sum = stats.sum;
    const float shift =
        stats.add(l, n, z + column + n, [&](int64_t j, Vec e, int64_t count) { e.store(exps + j, count); });
    const bool raised = stats.peak > before;
    if (raised) {
      beside.raise(sum > 0 ? before : 0.0f, stats.peak, sum);
    }
    beside.add(l, exps, column, n, shift, raised);
  });
  return stats;
}

// (alpha 1[j == y] + p (beta + gamma (l - m)) + delta c) * f', in place of a row's logits.
struct AffineGradient {
  Label label;
  const float* g;        // alpha, beta, gamma, delta
  const float* classes;  // (V,) or null
  Map map;
  Narrow narrow;

  void from_logits(float* row, int64_t columns, float peak, double log_sum) const {
    const Vec share(static_cast<float>(std::exp(-log_sum))), beta(g[1]), gamma(g[2]), delta(g[3]);
    for_blocks(columns, [&](int64_t column, int64_t n) {
      float* l = row + column;
      for_vectors(n, [&](int, int64_t j, int64_t count) {
        const Vec logit = Vec::loadu(l + j, count), shifted = logit - Vec(peak);
        const Vec spread = at::vec::fmadd(gamma, finite(shifted), beta);
        const Vec dl = at::vec::fmadd(exp_to_88(shifted) * share, spread, delta * classes_at(classes, column + j, count));
        (dl * map.slope(logit)).store(l + j, count);
      });
      if (label.in(column, n)) {
        row[label.column] = static_cast<float>(at_label(peak, log_sum) * map.slope(label.logit));
      }
      if (narrow != nullptr) {
        narrow(row, column, n);
      }
    });
  }

  // alpha + beta p as (alpha + beta) + beta (p - 1): where p nears 1, the terms of -logp nearly cancel.
  double at_label(float peak, double log_sum) const {
    const double shifted = static_cast<double>(label.logit) - peak, less = std::expm1(shifted - log_sum);
    const double spread = shifted == -kInfinity ? 0.0 : g[2] * shifted * (less + 1.0);
    const double smooth = static_cast<double>(g[3]) * (classes == nullptr ? 1.0 : classes[label.column]);
    return (static_cast<double>(g[0]) + g[1]) + g[1] * less + spread + smooth;
  }
};

}  // namespace longpo
