// What layernorm.cu and mlp.cu share: 16 bytes of a row at a time, and the sum of what parts of the rows gave.
//
//   parts [count, n], of a kernel whose blocks each walked down their own rows:
//     thread (lane, y): sum of parts y, y + 16, ... of column lane;    the 16 sums in order, in shared memory
//   No atomics: the same bits at every run. n = 2 x 768 of 396 parts is 2.4 MB, written and read once.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "blocks_cuda.h"

namespace lift_fast::gpu {
namespace {

constexpr int kMergers = 16;  // threads a column in the second kernel

inline int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

template <Out T>
using Bits = std::conditional_t<T == Out::f32, uint32_t, uint16_t>;
template <Out T>
constexpr int kVec = 16 / static_cast<int>(sizeof(Bits<T>));

// What a lane loads or stores at a time: kVec elements in 16 bytes, or one where rows are not aligned.
template <Out T, int V>
struct alignas(V == 1 ? 4 : 16) Chunk {
  uint32_t w[V == 1 ? 1 : 4] = {};
};

template <Out T, int V>
__device__ inline Chunk<T, V> load(const void* rows, int64_t at) {
  Chunk<T, V> chunk;
  if constexpr (V == 1) {
    chunk.w[0] = static_cast<const Bits<T>*>(rows)[at];
  } else {
    const uint4 four = *reinterpret_cast<const uint4*>(static_cast<const Bits<T>*>(rows) + at);
    chunk.w[0] = four.x, chunk.w[1] = four.y, chunk.w[2] = four.z, chunk.w[3] = four.w;
  }
  return chunk;
}

template <Out T, int V>
__device__ inline void store(void* rows, int64_t at, const Chunk<T, V>& chunk) {
  if constexpr (V == 1) {
    static_cast<Bits<T>*>(rows)[at] = static_cast<Bits<T>>(chunk.w[0]);
  } else {
    Bits<T>* to = static_cast<Bits<T>*>(rows) + at;
#ifdef __CUDA_ARCH__
    // Written out: nvcc 13.0 makes four stores of 4 bytes of an assignment in bias_act_kernel.
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(chunk.w[0]), "r"(chunk.w[1]),
                 "r"(chunk.w[2]), "r"(chunk.w[3]) : "memory");
#else
    *reinterpret_cast<uint4*>(to) = {chunk.w[0], chunk.w[1], chunk.w[2], chunk.w[3]};
#endif
  }
}

// Element k in float32.
template <Out T, int V>
__device__ inline float value(const Chunk<T, V>& chunk, int k) {
  if constexpr (T == Out::f32) {
    return __int_as_float(chunk.w[k]);
  } else if constexpr (T == Out::bf16) {
    return __int_as_float(k % 2 ? chunk.w[k / 2] & 0xffff0000u : chunk.w[k / 2] << 16);
  } else {
    const __half2 two = *reinterpret_cast<const __half2*>(&chunk.w[k / 2]);
    return k % 2 ? __high2float(two) : __low2float(two);
  }
}

// To nearest even.
template <Out T, int V>
__device__ inline Chunk<T, V> rounded(const float (&v)[V]) {
  Chunk<T, V> chunk;
  if constexpr (T == Out::f32) {
#pragma unroll
    for (int k = 0; k < V; ++k) chunk.w[k] = __float_as_int(v[k]);
  } else {
#pragma unroll
    for (int k = 0; k < V; k += 2) {
      const float low = v[k], high = V == 1 ? 0.f : v[(k + 1) % V];
      if constexpr (T == Out::bf16) {
        const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
        chunk.w[k / 2] = *reinterpret_cast<const uint32_t*>(&two);
      } else {
        const __half2 two = __floats2half2_rn(low, high);
        chunk.w[k / 2] = *reinterpret_cast<const uint32_t*>(&two);
      }
    }
  }
  return chunk;
}

// Columns at .. at + V - 1 of a vector that no kernel writes.
template <int V>
__device__ inline void load_vector(const float* values, int64_t at, float (&v)[V]) {
  if constexpr (V == 1) {
    v[0] = __ldg(values + at);
  } else {
#pragma unroll
    for (int k = 0; k < V; k += 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(values + at + k));
      v[k] = four.x, v[k + 1] = four.y, v[k + 2] = four.z, v[k + 3] = four.w;
    }
  }
}

template <int V>
__device__ inline void store_vector(float* values, int64_t at, const float (&v)[V]) {
  if constexpr (V == 1) {
    values[at] = v[0];
  } else {
#pragma unroll
    for (int k = 0; k < V; k += 4) {
      const float4 four{v[k], v[k + 1], v[k + 2], v[k + 3]};
      *reinterpret_cast<float4*>(values + at + k) = four;
    }
  }
}

// Whether every row of all of these starts at 16 bytes. Null: not there.
template <typename... Pointers>
bool aligned(int64_t width, Out type, Pointers... pointers) {
  const bool all = ((reinterpret_cast<std::uintptr_t>(pointers) % 16 == 0) && ...);
  return all && width % (type == Out::f32 ? 4 : 8) == 0;
}

// out[i] = sum over parts of parts[., i]: the first `width` to `first`, the others to `second`.
__global__ void __launch_bounds__(32 * kMergers)
    add_parts_kernel(const float* parts, int64_t count, int64_t n, int64_t width, float* first, float* second) {
  __shared__ float found[kMergers][32];
  const int lane = threadIdx.x, y = threadIdx.y;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  float sum = 0.f;
  if (i < n) {
#pragma unroll 8
    for (int64_t part = y; part < count; part += kMergers) sum += parts[part * n + i];
  }
  found[y][lane] = sum;
  __syncthreads();
  if (y > 0 || i >= n) return;
#pragma unroll
  for (int other = 1; other < kMergers; ++other) sum += found[other][lane];
  (i < width ? first[i] : second[i - width]) = sum;
}

inline void add_parts(const float* parts, int64_t count, int64_t n, int64_t width, float* first, float* second,
                      cudaStream_t stream) {
  const unsigned grid = static_cast<unsigned>(blocks(n, 32));
  add_parts_kernel<<<grid, dim3(32, kMergers), 0, stream>>>(parts, count, n, width, first, second);
}

template <typename F>
const char* on_device(int device, F launch) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  launch();
  error = cudaGetLastError();
  if (before != device) cudaSetDevice(before);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// f(type) with the type as a compile-time constant.
template <typename F>
void with_type(Out type, F f) {
  if (type == Out::f32) f(std::integral_constant<Out, Out::f32>());
  if (type == Out::bf16) f(std::integral_constant<Out, Out::bf16>());
  if (type == Out::f16) f(std::integral_constant<Out, Out::f16>());
}

}  // namespace
}  // namespace lift_fast::gpu
