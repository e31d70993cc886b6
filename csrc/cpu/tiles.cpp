// One visit of a tile of logits on the CPU: log-probabilities, gradients and divergences of rows, in place.
//
//   m = max l,  s = log sum exp(l - m),  logp = (l_y - m) - s
//   p_j = exp((l_j - m) - s),  dz_j = g (1[j == y] - p_j) f'(z_j)
//
// and, where asked for, mean = sum p_j (l_j - m), total = sum c_j (l_j - m), predicted = the first j with l_j = m, and
// dz_j = (alpha 1[j == y] + p_j (beta + gamma (l_j - m)) + delta c_j) f'(z_j).
//
// The interface, shapes and corner cases are those of longpo_ops/ops/tiles.py. Tiles are (n, V) float32 with contiguous
// columns and any pitch. Rows are split over threads; a row is read from memory once, and the second pass finds it in
// the second-level cache. Scratch: a block of kBlock floats and V / kBlock floats per thread; a divergence also two rows.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <string>
#include <string_view>
#include <vector>

#include "beside.h"
#include "blocks.h"
#include "divergence.h"

namespace longpo {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- checks -----------------------------------------------------------------------------------------------------

struct Tile {
  float* data;
  int64_t rows, columns, pitch;

  Tile(const Tensor& z, const char* name) {
    TORCH_CHECK_VALUE(z.dim() == 2 && z.scalar_type() == at::kFloat, name, " must be a (n, V) float32 tile, got ",
                      z.sizes(), " ", z.scalar_type());
    TORCH_CHECK_VALUE(z.size(1) > 0 && (z.stride(1) == 1 || z.size(1) == 1) &&
                          (z.stride(0) >= z.size(1) || z.size(0) <= 1),
                      name, " must have contiguous columns and rows that do not overlap, got strides ", z.strides());
    data = z.data_ptr<float>();
    rows = z.size(0);
    columns = z.size(1);
    pitch = z.stride(0);
  }
  float* row(int64_t i) const {
    return data + i * pitch;
  }
};

// x as contiguous numbers of type T, one per row (or `width` per row).
template <class T>
Tensor per_row(const Tensor& x, int64_t rows, const char* name, int64_t width = 1) {
  const at::ScalarType dtype = c10::CppTypeToScalarType<T>::value;
  TORCH_CHECK_VALUE(x.numel() == rows * width && x.scalar_type() == dtype, name, " must hold ", width, " ", dtype,
                    " for each of ", rows, " rows, got ", x.sizes(), " ", x.scalar_type());
  return x.contiguous();
}

Tensor checked_labels(const Tensor& labels, const Tile& z) {
  Tensor checked = per_row<int64_t>(labels, z.rows, "labels");
  const int64_t* y = checked.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < z.rows; ++i) {
    TORCH_CHECK_VALUE(0 <= y[i] && y[i] < z.columns, "labels must lie in [0, ", z.columns, "), got ", y[i]);
  }
  return checked;
}

// A bias of any floating dtype, as float32 for one call.
Tensor wide_bias(const OptionalTensor& bias, const Tile& z) {
  if (!bias.has_value()) {
    return Tensor();
  }
  TORCH_CHECK_VALUE(bias->numel() == z.columns && bias->is_floating_point(), "bias must hold ", z.columns,
                    " floating-point numbers, got ", bias->sizes(), " ", bias->scalar_type());
  return bias->to(at::kFloat).contiguous();
}

// A weight per class, or undefined.
Tensor checked_classes(const OptionalTensor& classes, const Tile& z) {
  return classes.has_value() ? per_row<float>(*classes, z.columns, "classes") : Tensor();
}

Map make_map(const Tensor& bias, double scale, double softcap) {
  const float* b = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  return {b, static_cast<float>(scale), static_cast<float>(softcap)};
}

// ---- rows -------------------------------------------------------------------------------------------------------

// f(first, last) over ranges of rows, in parallel.
template <class F>
void for_rows(const Tile& z, const F& f) {
  at::parallel_for(0, z.rows, std::max<int64_t>(1, 32768 / z.columns), f);
}

// A number per block of a row.
std::vector<float> shifts_of(const Tile& z) {
  return std::vector<float>((z.columns + kBlock - 1) / kBlock);
}

