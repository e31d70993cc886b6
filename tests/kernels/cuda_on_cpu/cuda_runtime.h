// The few words of CUDA that csrc/cuda uses, for a CPU without a GPU: g++ -x c++ -I <this folder> row_epilogue.cu.
//
// Blocks run one after another. The threads of a block are fibers; one runs until it waits at a barrier or a shuffle,
// then the next. Taken in ascending or in descending order, these are two extremes of what a multiprocessor may do: a
// missing barrier shows as a wrong result in one of them. A barrier that not every thread reaches ends the launch with
// an error. Shared memory starts as NaN in every block. One process, one launch at a time.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : error == cudaErrorInvalidValue ? "invalid argument" : "launch failure";
}

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1) : x(x_), y(1), z(1) {}
};
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

namespace {

constexpr int kLanes = 32, kMostThreads = 1024, kStack = 64 << 10;
constexpr size_t kSharedBytes = 227 << 10;

dim3 blockIdx, blockDim, threadIdx;
alignas(16) float4 shared[kSharedBytes / sizeof(float4)];  // what a kernel declares `extern __shared__`
size_t shared_limit = kSharedBytes;
bool descending = false;

struct Meeting {
    unsigned arrived = 0, generation = 0;
};

struct Block {
    std::function<void()> kernel;
    std::vector<ucontext_t> fibers;
    std::vector<char> stacks, done;
    ucontext_t scheduler;
    Meeting barrier, warps[kMostThreads / kLanes];
    uint64_t exchange[kMostThreads];
    bool progress;
};
Block block;

void yield() {
    const dim3 self = threadIdx;
    swapcontext(&block.fibers[self.x], &block.scheduler);
    threadIdx = self;
}

void meet(Meeting& meeting, unsigned members) {
    block.progress = true;
    const unsigned generation = meeting.generation;
    if (++meeting.arrived == members) {
        meeting.arrived = 0, ++meeting.generation;
        return;
    }
    while (meeting.generation == generation) yield();
    block.progress = true;
}

void run_fiber() {
    block.kernel();
    block.done[threadIdx.x] = 1;
    block.progress = true;
    swapcontext(&block.fibers[threadIdx.x], &block.scheduler);
}

bool run_block(unsigned threads) {
    memset(shared, 0xff, sizeof shared);
    block.barrier = {};
    for (Meeting& warp : block.warps) warp = {};
    block.done.assign(threads, 0);
    for (unsigned t = 0; t < threads; ++t) {
        getcontext(&block.fibers[t]);
        block.fibers[t].uc_stack.ss_sp = &block.stacks[size_t(t) * kStack];
        block.fibers[t].uc_stack.ss_size = kStack;
        block.fibers[t].uc_link = nullptr;
        makecontext(&block.fibers[t], run_fiber, 0);
    }
    for (unsigned left = threads; left > 0;) {
        block.progress = false;
        for (unsigned i = 0; i < threads; ++i) {
            threadIdx.x = descending ? threads - 1 - i : i;
            if (block.done[threadIdx.x]) continue;
            const unsigned t = threadIdx.x;
            swapcontext(&block.scheduler, &block.fibers[t]);
            left -= block.done[t];
        }
        if (!block.progress) return false;
    }
    return true;
}

inline void __syncthreads() { meet(block.barrier, blockDim.x); }

template <typename T>
T __shfl_down_sync(unsigned, T value, int step) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "one exchange slot");
    const unsigned thread = threadIdx.x, lane = thread % kLanes;
    memcpy(&block.exchange[thread], &value, sizeof value);
    meet(block.warps[thread / kLanes], kLanes);
    if (lane + step < kLanes) memcpy(&value, &block.exchange[thread + step], sizeof value);
    meet(block.warps[thread / kLanes], kLanes);
    return value;
}

}  // namespace

template <typename... Expected, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Given&&... given) {
    if (config->dynamicSmemBytes > shared_limit) return cudaErrorInvalidValue;
    blockDim = config->blockDim;
    block.kernel = [&] { kernel(Expected(given)...); };
    block.fibers.resize(blockDim.x);
    block.stacks.resize(size_t(blockDim.x) * kStack);
    for (blockIdx.x = 0; blockIdx.x < config->gridDim.x; ++blockIdx.x)
        if (!run_block(blockDim.x)) return cudaErrorLaunchFailure;
    return cudaSuccess;
}

struct cudaFuncAttributes {
    size_t sharedSizeBytes;
};
enum { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = int(shared_limit), cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
    return attributes->sharedSizeBytes = 0, cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
    return cudaSuccess;
}

// Set by the tests: how much shared memory a block may have, and the order in which its threads run.
extern "C" void emulate(int64_t shared_bytes, int descending_order) {
    shared_limit = size_t(shared_bytes), descending = descending_order != 0;
}
