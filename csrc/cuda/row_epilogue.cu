// The row epilogue: a float32 tile of products becomes log-probabilities and, in its own memory, gradients.
//
//     z (n, V) float32, last dimension contiguous, rows `pitch` elements apart  ->  logps (n), stats (n, 2),
//     dz (n, V) float32, or float16/bfloat16 in the first half of each row           (formulas: row_math.h)
//     or stats (n, 5) with what is asked for beside, and dz of the affine family
//
// One thread block per row. Pass 1 maps the products to logits and takes max and sum of exponentials online; pass 2
// forms the gradient. The first turns of a row stay in shared memory between the passes, as many as fit: on sm_90 that
// is 57,344 logits, whole rows up to there. The rest are read again; they were read last in pass 1, so they are the
// likeliest to be in L2 still. Registers hold none: of the 64 that each of 1024 threads can have, about 50 are in use.
// Traffic per element: 4 bytes read (8 where not held), 2 or 4 written. Scratch: none in global memory.
//
// Rows at multiples of 16 bytes are visited eight elements a thread, with 16-byte reads and writes; others two at a
// time: a float32 row starts at a multiple of 4 bytes, so two 16-bit results always make one aligned word. Only a row's
// last group can be partial. Sums are float32 in a fixed order: the same input gives the same bits.
//
// Plain C interface: device pointers, sizes, a stream. Every function returns a cudaError_t and launches at most one
// kernel.
#include <cuda_runtime.h>

#include "row_math.h"

