// Full-vocabulary divergence of a row: p the student's distribution, q the teacher's, r a third measure.
//
//   value = a_q KL(q || r) + a_p KL(p || r),    KL(q || r) = sum q log(q / r)
//   forward: r = p, a = (1, 0)       dl = p - q                        dl_teacher = q (log q/r - KL)
//   reverse: r = q, a = (0, 1)       dl = p (log p/r - KL)             dl_teacher = q - p
//   jsd:     a = (beta, 1 - beta)    dl = a_p p (log p/r - KL(p||r))   dl_teacher = a_q q (log q/r - KL(q||r))
//            r = beta q + (1 - beta) p
//
// with 0 log 0 = 0. Works on the logits of both rows, (V,) each, in place, beside a row of scratch for each; sums as in
// blocks.h. log p and log q are never formed: near -10 each would lose digits that their difference keeps.

#pragma once

#include <vector>

#include "blocks.h"

namespace longpo {

// w * x where w is not 0, else 0: 0 log 0 = 0.
inline Vec weighed(Vec w, Vec x) {
#ifdef CPU_CAPABILITY_AVX512
  return _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(w, _mm512_setzero_ps(), _CMP_NEQ_UQ), w, x);
#else
  return Vec::blendv(w * x, Vec(0.0f), w == Vec(0.0f));
#endif
}

// One of the two rows. After the first visit `row` and `scratch` hold what its gradient is made of.
struct Side {
  float *row, *scratch;
  const Map& map;
  bool needed;  // whether its gradient is
  Narrow narrow;
  LogSumExp sums = {};
  std::vector<float> shifts = {};  // of the exponentials, per block

  // f(at, count) for each vector of each block, which is then narrowed; prepare(block) comes before a block.
  template <class Prepare>
  void gradient(int64_t columns, const Prepare& prepare) const {
    if (!needed) {
      return;
    }
    for_blocks(columns, [&](int64_t column, int64_t n) {
      const auto f = prepare(column / kBlock);
      for_vectors(n, [&](int, int64_t j, int64_t count) { f(column + j, count).store(row + column + j, count); });
      if (narrow != nullptr) {
        narrow(row, column, n);
      }
    });
  }
};

// KL(a || b) of two rows in two visits. With shifts s per block, e = exp(l - s) and d = (l_a - s_a) - (l_b - s_b),
//
//   log a/b = d + delta,    delta = (s_a - peak_a - log sum_a) - (s_b - peak_b - log sum_b)
//   KL = sum over blocks of factor_a (sum e_a d + delta sum e_a),    a = factor_a e_a
//
// so that the first visit has the sums of both and the divergence. It leaves d and f'_a e_a for dl_a = a (log a/b - KL),
// and f'_b e_b and f'_b e_a for dl_b = b - a.
class KlRow {
 public:
  KlRow(Side& a, Side& b, int64_t columns) : a_(a), b_(b), columns_(columns) {}

  double value() {
    for_blocks(columns_, [&](int64_t column, int64_t n) { visit(column, n); });
    log_sums_ = a_.sums.log_sum() - b_.sums.log_sum();
    for (size_t block = 0; block < sums_.size(); ++block) {
      const double f = factor(a_, block);
      if (static_cast<float>(f) != 0) {  // else 0 log 0, and `weighted` may be infinite
        kl_ += f * (sums_[block].weighted + delta(block) * sums_[block].plain);
      }
    }
    return kl_;
  }

  void gradients(float kappa) const {
    a_.gradient(columns_, [&](int64_t block) {
      const Vec f_a(static_cast<float>(factor(a_, block))), m(static_cast<float>(kl_ - delta(block))), k(kappa);
      const float *d = a_.row, *e = a_.scratch;
      return [=](int64_t at, int64_t count) {
        return weighed(Vec::loadu(e + at, count) * f_a, Vec::loadu(d + at, count) - m) * k;
      };
    });
    b_.gradient(columns_, [&](int64_t block) {
      const Vec f_a(static_cast<float>(factor(a_, block))), f_b(static_cast<float>(factor(b_, block))), k(kappa);
      const float *e_a = b_.scratch, *e_b = b_.row;
      return [=](int64_t at, int64_t count) {
        return (Vec::loadu(e_b + at, count) * f_b - Vec::loadu(e_a + at, count) * f_a) * k;
      };
    });
  }