Narrow narrow_to(at::ScalarType dtype) {
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                    "dtype must be float32, bfloat16 or float16, got ", dtype);
  return dtype == at::kBFloat16 ? narrow_block<at::BFloat16> : dtype == at::kHalf ? narrow_block<at::Half> : nullptr;
}

// Sums a row; keep(column, e, count) takes exp(l - shift), a shift per block. With a soft-cap its tanh takes the row's
// place where that is asked for.
template <class Keep>
LogSumExp first_pass(float* z, int64_t columns, const Map& map, bool tanh_in_row, Label& label, float* shifts,
                     const Keep& keep) {
  LogSumExp stats;
  alignas(64) float logits[kBlock];
  for_blocks(columns, [&](int64_t column, int64_t n) {
    float* row = z + column;
    const float* l = map.logits(row, logits, column, n, tanh_in_row ? row : nullptr);
    if (label.in(column, n)) {
      label.logit = l[label.column - column];
    }
    shifts[column / kBlock] =
        stats.add(l, n, row + n, [&](int64_t j, Vec e, int64_t count) { keep(column + j, e, count); });
  });
  return stats;
}

// g * (1[j == y] - p) * f', in place.
struct LabelGradient {
  Label label;
  double logp;
  float g;
  Map map;
  Narrow narrow;

  void finish_block(float* row, int64_t column, int64_t n) const {
    if (label.in(column, n)) {
      row[label.column] = static_cast<float>(-std::expm1(logp) * g * map.slope(label.logit));
    }
    if (narrow != nullptr) {
      narrow(row, column, n);
    }
  }

  void from_logits(float* row, int64_t columns, float peak, double sum) const {
    const Vec factor(static_cast<float>(-g / sum));
    for_blocks(columns, [&](int64_t column, int64_t n) {
      float* l = row + column;
      for_vectors(n, [&](int, int64_t j, int64_t count) {
        const Vec logit = Vec::loadu(l + j, count);
        (exp_to_88(logit - Vec(peak)) * factor * map.slope(logit)).store(l + j, count);
      });
      finish_block(row, column, n);
    });
  }

  // From what the first pass kept: exponentials, times 1 - tanh^2 with a soft-cap, which need only a factor per block.
  void from_exps(float* row, int64_t columns, const LogSumExp& sums, const float* shifts) const {
    for_blocks(columns, [&](int64_t column, int64_t n) {
      const Vec f(static_cast<float>(-static_cast<double>(g) * map.scale * sums.factor(shifts[column / kBlock])));
      float* e = row + column;
      for_vectors(n, [&](int, int64_t j, int64_t count) { (Vec::loadu(e + j, count) * f).store(e + j, count); });
      finish_block(row, column, n);
    });
  }
};

// ---- operators --------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> logps(const Tensor& z, const Tensor& labels, const OptionalTensor& bias, double scale,
                                 double softcap, bool mean, bool total, bool predicted, const OptionalTensor& classes) {
  const Tile tile(z, "z");
  const Tensor y = checked_labels(labels, tile), wide = wide_bias(bias, tile), weights = checked_classes(classes, tile);
  const Map map = make_map(wide, scale, softcap);
  const Asked asked{mean, total, predicted, weights.defined() ? weights.const_data_ptr<float>() : nullptr};
  const int64_t width = asked.any() ? kColumns : 2;
  Tensor logps = z.new_empty({tile.rows}), stats = z.new_empty({tile.rows, width});
  const int64_t* label_of = y.const_data_ptr<int64_t>();
  float *logp = logps.data_ptr<float>(), *stat = stats.data_ptr<float>();
  for_rows(tile, [&](int64_t first, int64_t last) {
    std::vector<float> shifts = shifts_of(tile);
    for (int64_t i = first; i < last; ++i) {
      Label label{label_of[i]};
      BesideSums beside{asked};
      const auto nothing = [](int64_t, Vec, int64_t) {};
      const LogSumExp sums =
          asked.any() ? beside_pass(tile.row(i), tile.columns, map, label, beside)
                      : first_pass(tile.row(i), tile.columns, map, false, label, shifts.data(), nothing);
      stat[width * i] = sums.peak;
      stat[width * i + 1] = static_cast<float>(sums.log_sum());
      if (asked.any()) {
        beside.write(stat + width * i, sums);
      }
      logp[i] = static_cast<float>(sums.log_p(label.logit));
    }
  });
  return {logps, stats};
}