namespace {

using namespace row_math;

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kWarp;

struct Tile {
    float* z;
    int64_t pitch;
    int V;
    const int64_t* labels;
    const float* bias;  // (V) or null
    LogitMap map;
};

enum Mode { kLogps, kGradient, kLogpsAndGradient, kBeside, kAffine };

constexpr int kColumns = 5;  // of stats with what is asked for beside: peak, log_sum, mean, total, predicted

// What a launch reads and writes per row; of no use to it: null.
struct Rows {
    const float* known_stats;  // (n, columns)
    const float* g;            // (n), or (n, 4) of kAffine
    const float* classes;      // (V) or null: ones
    float* logps;
    float* new_stats;  // (n, columns)
    int columns;       // 2 or kColumns
};

// ---- groups of W elements -----------------------------------------------------------------------------------------

template <int W>
__device__ __forceinline__ void load(float (&x)[W], const float* from) {
    if constexpr (W == 8) {
        const float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    } else {
        x[0] = from[0], x[1] = from[1];
    }
}

// Products from element j on; what lies past the end of the row is never read, and counts as -inf.
template <int W>
__device__ __forceinline__ void load_products(float (&x)[W], const float* row, int j, int V) {
    if (j + W <= V) {
        load<W>(x, row + j);
    } else {
#pragma unroll
        for (int k = 0; k < W; ++k) x[k] = j + k < V ? row[j + k] : -INFINITY;
    }
}

template <int W>
__device__ __forceinline__ void to_logits(float (&x)[W], const Tile& tile, int j) {
    if (tile.bias != nullptr) {
        float b[W];
        load_products<W>(b, tile.bias, j, tile.V);
#pragma unroll
        for (int k = 0; k < W; ++k) x[k] += b[k];
    }
#pragma unroll
    for (int k = 0; k < W; ++k) x[k] = to_logit(x[k], tile.map);
    if (j + W > tile.V) {
#pragma unroll
        for (int k = 0; k < W; ++k) x[k] = j + k < tile.V ? x[k] : -INFINITY;
    }
}

template <int W>
__device__ __forceinline__ void store(float* row, int j, int V, const float (&x)[W], Dtype dtype) {
    if (dtype == kFloat32) {
        if (W == 8 && j + W <= V) {
            reinterpret_cast<float4*>(row + j)[0] = make_float4(x[0], x[1], x[2], x[3]);
            reinterpret_cast<float4*>(row + j)[1] = make_float4(x[W - 4], x[W - 3], x[W - 2], x[W - 1]);
        } else {
#pragma unroll
            for (int k = 0; k < W; ++k)
                if (j + k < V) row[j + k] = x[k];
        }
        return;
    }
    uint32_t words[W / 2];
#pragma unroll
    for (int k = 0; k < W / 2; ++k) words[k] = pack_pair(x[2 * k], x[2 * k + 1], dtype);
    uint16_t* out = reinterpret_cast<uint16_t*>(row) + j;
    if (j + W <= V) {
        if constexpr (W == 8)
            *reinterpret_cast<uint4*>(out) = make_uint4(words[0], words[1], words[2], words[3]);
        else
            *reinterpret_cast<uint32_t*>(out) = words[0];
    } else {
#pragma unroll
        for (int k = 0; k < W; ++k)
            if (j + k < V) out[k] = uint16_t(words[k / 2] >> (16 * (k % 2)));
    }
}

// Held logits: a thread reads back only what it wrote itself, so their layout is free, and planes of float4 (float2)
// keep neighbouring threads in neighbouring banks.
template <int W>
__device__ __forceinline__ void hold(float* held, int turn, const float (&x)[W]) {
    if constexpr (W == 8) {
        float4* at = reinterpret_cast<float4*>(held) + 2 * turn * blockDim.x + threadIdx.x;
        at[0] = make_float4(x[0], x[1], x[2], x[3]);
        at[blockDim.x] = make_float4(x[4], x[5], x[6], x[7]);
    } else {
        reinterpret_cast<float2*>(held)[turn * blockDim.x + threadIdx.x] = make_float2(x[0], x[1]);
    }
}

template <int W>
__device__ __forceinline__ void recall(float (&x)[W], const float* held, int turn) {
    if constexpr (W == 8) {
        const float4* at = reinterpret_cast<const float4*>(held) + 2 * turn * blockDim.x + threadIdx.x;
        const float4 a = at[0], b = at[blockDim.x];
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    } else {
        const float2 a = reinterpret_cast<const float2*>(held)[turn * blockDim.x + threadIdx.x];
        x[0] = a.x, x[1] = a.y;
    }
}

// ---- the two passes -----------------------------------------------------------------------------------------------

// Max and sum over the block, the same value in every thread. Its barrier also says: what pass 1 reads has been read.
__device__ __forceinline__ OnlineSum block_combine(OnlineSum a) {
    static __shared__ OnlineSum per_warp[kMaxWarps];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    for (int step = kWarp / 2; step > 0; step /= 2) {
        const OnlineSum b = {__shfl_down_sync(~0u, a.peak, step), __shfl_down_sync(~0u, a.sum, step)};
        a = combine(a, b);
    }
    if (lane == 0) per_warp[warp] = a;
    __syncthreads();
    a = per_warp[0];
    for (int w = 1; w < warps; ++w) a = combine(a, per_warp[w]);
    return a;
}

__device__ __forceinline__ OnlineRow shuffled(const OnlineRow& a, int step) {
    return {{__shfl_down_sync(~0u, a.base.peak, step), __shfl_down_sync(~0u, a.base.sum, step)},
            __shfl_down_sync(~0u, a.mean, step), __shfl_down_sync(~0u, a.total, step),
            __shfl_down_sync(~0u, a.classes, step), __shfl_down_sync(~0u, a.predicted, step)};
}

// The class weights from element j on; 0 past the end of the row.
template <int W>
__device__ __forceinline__ void load_classes(float (&c)[W], const float* classes, int j, int V) {
#pragma unroll
    for (int k = 0; k < W; ++k) c[k] = j + k < V ? (classes == nullptr ? 1.0f : classes[j + k]) : 0.0f;
}

// A row's sums and what is asked for beside; the result is thread 0's.
template <int W>
__device__ __forceinline__ OnlineRow sum_row_beside(const Tile& tile, const float* row, const float* classes) {
    static __shared__ OnlineRow per_warp[kMaxWarps];
    OnlineRow a = empty_row();
    const int turns = turns_of(tile.V, blockDim.x, W);
    for (int turn = 0; turn < turns; ++turn) {
        const int j = first_element(turn, threadIdx.x, blockDim.x, W);
        float x[W], c[W];
        load_products<W>(x, row, j, tile.V);
        load_classes<W>(c, classes, j, tile.V);
        to_logits<W>(x, tile, j);
        add_logits(a, x, c, j);
    }
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    for (int step = kWarp / 2; step > 0; step /= 2) a = combine(a, shuffled(a, step));
    if (lane == 0) per_warp[warp] = a;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int w = 1; w < warps; ++w) a = combine(a, per_warp[w]);
    return a;
}

