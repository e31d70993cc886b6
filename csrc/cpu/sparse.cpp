// The columns of a chunk's dz that its hidden gradient needs, and what stands for the others. Equations, bound and the plain
// form: longpo_ops/ops/sparse.py.
//
//   keep_columns_   dz (n, V) float32 or bfloat16  ->  columns (K,), sums (G, V), shares (n,); dz's first K columns become
//                   those that are kept, in order. K = V: none is dropped, and dz is as it was.
//
// Rows fall into G groups of neighbours, each one thread's: the same bits with any number of threads. A group reads its rows
// from memory twice and finds them in the second-level cache in between. Scratch: the sums, V floats and a block a thread.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <atomic>
#include <numeric>
#include <vector>

#include "blocks.h"

namespace longpo {
namespace {

using at::Tensor;

// A block of any dtype as floats: itself, or converted into `to`.
inline const float* widened(const float* from, int64_t, float*) {
  return from;
}

inline const float* widened(const at::BFloat16* from, int64_t n, float* to) {
  for (int64_t j = 0; j < n; ++j) {
    to[j] = static_cast<float>(from[j]);
  }
  return to;
}

inline float largest_of(const Vec (&peaks)[kChains]) {
  alignas(64) float lanes[Vec::size()];
  at::vec::maximum(at::vec::maximum(peaks[0], peaks[1]), at::vec::maximum(peaks[2], peaks[3])).store(lanes);
  return *std::max_element(lanes, lanes + Vec::size());
}

template <class T>
struct Rows {
  T* data;
  int64_t rows, columns, pitch;

  // f(column, n, x) for the blocks of row i, x its n numbers.
  template <class F>
  void blocks(int64_t i, const F& f) const {
    alignas(64) float wide[kBlock];
    for_blocks(columns, [&](int64_t column, int64_t n) { f(column, n, widened(data + i * pitch + column, n, wide)); });
  }
};

// 1 / |row without its largest number|, 0 for a row of zeros; not finite where the row is not.
template <class T>
float inverse_tail(const Rows<T>& dz, int64_t i, float floor) {
  double squares = 0, top = 0;
  dz.blocks(i, [&](int64_t, int64_t n, const float* x) {
    Vec peaks[kChains] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
    BlockSum sum;
    for_vectors(n, [&](int chain, int64_t j, int64_t count) {
      const Vec v = Vec::loadu(x + j, count);
      peaks[chain] = at::vec::maximum(peaks[chain], keep(v.abs(), Vec(0.0f), count));
      sum.add(chain, v * v, count);
    });
    squares += sum.total();
    top = std::max(top, static_cast<double>(largest_of(peaks)));
  });
  if (!std::isfinite(squares)) {
    return std::numeric_limits<float>::quiet_NaN();
  }
  const double tail = std::max(std::sqrt(std::max(0.0, squares - top * top)), floor * top);
  return top > 0 ? static_cast<float>(1 / tail) : 0.0f;
}

// peaks (V,) = max(peaks, |row| inverse)
template <class T>
void raise(const Rows<T>& dz, int64_t i, float inverse, float* peaks) {
  dz.blocks(i, [&](int64_t column, int64_t n, const float* x) {
    float* to = peaks + column;
    for_vectors(n, [&](int, int64_t j, int64_t count) {
      at::vec::maximum(Vec::loadu(to + j, count), Vec::loadu(x + j, count).abs() * Vec(inverse)).store(to + j, count);
    });
  });
}

// The sum of the row's dropped numbers.
template <class T>
double dropped_sum(const Rows<T>& dz, int64_t i, const float* dropped) {
  double total = 0;
  dz.blocks(i, [&](int64_t column, int64_t n, const float* x) {
    BlockSum sum;
    for_vectors(n, [&](int chain, int64_t j, int64_t count) {
      sum.add(chain, Vec::loadu(x + j, count) * Vec::loadu(dropped + column + j, count), count);
    });
    total += sum.total();
  });
  return total;
}

// sums (V,) += weight * the row's dropped numbers
template <class T>
void add_dropped(const Rows<T>& dz, int64_t i, const float* dropped, float weight, float* sums) {
  dz.blocks(i, [&](int64_t column, int64_t n, const float* x) {
    float* to = sums + column;
    for_vectors(n, [&](int, int64_t j, int64_t count) {
      const Vec part = Vec::loadu(x + j, count) * Vec::loadu(dropped + column + j, count);
      at::vec::fmadd(part, Vec(weight), Vec::loadu(to + j, count)).store(to + j, count);
    });
  });
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> keep_columns(const Tensor& z, double epsilon, double floor, double most, int64_t groups) {
  const Rows<T> dz{z.data_ptr<T>(), z.size(0), z.size(1), z.stride(0)};
  const auto wide = z.options().dtype(at::kFloat);
  Tensor sums = z.new_zeros({groups, dz.columns}, wide), shares = z.new_zeros({dz.rows}, wide);
  std::vector<float> inverse(dz.rows), dropped(dz.columns);
  float *sum = sums.data_ptr<float>(), *share = shares.data_ptr<float>();
  const int64_t size = (dz.rows + groups - 1) / groups;
  std::atomic<bool> finite = true;
  const auto for_groups = [&](const auto& f) {
    at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        f(sum + group * dz.columns, std::min(group * size, dz.rows), std::min((group + 1) * size, dz.rows));
      }
    });
  };

