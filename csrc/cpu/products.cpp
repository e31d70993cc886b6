// The products of a chunk of n rows with the head, float32 or bfloat16 operands, float32 results:
//
//   logits_                z  (n, V)  = h (n, H) W^T (H, V)
//   hidden_gradient_       dh (n, H)  = dz (n, V) W (V, H)             or dz (n, K) times K rows of W, which are named
//   add_weight_gradient_   dw (V, H) += dz^T (V, n) h (n, H)       = with `first`
//
// torch's own products return bfloat16 from bfloat16, and reach 85 % of the processor's rate on a few hundred rows. The
// block product both are made of (at::native::cpublas::brgemm) reaches all of it on what lies in the second-level cache:
//
//   C (m, kColumns) [+]= A (m, depth) B (depth, kColumns),   m <= kRows, depth <= kDepth
//
// with B packed: contiguous, and for bfloat16 in pairs of rows, B'[k / 2][j][k % 2], so that one 32-bit word holds what a
// lane multiplies at once. Every number is one chain of sums in blocks of kDepth: the same bits with any number of
// threads. logits_by_slices_ is torch's own float32 product, a slice of the head's rows by one thread each: on a few hundred
// rows and two threads 1.08 (H = 1024) to 1.18 times (H = 576) as fast as both at each slice. Beside torch's own, scratch: n H operands for h in add_weight_gradient_, and at most H kColumns + 2 kColumns kDepth words a thread.

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>
#include <vector>

namespace longpo {
namespace {

using at::BFloat16;
using at::Tensor;
using Words = std::vector<uint32_t>;

constexpr int64_t kRows = 64;
constexpr int64_t kColumns = 64;
constexpr int64_t kDepth = 256;  // 512 doubles the rounding errors of a long chain and is no faster
constexpr int64_t kSliceBytes = 2 << 20;  // of the head, about: one product of a thread
constexpr int64_t kSliceRows = 16;  // what its rows are a multiple of
constexpr int64_t kPadding = 32;  // depths are multiples of this where they follow n: few compiled block products

template <class T>
constexpr int64_t kPair = sizeof(uint32_t) / sizeof(T);

int64_t blocks(int64_t size, int64_t block) {
  return (size + block - 1) / block;
}

template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns, pitch;