__device__ __forceinline__ void write_beside(float* stats, const OnlineRow& a, const Stats& known) {
    stats[0] = known.peak;
    stats[1] = known.log_sum;
    stats[2] = a.mean / a.base.sum;
    stats[3] = a.total;
    stats[4] = known.log_sum >= 0.0f ? float(a.predicted) : -1.0f;
}

template <int W>
__device__ __forceinline__ OnlineSum sum_row(const Tile& tile, const float* row, float* held, int held_turns) {
    constexpr int kBatch = 16 / W;  // 64 bytes in flight per thread before the first is used
    OnlineSum total = empty_sum();
    const int turns = turns_of(tile.V, blockDim.x, W);
    for (int turn = 0; turn < turns; turn += kBatch) {
        float x[kBatch][W];
#pragma unroll
        for (int b = 0; b < kBatch; ++b)
            load_products<W>(x[b], row, first_element(turn + b, threadIdx.x, blockDim.x, W), tile.V);
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            to_logits<W>(x[b], tile, first_element(turn + b, threadIdx.x, blockDim.x, W));
            add_logits(total, x[b]);
            if (turn + b < held_turns) hold<W>(held, turn + b, x[b]);
        }
    }
    return block_combine(total);
}

// `element(l, j)` is the gradient at a logit l of column j.
template <int W, class Element>
__device__ __forceinline__ void write_gradient(const Tile& tile, float* row, const float* held, int held_turns,
                                               Dtype dtype, const Element& element) {
    const int turns = turns_of(tile.V, blockDim.x, W);
    int read_by_all = held_turns - 1;  // held turns were read before the barrier of pass 1
    for (int turn = 0; turn < turns; ++turn) {
        const int j = first_element(turn, threadIdx.x, blockDim.x, W);
        float x[W];
        if (turn < held_turns) {
            recall<W>(x, held, turn);
        } else {
            load_products<W>(x, row, j, tile.V);
            to_logits<W>(x, tile, j);
        }
        if (dtype != kFloat32 && must_wait(turn, read_by_all)) {  // the same answer in every thread of the block
            __syncthreads();
            read_by_all = turn;
        }
#pragma unroll
        for (int k = 0; k < W; ++k) x[k] = element(x[k], j + k);
        store<W>(row, j, tile.V, x, dtype);
    }
}