void gradient_(const Tensor& z, const Tensor& labels, const Tensor& stats, const Tensor& g, const OptionalTensor& bias,
               double scale, double softcap, at::ScalarType dtype, const OptionalTensor& classes) {
  const Tile tile(z, "z");
  const Tensor y = checked_labels(labels, tile), wide = wide_bias(bias, tile), c = checked_classes(classes, tile);
  const bool affine = g.dim() == 2;
  const int64_t width = stats.dim() == 2 && stats.size(1) == kColumns ? kColumns : 2;
  const Tensor s = per_row<float>(stats, tile.rows, "stats", width);
  const Tensor w = per_row<float>(g, tile.rows, "g", affine ? 4 : 1);
  const Map map = make_map(wide, scale, softcap);
  const Narrow narrow = narrow_to(dtype);
  const int64_t* label_of = y.const_data_ptr<int64_t>();
  const float *stat = s.const_data_ptr<float>(), *weight = w.const_data_ptr<float>();
  for_rows(tile, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      float* row = tile.row(i);
      const float peak = stat[width * i];
      const double log_sum = stat[width * i + 1];
      for_blocks(tile.columns, [&](int64_t column, int64_t n) { map.logits(row + column, row + column, column, n); });
      const Label label{label_of[i], row[label_of[i]]};
      if (affine) {
        const float* each = c.defined() ? c.const_data_ptr<float>() : nullptr;
        AffineGradient{label, weight + 4 * i, each, map, narrow}.from_logits(row, tile.columns, peak, log_sum);
        continue;
      }
      const double logp = (static_cast<double>(label.logit) - peak) - log_sum;
      LabelGradient{label, logp, weight[i], map, narrow}.from_logits(row, tile.columns, peak, std::exp(log_sum));
    }
  });
}

Tensor logps_gradient_(const Tensor& z, const Tensor& labels, const Tensor& g, const OptionalTensor& bias, double scale,
                       double softcap, at::ScalarType dtype) {
  const Tile tile(z, "z");
  const Tensor y = checked_labels(labels, tile), wide = wide_bias(bias, tile);
  const Tensor w = per_row<float>(g, tile.rows, "g");
  const Map map = make_map(wide, scale, softcap);
  const Narrow narrow = narrow_to(dtype);
  Tensor logps = z.new_empty({tile.rows});
  const int64_t* label_of = y.const_data_ptr<int64_t>();
  const float* weight = w.const_data_ptr<float>();
  float* logp = logps.data_ptr<float>();
  for_rows(tile, [&](int64_t first, int64_t last) {
    std::vector<float> shifts = shifts_of(tile);
    for (int64_t i = first; i < last; ++i) {
      float* row = tile.row(i);
      Label label{label_of[i]};
      const auto exps = [=](int64_t at, Vec e, int64_t count) { e.store(row + at, count); };
      const auto sloped = [=](int64_t at, Vec e, int64_t count) {
        const Vec t = Vec::loadu(row + at, count);
        (e * (Vec(1.0f) - t * t)).store(row + at, count);
      };
      const LogSumExp sums =
          softcap > 0 ? first_pass(row, tile.columns, map, true, label, shifts.data(), sloped)
                      : first_pass(row, tile.columns, map, false, label, shifts.data(), exps);
      const LabelGradient gradient{label, sums.log_p(label.logit), weight[i], map, narrow};
      logp[i] = static_cast<float>(gradient.logp);
      gradient.from_exps(row, tile.columns, sums, shifts.data());
    }
  });
  return logps;
}

enum class Kind { forward, reverse, jsd };

Kind kind_of(std::string_view name) {
  TORCH_CHECK_VALUE(name == "forward" || name == "reverse" || name == "jsd",
                    "divergence must be 'forward', 'reverse' or 'jsd', got '", name, "'");
  return name == "forward" ? Kind::forward : name == "reverse" ? Kind::reverse : Kind::jsd;
}

