// The products of a chunk whose 16-bit result would lose too much, for processors that multiply bfloat16 (AVX-512 BF16, AMX):
//
//   logits_                z  (n, V) float32  = h (n, H) W^T (H, V)           bfloat16 operands
//   add_weight_gradient_   dw (V, H) float32 += dz^T (V, n) h (n, H)          bfloat16 operands
//
// torch has no bfloat16 product with a float32 result on the CPU, but it has the block product they are made of
// (at::native::cpublas::brgemm): C (M, N) [+]= A (M, K) B (K, N), B packed in pairs of rows, B'[k / 2][j][k % 2].
// W is packed block by block of kBlock rows, h once. Scratch: 2 H kBlock + 2 kBlock n bytes a thread, and 2 n H bytes.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace longpo {
namespace {

using at::BFloat16;
using at::Tensor;

constexpr int64_t kBlock = 64;
constexpr int64_t kWide = 256;
constexpr int64_t kTurn = 32;

struct Matrix {
  const BFloat16* data;
  int64_t rows, columns, pitch;

  Matrix(const Tensor& x, const char* name) {
    TORCH_CHECK_VALUE(x.dim() == 2 && x.scalar_type() == at::kBFloat16 && (x.stride(1) == 1 || x.size(1) == 1), name,
                      " must be a bfloat16 matrix with contiguous columns, got ", x.sizes(), " ", x.scalar_type());
    data = x.const_data_ptr<BFloat16>();
    rows = x.size(0);
    columns = x.size(1);
    pitch = x.stride(0);
  }
};

struct Result {
  float* data;
  int64_t pitch;

  Result(const Tensor& x, int64_t rows, int64_t columns, const char* name) {
    TORCH_CHECK_VALUE(x.dim() == 2 && x.scalar_type() == at::kFloat && x.size(0) == rows && x.size(1) == columns &&
                          (x.stride(1) == 1 || columns == 1),
                      name, " must be a (", rows, ", ", columns, ") float32 matrix with contiguous columns, got ", x.sizes(),
                      " ", x.scalar_type());
    data = x.data_ptr<float>();
    pitch = x.stride(0);
  }
};

// fn(start, count) for each block of kBlock of `size`, split over threads.
template <class Function>
void for_blocks(int64_t size, Function fn) {
  at::parallel_for(0, (size + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
    auto body = fn();  // a thread's scratch
    for (int64_t block = begin; block < end; ++block) {
      body(block * kBlock, std::min(kBlock, size - block * kBlock));
    }
    at::native::cpublas::brgemm_release(true);
  });
}

void logits_(const Tensor& hidden, const Tensor& weight, const Tensor& out) {
  const Matrix h(hidden, "hidden"), w(weight, "weight");
  TORCH_CHECK_VALUE(h.columns == w.columns && h.columns % 2 == 0, "hidden ", hidden.sizes(), " and weight ",
                    weight.sizes(), " must have the same even number of columns");
  const Result z(out, h.rows, w.rows, "out");
  const int64_t pairs = h.columns / 2;
  for_blocks(w.rows, [&] {
    return [&, packed = std::vector<uint32_t>(pairs * kBlock)](int64_t first, int64_t count) mutable {
      for (int64_t j = 0; j < count; ++j) {
        const BFloat16* row = w.data + (first + j) * w.pitch;
        for (int64_t k = 0; k < pairs; ++k) {
          std::memcpy(&packed[k * kBlock + j], row + 2 * k, 4);
        }
      }
      const auto* b = reinterpret_cast<const BFloat16*>(packed.data());
      for (int64_t i = 0; i < h.rows; i += kBlock) {
        at::native::cpublas::brgemm(std::min(kBlock, h.rows - i), count, h.columns, h.pitch, kBlock, z.pitch, false,
                                    h.data + i * h.pitch, b, z.data + i * z.pitch + first);
      }
    };
  });
}

// Columns first .. first + count - 1 of dz (n, V) -> out (count, depth), in squares of kTurn whose cache lines stay at hand.
void turn(const Matrix& dz, int64_t first, int64_t count, BFloat16* out, int64_t depth) {
  for (int64_t i = 0; i < dz.rows; i += kTurn) {
    const int64_t rows = std::min(kTurn, dz.rows - i);
    const BFloat16* corner = dz.data + i * dz.pitch + first;
    for (int64_t j = 0; j < count; ++j) {
      BFloat16* line = out + j * depth + i;
      for (int64_t k = 0; k < rows; ++k) {
        line[k] = corner[k * dz.pitch + j];
      }
    }
  }
}

// (n, H) -> blocks of kWide columns, each (depth / 2, kWide, 2); rows n .. depth - 1 are zero.
std::vector<BFloat16> packed_in_pairs(const Matrix& h, int64_t depth) {
  const int64_t blocks = (h.columns + kWide - 1) / kWide;
  std::vector<BFloat16> packed(blocks * depth * kWide, BFloat16(0));
  at::parallel_for(0, h.rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < h.columns; ++j) {
        packed[((j / kWide) * depth + i / 2 * 2) * kWide + j % kWide * 2 + i % 2] = h.data[i * h.pitch + j];
      }
    }
  });
  return packed;
}

void add_weight_gradient_(const Tensor& weight_gradient, const Tensor& logits_gradient, const Tensor& hidden) {
  const Matrix dz(logits_gradient, "dz"), h(hidden, "hidden");
  TORCH_CHECK_VALUE(dz.rows == h.rows, "dz ", logits_gradient.sizes(), " and hidden ", hidden.sizes(),
                    " must have the same number of rows");
  const Result dw(weight_gradient, dz.columns, h.columns, "dw");
  const int64_t depth = (dz.rows + 31) / 32 * 32;  // few depths, few compiled block products
  const std::vector<BFloat16> packed = packed_in_pairs(h, depth);
  for_blocks(dz.columns, [&] {
    return [&, turned = std::vector<BFloat16>(kBlock * depth, BFloat16(0))](int64_t first, int64_t count) mutable {
      turn(dz, first, count, turned.data(), depth);
      for (int64_t j = 0; j < h.columns; j += kWide) {
        at::native::cpublas::brgemm(count, std::min(kWide, h.columns - j), depth, depth, kWide, dw.pitch, true,
                                    turned.data(), packed.data() + j * depth, dw.data + first * dw.pitch + j);
      }
    };
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(longpo_cpu, m) {
  m.def("logits_(Tensor hidden, Tensor weight, Tensor(a!) out) -> ()", [](const Tensor& h, const Tensor& w, Tensor z) {
    logits_(h, w, z);
  });
  m.def("add_weight_gradient_(Tensor(a!) dw, Tensor dz, Tensor hidden) -> ()",
        [](Tensor dw, const Tensor& dz, const Tensor& h) { add_weight_gradient_(dw, dz, h); });
}

}  // namespace longpo
