// RMSNorm (Zhang and Sennrich 2019), forward and backward, float arithmetic on float, half and bfloat16 rows.
//
// Bound by memory: forward reads x, writes y; backward reads x and dy, writes dx. Each is touched once: a row stays in
// registers (forward) or shared memory (backward) between its sum and its result.
//
// Backward, with g = dy * weight and r = rstd:   dx = r g - x r^3 mean(g x)      dweight = sum over rows of dy x r
//
//     grid      as many blocks as fit the device, each walks over rows; the next rows are on their way to shared memory
//               while one is computed; every thread keeps dweight of its columns in registers
//     partials  [blocks, hidden], then one small kernel adds them in order: no atomics, the same bits each time
#include <algorithm>
#include <initializer_list>

#include "include/norm.cuh"
#include "include/rows.cuh"

namespace megads {
namespace {

// Registers are capped so that enough threads are resident to keep the memory busy, without spilling.
template <typename P>
__global__ void __launch_bounds__(P::THREADS, 1024 / P::THREADS)
    forward_kernel(typename P::T* __restrict__ y, float* __restrict__ rstd, const typename P::T* __restrict__ x,
                   const typename P::T* __restrict__ weight, int64_t rows, int hidden, float eps) {
  using Pack = typename P::Pack;
  __shared__ float scratch[P::WARPS];
  const int lane = threadIdx.x % P::ROW_THREADS;
  const int vectors = hidden / P::VECTOR;
  const int64_t row = int64_t(blockIdx.x) * P::ROWS + threadIdx.x / P::ROW_THREADS;
  const int count = row < rows ? vectors : 0;  // of this row; a group without a row still takes part in barriers
  const Pack* from = reinterpret_cast<const Pack*>(x) + row * vectors;
  const Pack* scale = reinterpret_cast<const Pack*>(weight);
  Pack* to = reinterpret_cast<Pack*>(y) + row * vectors;

  Pack held[P::ITEMS];
#pragma unroll
  for (int i = 0; i < P::ITEMS; ++i) {
    const int v = lane + i * P::ROW_THREADS;
    if (v < count) held[i] = from[v];
  }
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < P::ITEMS; ++i) {
    if (lane + i * P::ROW_THREADS < count) {
#pragma unroll
      for (int j = 0; j < P::VECTOR; ++j) {
        const float value = widen(held[i].at[j]);
        sum += value * value;
      }
    }
  }
  const float r = rsqrtf(row_sum<P>(sum, scratch) / hidden + eps);
#pragma unroll
  for (int i = 0; i < P::ITEMS; ++i) {
    const int v = lane + i * P::ROW_THREADS;
    if (v < count) {
      const Pack w = scale[v];
      Pack out;
#pragma unroll
      for (int j = 0; j < P::VECTOR; ++j) {
        out.at[j] = narrow<typename P::T>(widen(held[i].at[j]) * r * widen(w.at[j]));
      }
      to[v] = out;
    }
  }
  if (lane == 0 && row < rows) rstd[row] = r;
}

// Rows under way at once, of which one is being computed: what fits shared memory.
template <typename P>
constexpr int STAGES = P::VECTOR == 1 || P::THREADS > 512 ? 1 : P::THREADS > 256 ? 2 : 3;

// Shared memory of a backward block: x and dy of each stage, each thread's copy of rstd, scratch of two sums.
template <typename P>
struct Shared {
  typename P::Pack rows[STAGES<P>][2][P::ITEMS][P::THREADS];
  float rstd[STAGES<P>][P::THREADS];
  float scratch[2][P::WARPS];
};

template <typename P>
__global__ void __launch_bounds__(P::THREADS, P::THREADS > 512 ? 1 : 512 / P::THREADS)
    backward_kernel(typename P::T* __restrict__ dx, float* __restrict__ partials,
                    const typename P::T* __restrict__ dy, const typename P::T* __restrict__ x,
                    const typename P::T* __restrict__ weight, const float* __restrict__ rstd, int64_t rows,
                    int hidden) {
  using Pack = typename P::Pack;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<P>*>(memory);
  const int thread = threadIdx.x;
  const int lane = thread % P::ROW_THREADS;
  const int group = thread / P::ROW_THREADS;
  const int vectors = hidden / P::VECTOR;
  const int64_t num_tiles = (rows + P::ROWS - 1) / P::ROWS;
  const Pack* scale = reinterpret_cast<const Pack*>(weight);  // read where used: it stays in the L1 cache

  const auto fetch = [&](int64_t tile, int stage) {
    const int64_t row = tile * P::ROWS + group;
    if (row < rows) {
      const Pack* from_x = reinterpret_cast<const Pack*>(x) + row * vectors;
      const Pack* from_dy = reinterpret_cast<const Pack*>(dy) + row * vectors;
      copy_async(&shared.rstd[stage][thread], rstd + row);
#pragma unroll
      for (int i = 0; i < P::ITEMS; ++i) {
        const int v = lane + i * P::ROW_THREADS;
        if (v < vectors) {
          copy_async(&shared.rows[stage][0][i][thread], from_x + v);
          copy_async(&shared.rows[stage][1][i][thread], from_dy + v);
        }
      }
    }
    commit_copies();
  };

#pragma unroll
  for (int ahead = 0; ahead < STAGES<P> - 1; ++ahead) fetch(blockIdx.x + int64_t(ahead) * gridDim.x, ahead);

  float dweight[P::ITEMS][P::VECTOR] = {};

  int stage = 0, parity = 0;
  for (int64_t tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    const int last = stage == 0 ? STAGES<P> - 1 : stage - 1;  // its row is done: room for a new one
    fetch(tile + int64_t(STAGES<P> - 1) * gridDim.x, last);
    wait_copies<STAGES<P> - 1>();
    const int64_t row = tile * P::ROWS + group;
    const int count = row < rows ? vectors : 0;

    float dot = 0.f;  // sum of g x
#pragma unroll
    for (int i = 0; i < P::ITEMS; ++i) {
      const int v = lane + i * P::ROW_THREADS;
      if (v < count) {
        const Pack xs = shared.rows[stage][0][i][thread], dys = shared.rows[stage][1][i][thread], w = scale[v];
#pragma unroll
        for (int j = 0; j < P::VECTOR; ++j) dot += widen(dys.at[j]) * widen(w.at[j]) * widen(xs.at[j]);
      }
    }
    dot = row_sum<P>(dot, shared.scratch[parity]);
    const float r = count > 0 ? shared.rstd[stage][thread] : 0.f;
    const float pull = r * r * r * (dot / hidden);
    Pack* to = reinterpret_cast<Pack*>(dx) + row * vectors;
#pragma unroll
    for (int i = 0; i < P::ITEMS; ++i) {
      const int v = lane + i * P::ROW_THREADS;
      if (v < count) {
        const Pack xs = shared.rows[stage][0][i][thread], dys = shared.rows[stage][1][i][thread], w = scale[v];
        Pack out;
#pragma unroll
        for (int j = 0; j < P::VECTOR; ++j) {
          const float value = widen(xs.at[j]), flow = widen(dys.at[j]);
          out.at[j] = narrow<typename P::T>(r * flow * widen(w.at[j]) - value * pull);
          dweight[i][j] += flow * (value * r);
        }
        to[v] = out;
      }
    }
    stage = stage + 1 == STAGES<P> ? 0 : stage + 1;
    parity ^= 1;
  }

  if constexpr (P::ROWS > 1) {  // add up the groups of the block, in order
    static_assert(sizeof(shared.rows) >= sizeof(float) * P::ITEMS * P::VECTOR * P::THREADS, "sums fit the stages");
    float* sums = reinterpret_cast<float*>(memory);
    wait_copies<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < P::ITEMS; ++i) {
#pragma unroll
      for (int j = 0; j < P::VECTOR; ++j) sums[(i * P::VECTOR + j) * P::THREADS + thread] = dweight[i][j];
    }
    __syncthreads();
    if (group > 0) return;
#pragma unroll
    for (int i = 0; i < P::ITEMS; ++i) {
#pragma unroll
      for (int j = 0; j < P::VECTOR; ++j) {
        for (int g = 1; g < P::ROWS; ++g) {
          dweight[i][j] += sums[(i * P::VECTOR + j) * P::THREADS + g * P::ROW_THREADS + lane];
        }
      }
    }
  }
  using Sums = Vector<float, P::VECTOR>;
  Sums* to = reinterpret_cast<Sums*>(partials) + int64_t(blockIdx.x) * vectors;
#pragma unroll
  for (int i = 0; i < P::ITEMS; ++i) {
    const int v = lane + i * P::ROW_THREADS;
    if (v < vectors) {
      Sums out;
#pragma unroll
      for (int j = 0; j < P::VECTOR; ++j) out.at[j] = dweight[i][j];
      to[v] = out;
    }
  }
}