  Matrix(const Tensor& x, const char* name) {
    const at::ScalarType dtype = c10::CppTypeToScalarType<T>::value;
    TORCH_CHECK_VALUE(x.dim() == 2 && x.scalar_type() == dtype && (x.stride(1) == 1 || x.size(1) == 1), name, " must be a ",
                      dtype, " matrix with contiguous columns, got ", x.sizes(), " ", x.scalar_type());
    data = x.const_data_ptr<T>();
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

// ---- packing ----------------------------------------------------------------------------------------------------

// words (rows, columns) -> out (columns, rows)
void turn(const uint32_t* in, int64_t rows, int64_t columns, int64_t pitch, uint32_t* out, int64_t out_pitch) {
  constexpr int64_t w = at::vec::Vectorized<float>::size();
  for (int64_t i = 0; i < rows; i += w) {
    for (int64_t j = 0; j < columns; j += w) {
      const uint32_t* from = in + i * pitch + j;
      uint32_t* to = out + j * out_pitch + i;
      if (rows - i >= w && columns - j >= w) {
        at::vec::transpose_mxn<float, w, w>(reinterpret_cast<const float*>(from), pitch, reinterpret_cast<float*>(to),
                                            out_pitch);
        continue;
      }
      for (int64_t a = 0; a < std::min(w, rows - i); ++a) {
        for (int64_t b = 0; b < std::min(w, columns - j); ++b) {
          to[b * out_pitch + a] = from[a * pitch + b];
        }
      }
    }
  }
}

// (rows, columns) -> words (rows / pair, columns); a last row alone is paired with zeros. `row` says where row k is.
template <class Row>
void pack_rows(const Row& row, int64_t rows, int64_t columns, uint32_t* out, int64_t out_pitch) {
  using T = std::remove_const_t<std::remove_pointer_t<decltype(row(0))>>;
  for (int64_t k = 0; k < rows; k += kPair<T>, out += out_pitch) {
    if constexpr (kPair<T> == 1) {
      std::memcpy(out, row(k), columns * sizeof(T));
      continue;
    }
    const bool paired = k + 1 < rows;
    const auto* even = reinterpret_cast<const uint16_t*>(row(k));
    const auto* odd = reinterpret_cast<const uint16_t*>(row(paired ? k + 1 : k));
    for (int64_t j = 0; j < columns; ++j) {
      out[j] = even[j] | (paired ? static_cast<uint32_t>(odd[j]) << 16 : 0);
    }
  }
}

template <class T>
void pack(const T* in, int64_t rows, int64_t columns, int64_t pitch, uint32_t* out, int64_t out_pitch) {
  pack_rows([=](int64_t k) { return in + k * pitch; }, rows, columns, out, out_pitch);
}

// (rows, columns <= kColumns) -> words (columns, rows / pair)
template <class T>
void pack_turned(const T* in, int64_t rows, int64_t columns, int64_t pitch, uint32_t* out, int64_t out_pitch) {
  if constexpr (kPair<T> == 1) {
    turn(reinterpret_cast<const uint32_t*>(in), rows, columns, pitch, out, out_pitch);
    return;
  }
  constexpr int64_t strip = 16 * kPair<T>;
  uint32_t words[16 * kColumns];
  for (int64_t k = 0; k < rows; k += strip) {
    const int64_t count = std::min(strip, rows - k);
    pack(in + k * pitch, count, columns, pitch, words, kColumns);
    turn(words, blocks(count, kPair<T>), columns, kColumns, out + k / kPair<T>, out_pitch);
  }
}

// ---- products ---------------------------------------------------------------------------------------------------

// C (rows, columns) [+]= A (rows, depth) B (depth, columns), B packed with kColumns words a row.
template <class T>
void multiply(const T* a, int64_t a_pitch, const uint32_t* b, float* c, int64_t c_pitch, int64_t rows, int64_t columns,
              int64_t depth, bool add) {
  for (int64_t i = 0; i < rows; i += kRows) {
    at::native::cpublas::brgemm(std::min(kRows, rows - i), columns, depth, a_pitch, kColumns, c_pitch, add, a + i * a_pitch,
                                reinterpret_cast<const T*>(b), c + i * c_pitch, kPair<T> == 2);
  }
}

// fn(begin, end) over ranges of tasks, split over threads.
template <class Function>
void for_tasks(int64_t tasks, const Function& fn) {
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    fn(begin, end);
    at::native::cpublas::brgemm_release(true);
  });
}

template <class T>
void logits(const Tensor& hidden, const Tensor& weight, const Tensor& out) {
  const Matrix<T> h(hidden, "hidden"), w(weight, "weight");
  TORCH_CHECK_VALUE(h.columns == w.columns && h.columns % kPair<T> == 0 && w.pitch % kPair<T> == 0, "hidden ",
                    hidden.sizes(), " and weight ", weight.sizes(),
                    " must have the same number of columns, in 16 bits an even one and an even pitch");
  const Result z(out, h.rows, w.rows, "out");
  const int64_t words = h.columns / kPair<T>;
  for_tasks(blocks(w.rows, kColumns), [&](int64_t begin, int64_t end) {
    Words packed(words * kColumns);
    for (int64_t first = begin * kColumns; first < std::min(end * kColumns, w.rows); first += kColumns) {
      const int64_t columns = std::min(kColumns, w.rows - first);
      turn(reinterpret_cast<const uint32_t*>(w.data + first * w.pitch), columns, words, w.pitch / kPair<T>, packed.data(),
           kColumns);
      for (int64_t k = 0; k < h.columns; k += kDepth) {
        multiply(h.data + k, h.pitch, packed.data() + k / kPair<T> * kColumns, z.data + first, z.pitch, h.rows, columns,
                 std::min(kDepth, h.columns - k), k > 0);
      }
    }
  });
}

// The last column of dz where their number is odd, beside zeros: (n, 2).
template <class T>
std::vector<T> odd_column(const Matrix<T>& dz) {
  std::vector<T> pairs;
  if (dz.columns % kPair<T> != 0) {
    pairs.assign(2 * dz.rows, T(0));
    for (int64_t i = 0; i < dz.rows; ++i) {
      pairs[2 * i] = dz.data[i * dz.pitch + dz.columns - 1];
    }
  }
  return pairs;
}

// The rows of the head that dz's columns meet: all of them, or those that are named.
struct MetRows {
  Tensor kept;  // (K,) int64, or undefined
  const int64_t* named = nullptr;

