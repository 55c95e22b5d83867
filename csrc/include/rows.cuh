// What kernels over rows of a matrix share: 16-byte vectors, conversions, asynchronous copies, sums over a row.
//
// A row is handled by ROW_THREADS threads; small rows share a block of at least BLOCK_THREADS.
//
//     block    | group 0: row r      | group 1: row r + 1  | ...      ROWS = THREADS / ROW_THREADS groups
//     thread   item 0: vector `lane`, item 1: vector `lane + ROW_THREADS`, ...
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace megads {

constexpr int WARP = 32;
constexpr int BLOCK_THREADS = 128;

template <typename T, int SIZE>
struct alignas(sizeof(T) * SIZE) Vector {
  T at[SIZE];
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T narrow(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// Global -> shared without passing through registers, where the hardware has such a copy (4 and 16 bytes). The thread
// that copied may read its own copy after `wait_copies`; nobody else may without a barrier.
template <typename V>
__device__ __forceinline__ void copy_async(V* shared, const V* global) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (sizeof(V) == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
  } else if constexpr (sizeof(V) == 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(global) : "memory");
  } else {
    *shared = *global;
  }
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most PENDING of the committed groups are still under way.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Shape of the work of one block.
template <typename T_, int VECTOR_, int ITEMS_, int ROW_THREADS_>
struct Plan {
  using T = T_;
  static constexpr int VECTOR = VECTOR_;  // elements of a vector
  static constexpr int ITEMS = ITEMS_;    // vectors of a thread
  static constexpr int ROW_THREADS = ROW_THREADS_;
  static constexpr int THREADS = ROW_THREADS > BLOCK_THREADS ? ROW_THREADS : BLOCK_THREADS;
  static constexpr int ROWS = THREADS / ROW_THREADS;
  static constexpr int WARPS = THREADS / WARP;
  using Pack = Vector<T, VECTOR>;
};

// Sum over the threads of a row, the same in each of them. All threads of the block call it together. `scratch` holds
// WARPS floats and must not be the one of the call before, so that one barrier is enough.
template <typename P>
__device__ __forceinline__ float row_sum(float value, float* scratch) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  if constexpr (P::ROW_THREADS > WARP) {
    constexpr int ROW_WARPS = P::ROW_THREADS / WARP;
    const int warp = threadIdx.x / WARP;
    if (threadIdx.x % WARP == 0) scratch[warp] = value;
    __syncthreads();
    const float* mine = scratch + warp / ROW_WARPS * ROW_WARPS;
    value = 0.f;
#pragma unroll
    for (int k = 0; k < ROW_WARPS; ++k) value += mine[k];
  }
  return value;
}

// Calls `launch(Plan)` with the smallest plan that holds a row; false if the row is too long for any.
template <typename T, typename Launch>
bool with_plan(int64_t row_size, bool is_aligned, Launch launch) {
  constexpr int WIDE = 16 / sizeof(T);
  if (is_aligned && row_size % WIDE == 0) {
    const int64_t threads = (row_size / WIDE + 3) / 4;
    if (threads <= 32) return launch(Plan<T, WIDE, 4, 32>{}), true;
    if (threads <= 64) return launch(Plan<T, WIDE, 4, 64>{}), true;
    if (threads <= 128) return launch(Plan<T, WIDE, 4, 128>{}), true;
    if (threads <= 256) return launch(Plan<T, WIDE, 4, 256>{}), true;
    if (threads <= 512) return launch(Plan<T, WIDE, 4, 512>{}), true;
    if constexpr (sizeof(T) == 4) {  // two-byte rows of 16384 elements need no more than 512
      if (threads <= 1024) return launch(Plan<T, WIDE, 4, 1024>{}), true;
    }
  } else {  // odd lengths and odd addresses: element by element
    const int64_t threads = (row_size + 15) / 16;
    if (threads <= 32) return launch(Plan<T, 1, 16, 32>{}), true;
    if (threads <= 256) return launch(Plan<T, 1, 16, 256>{}), true;
    if (threads <= 1024) return launch(Plan<T, 1, 16, 1024>{}), true;
  }
  return false;
}

}  // namespace megads