// dweight[column] = sum of partials[0 .. num_partials - 1][column], in a fixed order.
template <typename T>
__global__ void __launch_bounds__(WARP* WARP)
    add_partials_kernel(T* __restrict__ dweight, const float* __restrict__ partials, int num_partials, int hidden) {
  __shared__ float sums[WARP][WARP + 1];
  const int column = blockIdx.x * WARP + threadIdx.x;
  float sum = 0.f;
  if (column < hidden) {
#pragma unroll 4
    for (int k = threadIdx.y; k < num_partials; k += WARP) sum += partials[int64_t(k) * hidden + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  sum = sums[threadIdx.x][threadIdx.y];  // transposed: a warp holds one column
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  const int mine = blockIdx.x * WARP + threadIdx.y;
  if (threadIdx.x == 0 && mine < hidden) dweight[mine] = narrow<T>(sum);
}

bool is_aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

cudaError_t num_processors(int* count) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

constexpr int MAX_BLOCKS = 4;  // of a processor; more would only make more partial sums

template <typename T>
cudaError_t forward(NormShape shape, const T* x, const T* weight, float eps, T* y, float* rstd, cudaStream_t stream) {
  if (shape.rows == 0) return cudaSuccess;
  const bool fits = with_plan<T>(shape.hidden, is_aligned({x, weight, y}), [&](auto plan) {
    using P = decltype(plan);
    const auto blocks = static_cast<unsigned>((shape.rows + P::ROWS - 1) / P::ROWS);
    forward_kernel<P><<<blocks, P::THREADS, 0, stream>>>(y, rstd, x, weight, shape.rows, int(shape.hidden), eps);
  });
  return fits ? cudaGetLastError() : cudaErrorInvalidValue;
}

template <typename P>
cudaError_t launch_backward(NormShape shape, const typename P::T* dy, const typename P::T* x,
                            const typename P::T* weight, const float* rstd, typename P::T* dx, float* partials,
                            cudaStream_t stream, int* num_blocks) {
  const auto kernel = backward_kernel<P>;
  constexpr int BYTES = sizeof(Shared<P>);
  int processors = 0, resident = 0;
  if (const cudaError_t error = num_processors(&processors)) return error;
  if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES)) return error;
  if (const auto error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, P::THREADS, BYTES)) {
    return error;
  }
  const int64_t tiles = (shape.rows + P::ROWS - 1) / P::ROWS;
  const int64_t most = int64_t(processors) * std::clamp(resident, 1, MAX_BLOCKS);
  *num_blocks = static_cast<int>(std::clamp<int64_t>(tiles, 1, most));
  kernel<<<*num_blocks, P::THREADS, BYTES, stream>>>(dx, partials, dy, x, weight, rstd, shape.rows, int(shape.hidden));
  return cudaGetLastError();
}