 private:
  struct Sums {
    double plain, weighted;  // sum e_a, sum e_a d
  };

  void visit(int64_t column, int64_t n) {
    float *a = a_.row + column, *b = b_.row + column;
    float *scratch_a = a_.scratch + column, *scratch_b = b_.scratch + column;
    const float *l_a = a_.map.logits(a, a, column, n), *l_b = b_.map.logits(b, b, column, n);
    a_.shifts.push_back(a_.sums.raise(l_a, n));
    b_.shifts.push_back(b_.sums.raise(l_b, n));
    const Vec s_a(a_.shifts.back()), s_b(b_.shifts.back());
    const bool need_a = a_.needed, need_b = b_.needed;
    const Map map_a = a_.map, map_b = b_.map;
    BlockSum sum_a, sum_b, sum_d;
    for_vectors(n, [&](int chain, int64_t j, int64_t count) __attribute__((always_inline)) {
      __builtin_prefetch(a + n + j);
      __builtin_prefetch(b + n + j);
      const Vec logit_a = Vec::loadu(l_a + j, count), logit_b = Vec::loadu(l_b + j, count);
      const Vec x_a = logit_a - s_a, x_b = logit_b - s_b, d = x_a - x_b;
      const Vec e_a = exp_to_88(x_a), e_b = exp_to_88(x_b);
      sum_a.add(chain, e_a, count);
      sum_b.add(chain, e_b, count);
      sum_d.add(chain, weighed(e_a, d), count);
      if (need_a) {
        d.store(a + j, count);
        (e_a * map_a.slope(logit_a)).store(scratch_a + j, count);
      }
      if (need_b) {
        const Vec slope = map_b.slope(logit_b);
        (e_b * slope).store(b + j, count);
        (e_a * slope).store(scratch_b + j, count);
      }
    });
    a_.sums.sum += sum_a.total();
    b_.sums.sum += sum_b.total();
    sums_.push_back({sum_a.total(), sum_d.total()});
  }

  static double factor(const Side& side, int64_t block) {
    return side.sums.factor(side.shifts[block]);
  }
  double delta(int64_t block) const {
    const auto offset = [=](const Side& side) { return static_cast<double>(side.shifts[block]) - side.sums.peak; };
    return offset(a_) - offset(b_) - log_sums_;
  }

  Side &a_, &b_;
  int64_t columns_;
  double kl_ = 0, log_sums_ = 0;  // log sum_a - log sum_b
  std::vector<Sums> sums_;
};

// Jensen-Shannon divergence in three visits: the sums of both, then both KL, then the gradients. Let a be the distribution
// that weighs more in r, b the other one, s <= 1/2 its weight, and u = log a - log b:
//
//   r = a + s (b - a),    log r/a = log(1 + s (e^-u - 1)),    log r/b = log r/a + u
//
// Where s is small, so is log r/a, and a's gradient is made of nothing else: the logarithm takes s (e^-u - 1) itself, of
// which 1 + s (e^-u - 1) has lost the digits. Where s e^-u > 1, r is b in the main, and the small one is
// log r/b = log(s + (1 - s) e^u). Neither exponential can overflow, and no a or b is divided by.
//
// The first visit leaves exponentials in the scratch, the second log a/r in the row and f' a in the scratch.
class JsdRow {
 public:
  JsdRow(Side& student, Side& teacher, int64_t columns, double beta)
      : a_(beta <= 0.5 ? student : teacher),
        b_(beta <= 0.5 ? teacher : student),
        columns_(columns),
        share_(std::min(beta, 1.0 - beta)) {}