Tensor divergence_(const Tensor& z, const Tensor& z_teacher, const Tensor& kappa, std::string_view kind, double beta,
                   const OptionalTensor& bias, double scale, double softcap, const OptionalTensor& bias_teacher,
                   double scale_teacher, double softcap_teacher, at::ScalarType dtype, bool need_student,
                   bool need_teacher) {
  const Tile tile(z, "z"), teacher(z_teacher, "z_teacher");
  TORCH_CHECK_VALUE(tile.rows == teacher.rows && tile.columns == teacher.columns,
                    "z and z_teacher must have one shape, got ", z.sizes(), " and ", z_teacher.sizes());
  const Kind which = kind_of(kind);
  const Tensor k = per_row<float>(kappa, tile.rows, "kappa");
  const Tensor wide = wide_bias(bias, tile), wide_teacher = wide_bias(bias_teacher, teacher);
  const Map map = make_map(wide, scale, softcap), map_teacher = make_map(wide_teacher, scale_teacher, softcap_teacher);
  const Narrow narrow = narrow_to(dtype);
  Tensor values = z.new_empty({tile.rows});
  const float* weight = k.const_data_ptr<float>();
  float* value = values.data_ptr<float>();
  for_rows(tile, [&](int64_t first, int64_t last) {
    std::vector<float> scratch(2 * tile.columns);
    for (int64_t i = first; i < last; ++i) {
      Side p{tile.row(i), scratch.data(), map, need_student, narrow};
      Side q{teacher.row(i), scratch.data() + tile.columns, map_teacher, need_teacher, narrow};
      const auto visit = [&](auto row) {
        value[i] = static_cast<float>(row.value());
        row.gradients(weight[i]);
      };
      if (which == Kind::jsd) {
        visit(JsdRow(p, q, tile.columns, beta));
      } else {
        visit(which == Kind::forward ? KlRow(q, p, tile.columns) : KlRow(p, q, tile.columns));
      }
    }
  });
  return values;
}

// out (K,) += the sums of values (n,) by segments (n,), in order, one after the other.
void segment_sums(const Tensor& values, const Tensor& segments, const Tensor& out) {
  TORCH_CHECK_VALUE(out.dim() == 1 && out.scalar_type() == at::kDouble && out.is_contiguous(),
                    "out must be a contiguous (K,) float64 tensor, got ", out.sizes(), " ", out.scalar_type());
  const Tensor x = per_row<double>(values.to(at::kDouble), values.numel(), "values");
  const Tensor k = per_row<int64_t>(segments, values.numel(), "segments");
  const double* value = x.const_data_ptr<double>();
  const int64_t* segment = k.const_data_ptr<int64_t>();
  double* sum = out.data_ptr<double>();
  for (int64_t i = 0; i < values.numel(); ++i) {
    if (0 <= segment[i] && segment[i] < out.size(0)) {
      sum[segment[i]] += value[i];
    }
  }
}

}  // namespace
}  // namespace longpo

TORCH_LIBRARY_FRAGMENT(longpo_cpu, m) {
  m.def(
      "logps(Tensor z, Tensor labels, Tensor? bias, float scale, float softcap, bool mean=False, bool total=False, "
      "bool predicted=False, Tensor? classes=None) -> (Tensor, Tensor)");
  m.def(
      "gradient_(Tensor(a!) z, Tensor labels, Tensor stats, Tensor g, Tensor? bias, float scale, float softcap, "
      "ScalarType dtype, Tensor? classes=None) -> ()");
  m.def(
      "logps_gradient_(Tensor(a!) z, Tensor labels, Tensor g, Tensor? bias, float scale, float softcap, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "divergence_(Tensor(a!) z, Tensor(b!) z_teacher, Tensor kappa, str kind, float beta, Tensor? bias, float scale, "
      "float softcap, Tensor? bias_teacher, float scale_teacher, float softcap_teacher, ScalarType dtype, "
      "bool need_student, bool need_teacher) -> Tensor");
  m.def("segment_sums(Tensor values, Tensor segments, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(longpo_cpu, CPU, m) {
  m.impl("logps", longpo::logps);
  m.impl("gradient_", longpo::gradient_);
  m.impl("logps_gradient_", longpo::logps_gradient_);
  m.impl("divergence_", longpo::divergence_);
  m.impl("segment_sums", longpo::segment_sums);
}