template <int W, Mode mode>
__global__ void __launch_bounds__(kMaxThreads)
    row_kernel(const Tile tile, const Rows rows, const int turns_that_fit, const Dtype dtype) {
    extern __shared__ float4 shared[];
    float* held = reinterpret_cast<float*>(shared);
    const int held_turns = mode == kLogpsAndGradient ? turns_that_fit : 0;
    const int64_t t = blockIdx.x;
    const int label = int(tile.labels[t]);
    float* row = tile.z + t * tile.pitch;
    Stats stats;
    if constexpr (mode == kGradient || mode == kAffine) {
        stats = {rows.known_stats[rows.columns * t], rows.known_stats[rows.columns * t + 1]};
    } else {
        float label_logit = 0.0f;  // read before pass 2 writes over it
        if (threadIdx.x == 0) {
            const float x = row[label] + (tile.bias != nullptr ? tile.bias[label] : 0.0f);
            label_logit = to_logit(x, tile.map);
        }
        if constexpr (mode == kBeside) {
            const OnlineRow sums = sum_row_beside<W>(tile, row, rows.classes);
            stats = stats_of(sums.base);
            if (threadIdx.x == 0) write_beside(rows.new_stats + kColumns * t, sums, stats);
        } else {
            stats = stats_of(sum_row<W>(tile, row, held, held_turns));
        }
        if (threadIdx.x == 0) {
            rows.logps[t] = log_probability(label_logit, stats);
            if constexpr (mode == kLogps)
                rows.new_stats[2 * t] = stats.peak, rows.new_stats[2 * t + 1] = stats.log_sum;
        }
    }
    if constexpr (mode == kAffine) {
        const float* from = rows.g + 4 * t;
        const Affine g = {from[0], from[1], from[2], from[3]};
        write_gradient<W>(tile, row, held, held_turns, dtype, [&](float l, int j) {
            const float c = rows.classes == nullptr || j >= tile.V ? 1.0f : rows.classes[j];
            return affine_element(l, c, j == label, stats, g, tile.map);
        });
    } else if constexpr (mode == kGradient || mode == kLogpsAndGradient) {
        const float g = rows.g[t];
        write_gradient<W>(tile, row, held, held_turns, dtype,
                          [&](float l, int j) { return gradient_element(l, j == label, stats, g, tile.map); });
    }
}

// ---- segmented sums: one block per segment, float64, the values of a segment in a fixed order ---------------------

__global__ void __launch_bounds__(kMaxThreads)
    segment_kernel(const double* values, const int64_t* segments, int64_t n, double* out) {
    static __shared__ double per_warp[kMaxWarps];
    const int64_t k = blockIdx.x;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x)
        if (segments[i] == k) sum += values[i];
    for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_down_sync(~0u, sum, step);
    if (lane == 0) per_warp[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < warps; ++w) sum += per_warp[w];
        out[k] += sum;
    }
}

// ---- launchers ----------------------------------------------------------------------------------------------------

#define RETURN_ON_ERROR(call)                         \
    do {                                              \
        const cudaError_t error_ = (call);            \
        if (error_ != cudaSuccess) return error_;     \
    } while (false)

cudaLaunchConfig_t launch_config(int64_t blocks, int threads, int shared_bytes, cudaStream_t stream) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared_bytes);
    config.stream = stream;
    return config;
}

template <int W, Mode mode>
cudaError_t launch_width(const Tile& tile, int64_t n, const Rows& rows, Dtype dtype, cudaStream_t stream) {
    const auto kernel = row_kernel<W, mode>;
    const int threads = threads_for(tile.V);
    const int bytes_per_turn = threads * W * int(sizeof(float));
    int held_turns = 0;
    if constexpr (mode == kLogpsAndGradient) {
        int device = 0, limit = 0;
        cudaFuncAttributes attributes;
        RETURN_ON_ERROR(cudaGetDevice(&device));
        RETURN_ON_ERROR(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
        RETURN_ON_ERROR(cudaFuncGetAttributes(&attributes, kernel));
        const int fits = (limit - int(attributes.sharedSizeBytes)) / bytes_per_turn;
        const int turns = turns_of(tile.V, threads, W);
        held_turns = fits < turns ? fits : turns;
        RETURN_ON_ERROR(
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, fits * bytes_per_turn));
    }
    const cudaLaunchConfig_t config = launch_config(n, threads, held_turns * bytes_per_turn, stream);
    return cudaLaunchKernelEx(&config, kernel, tile, rows, held_turns, dtype);
}

bool on_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

Tile tile_of(float* z, int64_t V, int64_t pitch, const int64_t* labels, const float* bias, double scale,
             double softcap) {
    return {z, pitch, V <= kMaxV ? int(V) : 0, labels, bias, make_logit_map(scale, softcap)};
}