  MetRows(const std::optional<Tensor>& columns, int64_t count, int64_t rows) {
    if (!columns.has_value()) {
      TORCH_CHECK_VALUE(count == rows, "dz must have as many columns as weight has rows, got ", count, " and ", rows);
      return;
    }
    TORCH_CHECK_VALUE(columns->scalar_type() == at::kLong && columns->numel() == count, "columns must name ", count,
                      " rows of weight as int64, got ", columns->sizes(), " ", columns->scalar_type());
    kept = columns->contiguous();
    named = kept.const_data_ptr<int64_t>();
    TORCH_CHECK_VALUE(std::all_of(named, named + count, [=](int64_t j) { return 0 <= j && j < rows; }),
                      "columns must lie in [0, ", rows, ")");
  }
  int64_t operator()(int64_t k) const {
    return named == nullptr ? k : named[k];
  }
};

// A task is kColumns of H for all rows, or for a part of them where threads outnumber the columns' blocks.
template <class T>
void hidden_gradient(const Tensor& logits_gradient, const Tensor& weight, const std::optional<Tensor>& columns_met,
                     const Tensor& out) {
  const Matrix<T> dz(logits_gradient, "dz"), w(weight, "weight");
  const MetRows met(columns_met, dz.columns, w.rows);
  const Result dh(out, dz.rows, w.columns, "out");
  if (dz.columns == 0) {  // a sum of nothing: no block product would write it
    out.zero_();
  }
  const int64_t panels = blocks(w.columns, kColumns), even = dz.columns / kPair<T> * kPair<T>;
  const int64_t wanted = blocks(at::get_num_threads(), std::max<int64_t>(1, panels));
  const int64_t part = kRows * blocks(blocks(dz.rows, kRows), wanted), parts = part > 0 ? blocks(dz.rows, part) : 0;
  const std::vector<T> odd = odd_column(dz);
  for_tasks(panels * parts, [&](int64_t begin, int64_t end) {
    Words packed(kDepth / kPair<T> * kColumns);
    const auto add = [&](int64_t k, int64_t depth, const T* a, int64_t a_pitch) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t column = task / parts * kColumns, row = task % parts * part;
        const int64_t columns = std::min(kColumns, w.columns - column);
        if (task == begin || row == 0) {
          pack_rows([&](int64_t i) { return w.data + met(k + i) * w.pitch + column; }, std::min(depth, dz.columns - k),
                    columns, packed.data(), kColumns);
        }
        multiply(a + row * a_pitch, a_pitch, packed.data(), dh.data + row * dh.pitch + column, dh.pitch,
                 std::min(part, dz.rows - row), columns, depth, k > 0);
      }
    };
    for (int64_t k = 0; k < even; k += kDepth) {
      add(k, std::min(kDepth, even - k), dz.data + k, dz.pitch);
    }
    if (!odd.empty()) {
      add(even, 2, odd.data(), 2);
    }
  });
}

// h (n, H) in blocks of kDepth rows, each of panels (block / pair, kColumns); the last block is filled up with zeros.
template <class T>
Words packed_panels(const Matrix<T>& h, int64_t depth, int64_t panels) {
  Words packed(depth / kPair<T> * panels * kColumns);
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = 0; k < h.rows; k += kDepth) {
      const int64_t words = std::min(kDepth, depth - k) / kPair<T>;
      uint32_t* block = packed.data() + k / kPair<T> * panels * kColumns;
      for (int64_t panel = begin; panel < end; ++panel) {
        pack(h.data + k * h.pitch + panel * kColumns, std::min(kDepth, h.rows - k),
             std::min(kColumns, h.columns - panel * kColumns), h.pitch, block + panel * words * kColumns, kColumns);
      }
    }
  });
  return packed;
}

// Asks for what a product will add to: it comes from memory, and the block product would wait for each line.
void fetch(const float* c, int64_t rows, int64_t columns, int64_t pitch) {
  constexpr int64_t line = 16;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += line) {
      __builtin_prefetch(c + i * pitch + j, 1, 2);
    }
  }
}

template <class T>
void add_weight_gradient(const Tensor& weight_gradient, const Tensor& logits_gradient, const Tensor& hidden, bool first) {
  const Matrix<T> dz(logits_gradient, "dz"), h(hidden, "hidden");
  TORCH_CHECK_VALUE(dz.rows == h.rows, "dz ", logits_gradient.sizes(), " and hidden ", hidden.sizes(),
                    " must have the same number of rows");
  const Result dw(weight_gradient, dz.columns, h.columns, "dw");
  const int64_t depth = kPadding * blocks(dz.rows, kPadding), panels = blocks(h.columns, kColumns);
  const Words packed = packed_panels(h, depth, panels);
  for_tasks(blocks(dz.columns, kRows), [&](int64_t begin, int64_t end) {
    Words turned(kRows * kDepth / kPair<T>);
    const int64_t stop = std::min(end * kRows, dz.columns);
    for (int64_t row = begin * kRows; row < stop; row += kRows) {
      const int64_t rows = std::min(kRows, stop - row);
      for (int64_t k = 0; k < depth; k += kDepth) {
        const int64_t block = std::min(kDepth, depth - k), words = block / kPair<T>;
        if (k + block > dz.rows) {
          std::fill(turned.begin(), turned.end(), 0);
        }
        pack_turned(dz.data + k * dz.pitch + row, std::min(block, dz.rows - k), rows, dz.pitch, turned.data(), words);
        const uint32_t* b = packed.data() + k / kPair<T> * panels * kColumns;
        for (int64_t column = 0; column < h.columns; column += kColumns, b += words * kColumns) {
          const bool last = column + kColumns >= h.columns, add = !first || k > 0;
          if (add && k == 0) {
            const int64_t next = last ? row + kRows : row, from = last ? 0 : column + kColumns;
            fetch(dw.data + next * dw.pitch + from, std::min(kRows, stop - next), std::min(kColumns, h.columns - from),
                  dw.pitch);
          }
          multiply(reinterpret_cast<const T*>(turned.data()), block, b, dw.data + row * dw.pitch + column, dw.pitch, rows,
                   std::min(kColumns, h.columns - column), block, add);
        }
      }
    }
  });
}

