// What contrastive.cu and sigmoid.cu share: the way through a block of products, and z's softmax states.
//
//   a block of 4 warps: `band` rows x 512 columns, 128 columns a warp
//     load what belongs to a lane's 4 columns (q, ...)                   once
//     for 8 rows of the band at a time:
//       load 8 x 4 products a lane: 8 loads of 16 bytes in flight        the only read of the block
//       along columns: in the lane's registers, from one 8 rows to the next
//       along rows: 8 sums (or maxima) over 32 lanes in 9 shuffles; over the 4 warps at the end, in shared memory
//
// What a block of threads finds for its rows and columns goes to scratch memory, and a second kernel merges it in
// order: no atomics, so the same bits at every run. Indices are 64 bits wide.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "pairs_cuda.h"

namespace lift_fast::gpu {
namespace {

constexpr int kRows = 8;                       // a warp holds at a time
constexpr int kLane = 4;                       // columns a lane
constexpr int kWarpCols = 32 * kLane;
constexpr int kWarps = 4;
constexpr int kBlockCols = kWarps * kWarpCols;
constexpr int kMostBand = 32 * kWarps;         // a thread a row at the end
constexpr int kLeastBand = 16;
constexpr int64_t kFill = 512;                 // thread blocks that keep a large GPU busy
constexpr int kMergers = 8;                    // threads an output in the second kernel

inline int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

// How a block of scores is cut; a function of its shape alone, and so are the bits of the results.
struct Cut {
  int64_t col_blocks, row_blocks;
  int band;
};

inline Cut cut(int64_t rows, int64_t cols) {
  const int64_t across = blocks(cols, kBlockCols);
  int band = kMostBand;
  while (band > kLeastBand && blocks(rows, band) * across < kFill) band /= 2;
  return {across, blocks(rows, band), band};
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

inline bool in_fours(const void* data, int64_t stride, int64_t bytes) {
  return reinterpret_cast<std::uintptr_t>(data) % (4 * bytes) == 0 && stride % 4 == 0;
}

// e^x to two units in the last place; 0 below 2^-126.
__device__ inline float exp_of(float x) {
  x *= 1.44269504088896341f;
#ifdef __CUDA_ARCH__
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));
  return x;
#else
  return exp2f(x);
#endif
}

struct Max {
  __device__ float operator()(float x, float y) const { return fmaxf(x, y); }
};
struct Sum {
  __device__ float operator()(float x, float y) const { return x + y; }
};

// v[r] over the warp, for eight rows at once: each step halves what a lane is still responsible for. In the end a
// lane has row lane / 4.
template <typename Op>
__device__ inline float over_warp(float (&v)[kRows], Op op) {
  const int lane = threadIdx.x;
#pragma unroll
  for (int half = kRows / 2; half; half /= 2) {
    const bool upper = lane & (4 * half);
#pragma unroll
    for (int r = 0; r < half; ++r) {
      const float theirs = upper ? v[r] : v[r + half], mine = upper ? v[r + half] : v[r];
      v[r] = op(mine, __shfl_xor_sync(~0u, theirs, 4 * half));
    }
  }
  v[0] = op(v[0], __shfl_xor_sync(~0u, v[0], 2));
  return op(v[0], __shfl_xor_sync(~0u, v[0], 1));
}

// m as what to subtract: where nothing was seen yet m is -inf, and -inf - -inf would be NaN.
__device__ inline float finite(float m) { return m == -INFINITY ? 0.f : m; }

// Of a row or column: m = max z, l = sum of exp(z - m), w = sum of exp(z - m) c. A z of NaN shows in l.
struct State {
  float m = -INFINITY, l = 0.f, w = 0.f;