  double value() {
    sum(a_);
    sum(b_);
    for_blocks(columns_, [&](int64_t column, int64_t n) { visit(column, n); });
    return (1.0 - share_) * kl_a_ + share_ * kl_b_;
  }

  void gradients(float kappa) const {
    const auto gradient = [&](const Side& side, double kl, double share) {
      side.gradient(columns_, [&](int64_t) {
        const Vec k(static_cast<float>(kappa * share)), m(static_cast<float>(kl));
        const float *term = side.row, *weight = side.scratch;
        return [=](int64_t at, int64_t count) {
          return weighed(Vec::loadu(weight + at, count), Vec::loadu(term + at, count) - m) * k;
        };
      });
    };
    gradient(a_, kl_a_, 1.0 - share_);
    gradient(b_, kl_b_, share_);
  }

 private:
  void sum(Side& side) {
    for_blocks(columns_, [&](int64_t column, int64_t n) {
      float *row = side.row + column, *exps = side.scratch + column;
      const float* l = side.map.logits(row, row, column, n);
      const auto keep = [=](int64_t j, Vec e, int64_t count) { e.store(exps + j, count); };
      side.shifts.push_back(side.sums.add(l, n, row + n, keep));
    });
  }

  void visit(int64_t column, int64_t n) {
    const auto factor = [=](const Side& side) {
      return Vec(static_cast<float>(side.sums.factor(side.shifts[column / kBlock])));
    };
    const Vec f_a = factor(a_), f_b = factor(b_), peak_a(a_.sums.peak), peak_b(b_.sums.peak);
    const Vec log_sums(static_cast<float>(a_.sums.log_sum() - b_.sums.log_sum()));
    const float share = std::max(static_cast<float>(share_), std::numeric_limits<float>::min());  // log_normal's least
    const Vec s(share), rest(static_cast<float>(1.0 - share_)), edge(std::log(share)), one(1.0f), zero(0.0f);
    float *row_a = a_.row + column, *row_b = b_.row + column;
    float *weight_a = a_.scratch + column, *weight_b = b_.scratch + column;
    const bool need_a = a_.needed, need_b = b_.needed;
    const Map map_a = a_.map, map_b = b_.map;
    BlockSum sum_a, sum_b;
    for_vectors(n, [&](int chain, int64_t j, int64_t count) __attribute__((always_inline)) {
      const Vec logit_a = Vec::loadu(row_a + j, count), logit_b = Vec::loadu(row_b + j, count);
      const Vec a = Vec::loadu(weight_a + j, count) * f_a, b = Vec::loadu(weight_b + j, count) * f_b;
      const Vec u = ((logit_a - peak_a) - (logit_b - peak_b)) - log_sums;
      const Vec minus_u = u ^ Vec(-0.0f), is_far = u < edge;
      const Vec power = exp_minus(Vec::blendv(minus_u, u, is_far), Vec::blendv(one, zero, is_far));
      const Vec x = s * power, near = one + x;
      const Vec lost = Vec::blendv(x - (near - one), zero, is_far);
      const Vec log = log_normal(Vec::blendv(near, s + rest * power, is_far)) + lost;
      const Vec term_a = Vec::blendv(zero, u, is_far) - log, term_b = Vec::blendv(minus_u, zero, is_far) - log;
      sum_a.add(chain, weighed(a, term_a), count);
      sum_b.add(chain, weighed(b, term_b), count);
      if (need_a) {
        term_a.store(row_a + j, count);
        (a * map_a.slope(logit_a)).store(weight_a + j, count);
      }
      if (need_b) {
        term_b.store(row_b + j, count);
        (b * map_b.slope(logit_b)).store(weight_b + j, count);
      }
    });
    kl_a_ += sum_a.total();
    kl_b_ += sum_b.total();
  }

  Side &a_, &b_;
  int64_t columns_;
  double share_;                 // s
  double kl_a_ = 0, kl_b_ = 0;  // KL(a || r), KL(b || r)
};

}  // namespace longpo