// Whether this processor has the block product for operands of type T: the library answers by trying.
template <class T>
bool multiplies() {
  const std::vector<T> ones(4, T(1));
  float c[4] = {};
  try {
    at::native::cpublas::brgemm(2, 2, 2, 2, 2, 2, false, ones.data(), ones.data(), c, kPair<T> == 2);
    at::native::cpublas::brgemm_release(true);
  } catch (const std::exception&) {
    return false;
  }
  return std::all_of(c, c + 4, [](float x) { return x == 2; });
}

// As many slices for each thread, of whole cache lines of the result.
void logits_by_slices(const Tensor& hidden, const Tensor& weight, const Tensor& out) {
  const Matrix<float> h(hidden, "hidden"), w(weight, "weight");
  TORCH_CHECK_VALUE(h.columns == w.columns, "hidden ", hidden.sizes(), " and weight ", weight.sizes(),
                    " must have the same number of columns");
  const Result z(out, h.rows, w.rows, "out");
  const int64_t threads = at::get_num_threads(), bytes = w.rows * w.columns * static_cast<int64_t>(sizeof(float));
  const int64_t slices = threads * std::max<int64_t>(1, blocks(blocks(bytes, kSliceBytes), threads));
  const int64_t rows = kSliceRows * std::max<int64_t>(1, blocks(blocks(w.rows, slices), kSliceRows));
  at::parallel_for(0, blocks(w.rows, rows), 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView plain;  // a thread's own; the head may ask for a gradient
    for (int64_t first = begin * rows; first < std::min(end * rows, w.rows); first += rows) {
      const int64_t count = std::min(rows, w.rows - first);
      Tensor part = out.narrow(1, first, count);
      at::mm_out(part, hidden, weight.narrow(0, first, count).t());
    }
  });
}

// Asks for memory in large pages before it is first written: 512 times fewer page faults, and rows far apart stay within
// reach of the processor's address cache. A kernel that does not know or allow it changes nothing.
void large_pages(const Tensor& x) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 4096;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(x.data_ptr()) + page - 1) / page * page;
  const uintptr_t stop = (reinterpret_cast<uintptr_t>(x.data_ptr()) + x.storage().nbytes()) / page * page;
  if (stop > start) {
    madvise(reinterpret_cast<void*>(start), stop - start, MADV_HUGEPAGE);
  }
#endif
}

}  // namespace
}  // namespace longpo

TORCH_LIBRARY_FRAGMENT(longpo_cpu, m) {
  using namespace longpo;
  m.def("multiplies(ScalarType dtype) -> bool", [](at::ScalarType dtype) {
    return dtype == at::kFloat ? multiplies<float>() : dtype == at::kBFloat16 && multiplies<BFloat16>();
  });
  m.def("large_pages(Tensor x) -> ()", large_pages);
  m.def("logits_(Tensor hidden, Tensor weight, Tensor(a!) out) -> ()", [](const Tensor& h, const Tensor& w, Tensor z) {
    h.scalar_type() == at::kBFloat16 ? logits<BFloat16>(h, w, z) : logits<float>(h, w, z);
  });
  m.def("logits_by_slices_(Tensor hidden, Tensor weight, Tensor(a!) out) -> ()", logits_by_slices);
  m.def("hidden_gradient_(Tensor dz, Tensor weight, Tensor? columns, Tensor(a!) out) -> ()",
        [](const Tensor& dz, const Tensor& w, const std::optional<Tensor>& columns, Tensor dh) {
          dz.scalar_type() == at::kBFloat16 ? hidden_gradient<BFloat16>(dz, w, columns, dh)
                                            : hidden_gradient<float>(dz, w, columns, dh);
        });
  m.def("add_weight_gradient_(Tensor(a!) dw, Tensor dz, Tensor hidden, bool first) -> ()",
        [](Tensor dw, const Tensor& dz, const Tensor& h, bool first) {
          dz.scalar_type() == at::kBFloat16 ? add_weight_gradient<BFloat16>(dw, dz, h, first)
                                            : add_weight_gradient<float>(dw, dz, h, first);
        });
}