template <Mode mode>
cudaError_t launch(const Tile& tile, int64_t n, const Rows& rows, int dtype, void* stream) {
    if (n < 0 || n > INT32_MAX || tile.V < 1 || tile.pitch < tile.V || dtype < kFloat32 || dtype > kBFloat16)
        return cudaErrorInvalidValue;  // V > kMaxV: Tile holds 0
    if (n == 0) return cudaSuccess;
    const bool wide = on_16_bytes(tile.z) && (n == 1 || tile.pitch % 4 == 0) && on_16_bytes(tile.bias);
    const auto go = wide ? launch_width<8, mode> : launch_width<2, mode>;
    return go(tile, n, rows, Dtype(dtype), cudaStream_t(stream));
}

}  // namespace

extern "C" {

int longpo_logps(const float* z, int64_t n, int64_t V, int64_t pitch, const int64_t* labels, const float* bias,
                 double scale, double softcap, float* logps, float* stats, void* stream) {
    const Tile tile = tile_of(const_cast<float*>(z), V, pitch, labels, bias, scale, softcap);
    return launch<kLogps>(tile, n, {nullptr, nullptr, nullptr, logps, stats, 2}, kFloat32, stream);
}

// stats (n, 5): all of them, whatever is asked for. classes (V) or null.
int longpo_beside(const float* z, int64_t n, int64_t V, int64_t pitch, const int64_t* labels, const float* bias,
                  double scale, double softcap, float* logps, float* stats, const float* classes, void* stream) {
    const Tile tile = tile_of(const_cast<float*>(z), V, pitch, labels, bias, scale, softcap);
    return launch<kBeside>(tile, n, {nullptr, nullptr, classes, logps, stats, kColumns}, kFloat32, stream);
}

int longpo_gradient(float* z, int64_t n, int64_t V, int64_t pitch, const int64_t* labels, const float* bias,
                    double scale, double softcap, const float* stats, int columns, const float* g, int dtype,
                    void* stream) {
    const Tile tile = tile_of(z, V, pitch, labels, bias, scale, softcap);
    return launch<kGradient>(tile, n, {stats, g, nullptr, nullptr, nullptr, columns}, dtype, stream);
}

// g (n, 4): alpha, beta, gamma, delta of each row. classes (V) or null.
int longpo_affine(float* z, int64_t n, int64_t V, int64_t pitch, const int64_t* labels, const float* bias, double scale,
                  double softcap, const float* stats, int columns, const float* g, const float* classes, int dtype,
                  void* stream) {
    const Tile tile = tile_of(z, V, pitch, labels, bias, scale, softcap);
    return launch<kAffine>(tile, n, {stats, g, classes, nullptr, nullptr, columns}, dtype, stream);
}

int longpo_logps_gradient(float* z, int64_t n, int64_t V, int64_t pitch, const int64_t* labels, const float* bias,
                          double scale, double softcap, const float* g, float* logps, int dtype, void* stream) {
    const Tile tile = tile_of(z, V, pitch, labels, bias, scale, softcap);
    return launch<kLogpsAndGradient>(tile, n, {nullptr, g, nullptr, logps, nullptr, 2}, dtype, stream);
}

// out (K) float64 += sums of values (n) float64 by segments (n) in [0, K); any other segment belongs nowhere.
int longpo_segment_sums(const double* values, const int64_t* segments, int64_t n, double* out, int64_t K,
                        void* stream) {
    if (n < 0 || K < 0 || K > INT32_MAX) return cudaErrorInvalidValue;
    if (n == 0 || K == 0) return cudaSuccess;
    const cudaLaunchConfig_t config = launch_config(K, kMaxThreads, 0, cudaStream_t(stream));
    return cudaLaunchKernelEx(&config, segment_kernel, values, segments, n, out);
}

const char* longpo_error_string(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // extern "C"
