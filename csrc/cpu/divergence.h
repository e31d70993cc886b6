// Full-vocabulary divergence of a row: p the student's distribution, q the teacher's, r a third measure.
//
//   value = a_q KL(q || r) + a_p KL(p || r),    KL(q || r) = sum q log(q / r)
//   forward: r = p, a = (1, 0)       dl = p - q                        dl_teacher = q (log q/r - KL)
//   reverse: r = q, a = (0, 1)       dl = p (log p/r - KL)             dl_teacher = q - p
//   jsd:     a = (beta, 1 - beta)    dl = a_p p (log p/r - KL(p||r))   dl_teacher = a_q q (log q/r - KL(q||r))
//            r = beta q + (1 - beta) p
//
// with 0 log 0 = 0. Works on the logits of both rows, (V,) each, in place, beside the exponentials that their sums left;
// sums as in blocks.h. With u = log p - log q, e = exp(-|u|), and c the weight in r of the smaller of p and q,
//
//   log(larger / r) = -log(1 - c (1 - e)),    log(smaller / r) = log(larger / r) - |u|

#pragma once

#include "blocks.h"

namespace longpo {

enum class Kind { forward, reverse, jsd };

// w where it is not 0 times x, else 0: 0 log 0 = 0.
inline Vec weighed(Vec w, Vec x) {
  return Vec::blendv(w * x, Vec(0.0f), w == Vec(0.0f));
}

// One of the two rows. A gradient is share * slope * (p - q), written at once, or share * weight * (term - mean), for which
// the first visit leaves weight = slope * p where the exponentials were, and the term where the logits were.
struct Side {
  float *logits, *exps;
  const float* shifts;  // of the exponentials, per block
  LogSumExp sums;
  const Map& map;
  bool needed;  // whether its gradient is
  Narrow narrow;

  Vec factor(int64_t column) const {
    return Vec(static_cast<float>(sums.factor(shifts[column / kBlock])));
  }

  void leave(int64_t at, Vec logit, Vec p, Vec term, int64_t count) const {
    if (needed) {
      term.store(logits + at, count);
      (p * map.slope(logit)).store(exps + at, count);
    }
  }
  void write(int64_t at, Vec logit, Vec gradient, int64_t count) const {
    if (needed) {
      (gradient * map.slope(logit)).store(logits + at, count);
    }
  }

  void gradient(double mean, float share, int64_t columns) const {
    if (!needed) {
      return;
    }
    const Vec m(static_cast<float>(mean)), k(share);
    for_blocks(columns, [&](int64_t column, int64_t n) {
      float *to = logits + column, *weight = exps + column;
      for_vectors(n, [=](int, int64_t j, int64_t count) {
        (weighed(Vec::loadu(weight + j, count), Vec::loadu(to + j, count) - m) * k).store(to + j, count);
      });
      narrow_block(column, n);
    });
  }
  void narrow_block(int64_t column, int64_t n) const {
    if (needed && narrow != nullptr) {
      narrow(logits, column, n);
    }
  }
};

template <Kind kind>
struct DivergenceRow {
  Side student, teacher;
  int64_t columns;
  float beta;
  // log p and log q are never formed: near -10 each would lose digits that their difference keeps.
  Vec log_sums{static_cast<float>(student.sums.log_sum() - teacher.sums.log_sum())};

  struct Means {
    double p = 0, q = 0;  // KL(p || r), KL(q || r)
  };

  Means means(float kappa) const {
    Means means;
    for_blocks(columns, [&](int64_t column, int64_t n) {
      BlockSum sum_p, sum_q;
      const Vec f_p = student.factor(column), f_q = teacher.factor(column), k(kappa), one(1.0f), zero(0.0f);
      for_vectors(n, [&](int chain, int64_t j, int64_t count) __attribute__((always_inline)) {
        const int64_t at = column + j;
        const Vec logit = Vec::loadu(student.logits + at, count), logit_teacher = Vec::loadu(teacher.logits + at, count);
        const Vec p = Vec::loadu(student.exps + at, count) * f_p, q = Vec::loadu(teacher.exps + at, count) * f_q;
        const Vec u = ((logit - Vec(student.sums.peak)) - (logit_teacher - Vec(teacher.sums.peak))) - log_sums;
        Vec term = u, term_teacher = zero - u;  // log p/r, log q/r
        if constexpr (kind == Kind::jsd) {
          const Vec minus = u | Vec(-0.0f), p_larger = u >= zero;  // -|u|
          const Vec c = Vec::blendv(Vec(1.0f - beta), Vec(beta), p_larger);
          const Vec larger = zero - log_normal(one - c * (one - exp_nonpositive(minus))), smaller = larger + minus;
          term = Vec::blendv(smaller, larger, p_larger);
          term_teacher = Vec::blendv(larger, smaller, p_larger);
        }
        if constexpr (kind == Kind::forward) {
          student.write(at, logit, (p - q) * k, count);
        } else {
          student.leave(at, logit, p, term, count);
          sum_p.add(chain, weighed(p, term), count);
        }
        if constexpr (kind == Kind::reverse) {
          teacher.write(at, logit_teacher, (q - p) * k, count);
        } else {
          teacher.leave(at, logit_teacher, q, term_teacher, count);
          sum_q.add(chain, weighed(q, term_teacher), count);
        }
      });
      means.p += sum_p.total();
      means.q += sum_q.total();
      if (kind == Kind::forward) {
        student.narrow_block(column, n);
      }
      if (kind == Kind::reverse) {
        teacher.narrow_block(column, n);
      }
    });
    return means;
  }

  double value(const Means& means) const {
    return kind == Kind::jsd ? beta * means.q + (1.0 - beta) * means.p : means.p + means.q;
  }

  // What `means` has not yet written.
  void gradients(const Means& means, float kappa) const {
    if (kind != Kind::forward) {
      student.gradient(means.p, kind == Kind::jsd ? kappa * (1.0f - beta) : kappa, columns);
    }
    if (kind != Kind::reverse) {
      teacher.gradient(means.q, kind == Kind::jsd ? kappa * beta : kappa, columns);
    }
  }
};

}  // namespace longpo
