// What contrastive.cu and sigmoid.cu share: the way through a block of products, and z's softmax states.
//
//   a thread block of 4 warps: block_rows (16 to 128) rows x 512 columns, a strip of 128 columns a warp
//     load what belongs to a lane's 4 columns (q, ...)                   once, into registers
//     load what belongs to the rows (a, ...)                             once, into shared memory
//     for tiles of 8 rows x 128 columns down the strip:
//       load 8 x 4 products a lane: 8 loads of 16 bytes                  the only read of the block
//       along columns: in the lane's registers, from one tile to the next
//       along rows: 8 sums (or maxima) over 32 lanes in 9 shuffles; over the 4 warps at the end, in shared memory
//
// Interior tiles, which have all their rows and columns and no own pair, come first, in a loop that tests no element;
// those on the diagonal, or at the block's last rows and columns, take the same code with such tests. What a thread
// block finds for its rows and columns goes to scratch memory, and a second kernel merges it in order: no atomics, so
// the same bits at every run. Indices into a block are 64 bits wide.
//
// Instructions a score, as the kernels' headers give them, are those of the interior loop for sm_90a, all of them,
// over the 32 scores of a lane: test_pairs_sass.py counts them in the binary. Before and after it a warp spends
// 200 to 400 more, once for its 2 to 16 tiles of 490 to 750 each. 4 warp instructions a cycle and 1.7 GHz give an
// H100's multiprocessor 128 / count scores a cycle, while its share is about 13 bytes a cycle of HBM and 24 of L2
// (estimates; nothing here has been measured on a GPU).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <type_traits>

#include "pairs_cuda.h"

namespace lift_fast::gpu {
namespace {

constexpr int kTileRows = 8;
constexpr int kLaneCols = 4;
constexpr int kWarpCols = 32 * kLaneCols;
constexpr int kWarps = 4;
constexpr int kBlockCols = kWarps * kWarpCols;
constexpr int kMaxBlockRows = 32 * kWarps;  // a thread a row, where rows are set up and merged
constexpr int kMinBlockRows = 16;
constexpr int64_t kMinBlocks = 512;  // thread blocks that keep a large GPU busy
constexpr int kMergers = 8;          // threads an output in the second kernel

inline int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

// How a block of scores is divided into thread blocks; a function of its shape alone, and so are the results' bits.
// A launch takes 65 535 col_blocks, 33 million columns, and fails beyond.
struct Division {
  int64_t row_blocks, col_blocks;
  int block_rows;
  dim3 grid() const { return dim3(static_cast<unsigned>(row_blocks), static_cast<unsigned>(col_blocks)); }
};

inline Division divide(int64_t rows, int64_t cols) {
  const int64_t across = blocks(cols, kBlockCols);
  int block_rows = kMaxBlockRows;
  while (block_rows > kMinBlockRows && blocks(rows, block_rows) * across < kMinBlocks) block_rows /= 2;
  return {blocks(rows, block_rows), across, block_rows};
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

// Whether a lane's four elements of every row can be accessed at once.
inline bool aligned(const void* data, int64_t stride, int64_t bytes) {
  return reinterpret_cast<std::uintptr_t>(data) % (kLaneCols * bytes) == 0 && stride % kLaneCols == 0;
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

// x where mask is -1, y where it is 0: one FSEL. Of mask ? x : y nvcc 13.0 makes moves, half as many again.
__device__ inline float either(int mask, float x, float y) {
  return __int_as_float((__float_as_int(x) & mask) | (__float_as_int(y) & ~mask));
}

// v[r] over lanes that are a multiple of 4 apart, for eight rows at once: each step halves the rows that a lane is
// still responsible for. In the end a lane has row lane / 4.
template <typename Op>
__device__ inline float over_eighths(float (&v)[kTileRows], Op op) {
#pragma unroll
  for (int half = kTileRows / 2; half; half /= 2) {
    const int upper = threadIdx.x & (4 * half) ? -1 : 0;
#pragma unroll
    for (int r = 0; r < half; ++r) {
      const float theirs = either(upper, v[r], v[r + half]);
      v[r] = op(either(upper, v[r + half], v[r]), __shfl_xor_sync(~0u, theirs, 4 * half));
    }
  }
  return v[0];
}

// v over the four lanes of a row.
template <typename Op>
__device__ inline float over_quad(float v, Op op) {
  v = op(v, __shfl_xor_sync(~0u, v, 2));
  return op(v, __shfl_xor_sync(~0u, v, 1));
}

// v[r] over the warp; a lane has row lane / 4.
template <typename Op>
__device__ inline float over_warp(float (&v)[kTileRows], Op op) {
  return over_quad(over_eighths(v, op), op);
}

// m as what to subtract: where nothing was seen yet m is -inf, and -inf - -inf would be NaN.
__device__ inline float finite(float m) { return fmaxf(m, -FLT_MAX); }

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

// A lane's columns are neighbours (Wide: accesses of four), or 32 apart where rows are not aligned.
template <bool Wide>
__device__ inline int lane_column(int k) {
  return Wide ? kLaneCols * threadIdx.x + k : threadIdx.x + 32 * k;
}

// A vector over a strip's columns, of any alignment, 0 beyond the last; null: ones.
template <bool Wide>
__device__ inline void load_vector(const float* values, int64_t left, int width, float (&v)[kLaneCols]) {
#pragma unroll
  for (int k = 0; k < kLaneCols; ++k)
    v[k] = lane_column<Wide>(k) < width ? (values ? values[left + lane_column<Wide>(k)] : 1.f) : 0.f;
}

// Two neighbours rounded to nearest even. float16 saturates: an infinity times a zero feature would be NaN; a NaN
// passes.
__device__ inline unsigned rounded(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&two);
}
__device__ inline unsigned rounded(float low, float high, __half) {
#ifdef __CUDA_ARCH__
  unsigned two;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
#else
  const auto saturated = [](float x) { return x > 65504.f ? 65504.f : x < -65504.f ? -65504.f : x; };
  const __half2 two = __floats2half2_rn(saturated(low), saturated(high));
  return *reinterpret_cast<const unsigned*>(&two);
#endif
}

// A lane's four elements of a row to `to`, where the strip's row begins; at an edge not those beyond its width.
// The wide stores are written out: of an assignment of four 16-bit elements nvcc 13.0 makes four stores.
template <bool Wide, bool Edge, typename T>
__device__ inline void store_four(T* to, int width, const float (&v)[kLaneCols]) {
  if constexpr (Wide && !Edge) {
    to += lane_column<Wide>(0);
#ifdef __CUDA_ARCH__
    if constexpr (std::is_same_v<T, float>)
      asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
                   : "memory");
    else
      asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(rounded(v[0], v[1], T())),
                   "r"(rounded(v[2], v[3], T())) : "memory");
#else
    if constexpr (std::is_same_v<T, float>)
      *reinterpret_cast<float4*>(to) = {v[0], v[1], v[2], v[3]};
    else
      *reinterpret_cast<uint2*>(to) = {rounded(v[0], v[1], T()), rounded(v[2], v[3], T())};
#endif
  } else {
#pragma unroll
    for (int k = 0; k < kLaneCols; ++k) {
      if (Edge && lane_column<Wide>(k) >= width) continue;
      if constexpr (std::is_same_v<T, float>) {
        to[lane_column<Wide>(k)] = v[k];
      } else {
        const unsigned short bits = static_cast<unsigned short>(rounded(v[k], 0.f, T()));
        reinterpret_cast<unsigned short*>(to)[lane_column<Wide>(k)] = bits;
      }
    }
  }
}

__device__ inline int clamped(int64_t x, int low, int high) {
  return x < low ? low : x > high ? high : static_cast<int>(x);
}

// A warp's strip: 128 columns of its thread block's rows, in tiles of eight rows.
template <bool Wide>
struct Strip {
  const Scores& of;
  int64_t top, left;  // the first row and column
  int height, width;  // how many there are, at most block_rows and 128; width 0: the block ends left of the strip
  int to_own;  // the own pair of row i of the strip is in its column i + to_own
  int full;  // tiles above this row have all their rows and columns; none has where the strip is narrower than 128
  int own_top, own_bottom;  // of those, the tiles from own_top to own_bottom have own pairs
  float scale, bias;
  float q[kLaneCols];