  __device__ void merge(const State& other) {
    const float most = fmaxf(m, other.m), at = finite(most);
    const float ours = exp_of(m - at), theirs = exp_of(other.m - at);
    l = l * ours + other.l * theirs;
    w = w * ours + other.w * theirs;
    m = most;
  }
};

// A lane's columns are neighbours (Wide: 16-byte accesses), or 32 apart where rows are not aligned.
template <bool Wide>
__device__ inline int lane_column(int k) {
  return Wide ? kLane * threadIdx.x + k : threadIdx.x + 32 * k;
}

// A vector over columns, of any alignment; null: ones.
template <bool Wide>
__device__ inline void load_vector(const float* values, int64_t left, int64_t n, float fill, float (&v)[kLane]) {
#pragma unroll
  for (int k = 0; k < kLane; ++k)
    v[k] = lane_column<Wide>(k) < n ? (values ? values[left + lane_column<Wide>(k)] : 1.f) : fill;
}

__device__ inline void round_to(float x, float* out) { *out = x; }
__device__ inline void round_to(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }
__device__ inline void round_to(float x, __half* out) {
  // Infinity times a zero feature would be NaN. A NaN passes.
  *out = __float2half_rn(x > 65504.f ? 65504.f : x < -65504.f ? -65504.f : x);
}

template <bool Wide, typename T>
__device__ inline void store4(T* values, int64_t n, const float (&v)[kLane]) {
  struct alignas(kLane * sizeof(T)) Four {
    T x[kLane];
  } four;
#pragma unroll
  for (int k = 0; k < kLane; ++k) round_to(v[k], &four.x[k]);
  if (Wide && lane_column<Wide>(kLane - 1) < n) {
    *reinterpret_cast<Four*>(values + lane_column<Wide>(0)) = four;
  } else {
#pragma unroll
    for (int k = 0; k < kLane; ++k)
      if (lane_column<Wide>(k) < n) values[lane_column<Wide>(k)] = four.x[k];
  }
}

// A warp's 128 columns of a band of rows, eight rows at a time.
template <bool Wide>
struct Walk {
  const Scores& of;
  int64_t row_block, col_block, top, bottom;  // rows top..bottom-1
  int64_t left, n;  // first column of this warp, and how many there are from it on (128 or more; or fewer, even < 1)
  float scale, bias;
  float q[kLane];  // 0 beyond the last column
  float z0[kLane];  // what scale c is added to: bias, and -inf beyond the last column

  __device__ Walk(const Scores& scores, int64_t col_blocks, int band) : of(scores) {
    row_block = blockIdx.x / col_blocks;
    col_block = blockIdx.x % col_blocks;
    top = row_block * band;
    bottom = top + band < of.rows ? top + band : of.rows;
    left = col_block * kBlockCols + threadIdx.y * kWarpCols;
    n = of.cols - left;
    scale = *of.scale;
    bias = *of.bias;
    load_vector<Wide>(of.q, left, n, 0.f, q);
#pragma unroll
    for (int k = 0; k < kLane; ++k) z0[k] = lane_column<Wide>(k) < n ? bias : -INFINITY;
  }

  // c of rows first..first+7; rows beyond the last repeat it, columns beyond the last are 0.
  __device__ void load(int64_t first, float (&c)[kRows][kLane]) const {
    const float* from = of.products + left + lane_column<Wide>(0);
    if (Wide && lane_column<Wide>(kLane - 1) < n) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 four = *reinterpret_cast<const float4*>(from + row(first, r) * of.stride);
        c[r][0] = four.x, c[r][1] = four.y, c[r][2] = four.z, c[r][3] = four.w;
      }
    } else {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int k = 0; k < kLane; ++k)
          c[r][k] = lane_column<Wide>(k) < n ? from[row(first, r) * of.stride + (Wide ? k : 32 * k)] : 0.f;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float a = of.a ? of.a[row(first, r)] : 1.f;
#pragma unroll
      for (int k = 0; k < kLane; ++k) c[r][k] = c[r][k] * a * q[k];
    }
  }

  __device__ int64_t row(int64_t first, int r) const { return first + r < bottom ? first + r : bottom - 1; }

  // Row first's own column, counted from `left`; far outside where none of these eight rows has its own here.
  __device__ int own(int64_t first) const {
    const int64_t at = first + of.offset - left;
    return at > -kRows && at < kWarpCols && at < n ? static_cast<int>(at) : -kRows;
  }

  __device__ float z(float c, int k) const { return fmaf(scale, c, z0[k]); }
};

}  // namespace
}  // namespace lift_fast::gpu