  for_groups([&](float* peaks, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      inverse[i] = inverse_tail(dz, i, static_cast<float>(floor));
      if (!std::isfinite(inverse[i])) {
        finite = false;
      }
      raise(dz, i, inverse[i], peaks);
    }
  });
  std::vector<int64_t> columns;
  for (int64_t j = 0; j < dz.columns; ++j) {
    float peak = 0;
    for (int64_t group = 0; group < groups; ++group) {
      peak = std::max(peak, sum[group * dz.columns + j]);
    }
    const bool kept = peak > epsilon;
    dropped[j] = kept ? 0.0f : 1.0f;
    if (kept) {
      columns.push_back(j);
    }
  }
  const auto kept = static_cast<int64_t>(columns.size());
  if (!finite || kept > most * dz.columns) {
    return {z.new_empty({dz.columns}, z.options().dtype(at::kLong)), sums, shares};
  }
  for_groups([&](float* into, int64_t first, int64_t last) {
    std::fill(into, into + dz.columns, 0.0f);
    double mass = 0;
    for (int64_t i = first; i < last; ++i) {
      const double total = dropped_sum(dz, i, dropped.data());
      add_dropped(dz, i, dropped.data(), total < 0 ? -inverse[i] : inverse[i], into);
      share[i] = static_cast<float>(total);
      mass += std::abs(total) * inverse[i];
      T* row = dz.data + i * dz.pitch;
      for (int64_t k = 0; k < kept; ++k) {
        row[k] = row[columns[k]];
      }
    }
    for (int64_t i = first; i < last; ++i) {
      share[i] = mass > 0 ? static_cast<float>(share[i] / mass) : 0.0f;
    }
  });
  Tensor named = z.new_empty({kept}, z.options().dtype(at::kLong));
  std::copy(columns.begin(), columns.end(), named.data_ptr<int64_t>());
  return {named, sums, shares};
}

}  // namespace
}  // namespace longpo

TORCH_LIBRARY_FRAGMENT(longpo_cpu, m) {
  m.def(
      "keep_columns_(Tensor(a!) dz, float epsilon, float floor, float most, int groups) -> (Tensor, Tensor, Tensor)",
      [](at::Tensor dz, double epsilon, double floor, double most, int64_t groups) {
        TORCH_CHECK_VALUE(dz.dim() == 2 && (dz.stride(1) == 1 || dz.size(1) == 1) && groups > 0 &&
                              (dz.scalar_type() == at::kFloat || dz.scalar_type() == at::kBFloat16),
                          "dz must be a float32 or bfloat16 matrix with contiguous columns, got ", dz.sizes(), " ",
                          dz.scalar_type());
        return dz.scalar_type() == at::kFloat ? longpo::keep_columns<float>(dz, epsilon, floor, most, groups)
                                              : longpo::keep_columns<at::BFloat16>(dz, epsilon, floor, most, groups);
      });
}