  __device__ Strip(const Scores& scores, int block_rows) : of(scores) {
    top = static_cast<int64_t>(blockIdx.x) * block_rows;
    // By a shuffle the compiler knows that it is the warp's.
    left = static_cast<int64_t>(blockIdx.y) * kBlockCols + __shfl_sync(~0u, threadIdx.y, 0) * kWarpCols;
    height = clamped(of.rows - top, 0, block_rows);
    width = clamped(of.cols - left, 0, kWarpCols);
    to_own = clamped(top + of.offset - left, -kMaxBlockRows, kWarpCols);
    full = width < kWarpCols ? 0 : height / kTileRows * kTileRows;
    own_top = clamped(-to_own, 0, full) / kTileRows * kTileRows;
    own_bottom = (clamped(kWarpCols - to_own, 0, full) + kTileRows - 1) / kTileRows * kTileRows;
    scale = *of.scale;
    bias = *of.bias;
    load_vector<Wide>(of.q, left, width, q);
  }

  // tile(row, edge) for every tile; `edge`, a constant, is false for interior ones.
  template <typename F>
  __device__ void for_tiles(F tile) const {
#pragma unroll 1
    for (int row = own_top > 0 ? 0 : own_bottom; row < full;) {
      tile(row, std::false_type());
      row += kTileRows;
      if (row == own_top) row = own_bottom;
    }
#pragma unroll 1
    for (int row = own_top < own_bottom ? own_top : full; row < height;) {
      tile(row, std::true_type());
      row += kTileRows;
      if (row == own_bottom) row = full;
    }
  }

  // The products of a tile. Beyond the last row the tile's first one again, beyond the last column 0.
  template <bool Edge>
  __device__ void load(int row, float (&p)[kTileRows][kLaneCols]) const {
    const float* tile = of.products + (top + row) * of.stride + left + lane_column<Wide>(0);
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      const float* from = tile + (!Edge || row + r < height ? r : 0) * of.stride;
      if constexpr (Wide && !Edge) {
        const float4 four = *reinterpret_cast<const float4*>(from);
        p[r][0] = four.x, p[r][1] = four.y, p[r][2] = four.z, p[r][3] = four.w;
      } else {
#pragma unroll
        for (int k = 0; k < kLaneCols; ++k)
          p[r][k] = !Edge || lane_column<Wide>(k) < width ? from[Wide ? k : 32 * k] : 0.f;
      }
    }
  }

  __device__ bool inside(int row, int k) const { return row < height && lane_column<Wide>(k) < width; }
  __device__ bool own(int row, int k) const { return row + to_own == lane_column<Wide>(k); }
  __device__ float z(float c) const { return fmaf(scale, c, bias); }
};

}  // namespace
}  // namespace lift_fast::gpu