template <typename T>
cudaError_t backward(NormShape shape, const T* dy, const T* x, const T* weight, const float* rstd, T* dx, T* dweight,
                     float* partials, cudaStream_t stream) {
  int num_blocks = 0;
  cudaError_t error = cudaSuccess;
  const bool fits = with_plan<T>(shape.hidden, is_aligned({dy, x, weight, dx}), [&](auto plan) {
    error = launch_backward<decltype(plan)>(shape, dy, x, weight, rstd, dx, partials, stream, &num_blocks);
  });
  if (!fits) return cudaErrorInvalidValue;
  if (error != cudaSuccess) return error;
  const auto columns = static_cast<unsigned>((shape.hidden + WARP - 1) / WARP);
  add_partials_kernel<T><<<columns, dim3(WARP, WARP), 0, stream>>>(dweight, partials, num_blocks, int(shape.hidden));
  return cudaGetLastError();
}

template <typename Call>
cudaError_t with_type(Float type, Call call) {
  if (type == Float::f32) return call(float{});
  if (type == Float::f16) return call(__half{});
  return call(__nv_bfloat16{});
}

}  // namespace

cudaError_t rms_norm_forward(Float type, NormShape shape, const void* x, const void* weight, float eps, void* y,
                             float* rstd, cudaStream_t stream) {
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    return forward<T>(shape, static_cast<const T*>(x), static_cast<const T*>(weight), eps, static_cast<T*>(y), rstd,
                      stream);
  });
}

cudaError_t rms_norm_max_partials(int* count) {
  const cudaError_t error = num_processors(count);
  *count *= MAX_BLOCKS;
  return error;
}

cudaError_t rms_norm_backward(Float type, NormShape shape, const void* dy, const void* x, const void* weight,
                              const float* rstd, void* dx, void* dweight, float* partials, cudaStream_t stream) {
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    return backward<T>(shape, static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<const T*>(weight), rstd,
                       static_cast<T*>(dx), static_cast<T*>(dweight), partials, stream);
  });
}

}  // namespace megads
