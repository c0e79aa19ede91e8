// What layernorm.cu and mlp.cu share: accesses of 16 bytes of a row, and the kernel that adds partial sums over rows.
//
//   parts [count, n]: the sums of the first kernel's thread blocks, each over its own rows
//     thread (lane, y): sum of parts y, y + 16, ... of column lane;    then the 16 sums in order, in shared memory
//   No atomics: the same bits at every run. n = 2 x 768 of 396 parts is 2.4 MB, written and read once.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "blocks_cuda.h"
#include "common/device.cuh"
#include "common/integers.h"

namespace lift_fast::gpu {
namespace {

constexpr int kMergers = 16;  // threads a column in the kernel that adds parts

template <Element T>
using Bits = std::conditional_t<T == Element::f32, uint32_t, uint16_t>;
template <Element T>
constexpr int kVec = 16 / static_cast<int>(sizeof(Bits<T>));

// What a lane loads or stores at a time: kVec elements in 16 bytes, or one where rows are not aligned.
template <Element T, int V>
struct alignas(V == 1 ? 4 : 16) Chunk {
  uint32_t w[V == 1 ? 1 : 4] = {};
};

template <Element T, int V>
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

template <Element T, int V>
__device__ inline void store(void* rows, int64_t at, const Chunk<T, V>& chunk) {
  if constexpr (V == 1) {
    static_cast<Bits<T>*>(rows)[at] = static_cast<Bits<T>>(chunk.w[0]);
  } else {
    Bits<T>* to = static_cast<Bits<T>*>(rows) + at;
#ifdef __CUDA_ARCH__
    // In assembly: from an assignment nvcc 13.0 makes four stores of 4 bytes in bias_act_kernel.
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(chunk.w[0]), "r"(chunk.w[1]),
                 "r"(chunk.w[2]), "r"(chunk.w[3]) : "memory");
#else
    *reinterpret_cast<uint4*>(to) = {chunk.w[0], chunk.w[1], chunk.w[2], chunk.w[3]};
#endif
  }
}

// Element k in float32.
template <Element T, int V>
__device__ inline float value(const Chunk<T, V>& chunk, int k) {
  if constexpr (T == Element::f32) {
    return __int_as_float(chunk.w[k]);
  } else if constexpr (T == Element::bf16) {
    return __int_as_float(k % 2 ? chunk.w[k / 2] & 0xffff0000u : chunk.w[k / 2] << 16);
  } else {
    const __half2 two = *reinterpret_cast<const __half2*>(&chunk.w[k / 2]);
    return k % 2 ? __high2float(two) : __low2float(two);
  }
}

// Rounds to nearest even.
template <Element T, int V>
__device__ inline Chunk<T, V> rounded(const float (&v)[V]) {
  Chunk<T, V> chunk;
  if constexpr (T == Element::f32) {
#pragma unroll
    for (int k = 0; k < V; ++k) chunk.w[k] = __float_as_int(v[k]);
  } else {
#pragma unroll
    for (int k = 0; k < V; k += 2) {
      const float low = v[k], high = V == 1 ? 0.f : v[(k + 1) % V];
      if constexpr (T == Element::bf16) {
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

// Columns at .. at + V - 1 of a vector that no kernel writes meanwhile.
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

// Whether every row of each of these starts at a multiple of 16 bytes. A null pointer counts as aligned.
template <typename... Pointers>
bool aligned(int64_t width, Element type, Pointers... pointers) {
  const bool all = ((reinterpret_cast<std::uintptr_t>(pointers) % 16 == 0) && ...);
  return all && width % (type == Element::f32 ? 4 : 8) == 0;
}

// Sums over parts: columns below `width` to `first`, the remaining ones to `second`.
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
  const unsigned grid = static_cast<unsigned>(ceil_div(n, 32));
  add_parts_kernel<<<grid, dim3(32, kMergers), 0, stream>>>(parts, count, n, width, first, second);
}

// f(type) with the type as a compile-time constant.
template <typename F>
void with_type(Element type, F f) {
  if (type == Element::f32) f(std::integral_constant<Element, Element::f32>());
  if (type == Element::bf16) f(std::integral_constant<Element, Element::bf16>());
  if (type == Element::f16) f(std::integral_constant<Element, Element::f16>());
}

}  // namespace
}  // namespace lift_fast::gpu
