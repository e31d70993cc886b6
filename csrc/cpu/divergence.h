// Full-vocabulary divergence of a row: p the student's distribution, q the teacher's, r a third measure.
//
//   value = a_q KL(q || r) + a_p KL(p || r),    KL(q || r) = sum q log(q / r)
//   forward: r = p, a = (1, 0)       dl = p - q                        dl_teacher = q (log q/r - KL)
//   reverse: r = q, a = (0, 1)       dl = p (log p/r - KL)             dl_teacher = q - p
//   jsd:     a = (beta, 1 - beta)    dl = a_p p (log p/r - KL(p||r))   dl_teacher = a_q q (log q/r - KL(q||r))
//            r = beta q + (1 - beta) p
//
// with 0 log 0 = 0. Works on the logits of both rows, (V,) each, in place; sums as in blocks.h.

#pragma once

#include "blocks.h"

namespace longpo {

enum class Kind { forward, reverse, jsd };

// w where it is not 0 times x, else 0: 0 log 0 = 0.
inline Vec weighed(Vec w, Vec x) {
  return Vec::blendv(w * x, Vec(0.0f), w == Vec(0.0f));
}

template <Kind kind>
struct DivergenceRow {
  float* l;         // the student's logits
  float* l_teacher;
  int64_t columns;
  LogSumExp student, teacher;
  float beta;
  // log p and log q are never formed: near -10 each would lose digits that their difference, or p / q, keeps.
  Vec scale_p{static_cast<float>(1.0 / student.sum)};
  Vec scale_q{static_cast<float>(1.0 / teacher.sum)};
  Vec log_sums{static_cast<float>(student.log_sum() - teacher.log_sum())};

  struct Terms {
    Vec p, q, ratio_p, ratio_q;  // log p/r, log q/r; 0 where the kind has no such term
  };
  struct Means {
    double p = 0, q = 0;  // KL(p || r), KL(q || r)
  };

  Terms terms(Vec logit, Vec logit_teacher) const {
    const Vec zero(0.0f);
    const Vec x = logit - Vec(student.peak), y = logit_teacher - Vec(teacher.peak);
    const Vec p = exp_nonpositive(x) * scale_p, q = exp_nonpositive(y) * scale_q;
    if constexpr (kind == Kind::forward) {
      return {p, q, zero, (y - x) + log_sums};
    } else if constexpr (kind == Kind::reverse) {
      return {p, q, (x - y) - log_sums, zero};
    } else {
      const Vec gap = p - q, minus(-1.0f);  // r = p - beta (p - q) = q + (1 - beta) (p - q)
      return {p, q, minus * (Vec(-beta) * gap / p).log1p(), minus * (Vec(1.0f - beta) * gap / q).log1p()};
    }
  }

  Means means() const {
    Means means;
    for_blocks(columns, [&](int64_t column, int64_t n) {
      BlockSum sum_p, sum_q;
      for_vectors(n, [&](int chain, int64_t j, int64_t count) {
        const Terms t = terms(Vec::loadu(l + column + j, count), Vec::loadu(l_teacher + column + j, count));
        if (kind != Kind::forward) {
          sum_p.add(chain, weighed(t.p, t.ratio_p), count);
        }
        if (kind != Kind::reverse) {
          sum_q.add(chain, weighed(t.q, t.ratio_q), count);
        }
      });
      means.p += sum_p.total();
      means.q += sum_q.total();
    });
    return means;
  }

  double value(const Means& means) const {
    return kind == Kind::forward ? means.q : kind == Kind::reverse ? means.p : beta * means.q + (1.0 - beta) * means.p;
  }

  // kappa * d value / dz over one block, into the logits of each side that is wanted.
  void gradient(const Means& means, float kappa, const Map* map, const Map* map_teacher, int64_t column,
                int64_t n) const {
    float *to = l + column, *to_teacher = l_teacher + column;
    const Vec mean_p(static_cast<float>(means.p)), mean_q(static_cast<float>(means.q));
    const Vec k_p(kind == Kind::jsd ? kappa * (1.0f - beta) : kappa), k_q(kind == Kind::jsd ? kappa * beta : kappa);
    for_vectors(n, [&](int, int64_t j, int64_t count) {
      const Vec logit = Vec::loadu(to + j, count), logit_teacher = Vec::loadu(to_teacher + j, count);
      const Terms t = terms(logit, logit_teacher);
      if (map != nullptr) {
        const Vec dl = kind == Kind::forward ? t.p - t.q : weighed(t.p, t.ratio_p - mean_p);
        (dl * k_p * map->slope(logit)).store(to + j, count);
      }
      if (map_teacher != nullptr) {
        const Vec dl = kind == Kind::reverse ? t.q - t.p : weighed(t.q, t.ratio_q - mean_q);
        (dl * k_q * map_teacher->slope(logit_teacher)).store(to_teacher + j, count);
      }
    });
  }
};

}  // namespace longpo
