// What contrastive.cu and sigmoid.cu share: the loop over a tile of scores, and the partial softmax states.
//
//   a thread block of 4 warps: block_rows (16 to 128) rows x 512 columns of a score tile; a warp a strip of 128 columns
//     load what belongs to a lane's 4 columns (q, ...)                   once, into registers
//     load what belongs to the rows (a, ...)                             once, into shared memory
//     for warp tiles of 8 rows x 128 columns down the strip:
//       load 8 x 4 products a lane: 8 loads of 16 bytes                  the only read of the products
//       along columns: in the lane's registers, from one warp tile to the next
//       along rows: 8 sums (or maxima) over 32 lanes in 9 shuffles; over the 4 warps at the end, in shared memory
//
// Interior warp tiles, which have all their rows and columns and no positive, come first, in a loop that tests no
// element; those on the diagonal, or at the score tile's last rows and columns, take the same code with such tests.
// Each thread block writes its partial results for rows and columns to scratch memory, and a second kernel merges them
// in order: no atomics, so the same bits at every run. Indices into a score tile are 64 bits wide.
//
// "Instructions a score" at the heads of the two files are all instructions of the interior loop for sm_90a, divided by
// the 32 scores of a lane: test_pairs_sass.py counts them in the binary. Before and after the loop a warp spends 200 to
// 400 more, once for its 2 to 16 warp tiles of 490 to 750 each. With 4 warp instructions a cycle at 1.7 GHz an H100's
// multiprocessor does 128 / count scores a cycle, while its share of bandwidth is about 13 bytes a cycle of HBM and 24
// of L2 (estimates; nothing here has been measured on a GPU).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <type_traits>

#include "common/device.cuh"
#include "common/integers.h"
#include "pairs_cuda.h"

namespace lift_fast::gpu {
namespace {

constexpr int kWarpRows = 8;  // of a warp tile
constexpr int kLaneCols = 4;
constexpr int kWarpCols = 32 * kLaneCols;
constexpr int kWarps = 4;
constexpr int kBlockCols = kWarps * kWarpCols;
constexpr int kMaxBlockRows = 32 * kWarps;  // a thread a row, where rows are set up and merged
constexpr int kMinBlockRows = 16;
constexpr int64_t kMinBlocks = 512;  // thread blocks that keep a large GPU busy
constexpr int kMergers = 8;          // threads an output in the kernel that merges

// How a score tile is divided into thread blocks. It depends on the tile's shape alone, and so do the results' bits.
// A launch fails beyond 65 535 col_blocks, 33 million columns.
struct Division {
  int64_t row_blocks, col_blocks;
  int block_rows;
  dim3 grid() const { return dim3(static_cast<unsigned>(row_blocks), static_cast<unsigned>(col_blocks)); }
};

inline Division divide(int64_t rows, int64_t cols) {
  const int64_t across = ceil_div(cols, kBlockCols);
  int block_rows = kMaxBlockRows;
  while (block_rows > kMinBlockRows && ceil_div(rows, block_rows) * across < kMinBlocks) block_rows /= 2;
  return {ceil_div(rows, block_rows), across, block_rows};
}

// Whether a lane's four elements of every row can be accessed at once.
inline bool aligned(const void* data, int64_t stride, int64_t bytes) {
  return reinterpret_cast<std::uintptr_t>(data) % (kLaneCols * bytes) == 0 && stride % kLaneCols == 0;
}

// e^x to two units in the last place; 0 below 2^-126.
__device__ inline float exp_of(float x) { return exp2_of(x * 1.44269504088896341f); }

struct Max {
  __device__ float operator()(float x, float y) const { return fmaxf(x, y); }
};
struct Sum {
  __device__ float operator()(float x, float y) const { return x + y; }
};

// x where mask is -1, y where it is 0: one FSEL. For mask ? x : y nvcc 13.0 adds half as many moves.
__device__ inline float either(int mask, float x, float y) {
  return __int_as_float((__float_as_int(x) & mask) | (__float_as_int(y) & ~mask));
}

// Reduces v[r] over lanes that are a multiple of 4 apart, for eight rows at once: each step halves the rows that a lane
// still holds. In the end a lane holds row lane / 4.
template <typename Op>
__device__ inline float over_eighths(float (&v)[kWarpRows], Op op) {
#pragma unroll
  for (int half = kWarpRows / 2; half; half /= 2) {
    const int upper = threadIdx.x & (4 * half) ? -1 : 0;
#pragma unroll
    for (int r = 0; r < half; ++r) {
      const float theirs = either(upper, v[r], v[r + half]);
      v[r] = op(either(upper, v[r + half], v[r]), __shfl_xor_sync(~0u, theirs, 4 * half));
    }
  }
  return v[0];
}

// Reduces v over the four lanes of a row.
template <typename Op>
__device__ inline float over_quad(float v, Op op) {
  v = op(v, __shfl_xor_sync(~0u, v, 2));
  return op(v, __shfl_xor_sync(~0u, v, 1));
}

// Reduces v[r] over the warp; in the end a lane holds row lane / 4.
template <typename Op>
__device__ inline float over_warp(float (&v)[kWarpRows], Op op) {
  return over_quad(over_eighths(v, op), op);
}

// What to subtract for a maximum m: before the first pair m is -inf, and -inf - -inf would be NaN.
__device__ inline float finite(float m) { return fmaxf(m, -FLT_MAX); }

// The softmax state of a row or column: m = max z, l = sum of exp(z - m), w = sum of exp(z - m) c. If z is NaN, so is
// l.
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

// Wide: a lane's columns are neighbours, accessed four at a time. Otherwise, where rows are not aligned, 32 apart.
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

// Two neighbours rounded to nearest even. float16 saturates, because an infinity times a zero feature would be NaN; a
// NaN stays one.
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

// Stores a lane's four elements of a row; `to` is where the strip's row begins. Edge: skips those beyond its width. The
// wide stores are in assembly because nvcc 13.0 makes four stores of an assignment of four 16-bit elements.
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

// A warp's strip: 128 columns of its thread block's rows, in warp tiles of eight rows.
template <bool Wide>
struct Strip {
  const ScoreTile& scores;
  int64_t top, left;  // the first row and column
  int height, width;  // at most block_rows and 128; width 0: the score tile ends left of the strip
  int to_positive;    // the positive of the strip's row i is in its column i + to_positive
  int full;           // warp tiles above this row are complete; 0 if the strip is narrower than 128
  int positive_top, positive_bottom;  // complete warp tiles in these rows hold positives
  float scale, bias;
  float q[kLaneCols];

  __device__ Strip(const ScoreTile& scores, int block_rows) : scores(scores) {
    top = static_cast<int64_t>(blockIdx.x) * block_rows;
    // The shuffle shows the compiler that this is the same for the whole warp.
    left = static_cast<int64_t>(blockIdx.y) * kBlockCols + __shfl_sync(~0u, threadIdx.y, 0) * kWarpCols;
    height = clamped(scores.rows - top, 0, block_rows);
    width = clamped(scores.cols - left, 0, kWarpCols);
    to_positive = clamped(top + scores.offset - left, -kMaxBlockRows, kWarpCols);
    full = width < kWarpCols ? 0 : height / kWarpRows * kWarpRows;
    positive_top = clamped(-to_positive, 0, full) / kWarpRows * kWarpRows;
    positive_bottom = (clamped(kWarpCols - to_positive, 0, full) + kWarpRows - 1) / kWarpRows * kWarpRows;
    scale = *scores.scale;
    bias = *scores.bias;
    load_vector<Wide>(scores.q, left, width, q);
  }

  // Calls tile(row, edge) for every warp tile; `edge`, a constant, is false for interior ones.
  template <typename F>
  __device__ void for_warp_tiles(F tile) const {
#pragma unroll 1
    for (int row = positive_top > 0 ? 0 : positive_bottom; row < full;) {
      tile(row, std::false_type());
      row += kWarpRows;
      if (row == positive_top) row = positive_bottom;
    }
#pragma unroll 1
    for (int row = positive_top < positive_bottom ? positive_top : full; row < height;) {
      tile(row, std::true_type());
      row += kWarpRows;
      if (row == positive_bottom) row = full;
    }
  }

  // Loads the products of a warp tile. Beyond the last row its first row again; beyond the last column 0.
  template <bool Edge>
  __device__ void load(int row, float (&p)[kWarpRows][kLaneCols]) const {
    const float* tile = scores.products + (top + row) * scores.stride + left + lane_column<Wide>(0);
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const float* from = tile + (!Edge || row + r < height ? r : 0) * scores.stride;
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
  __device__ bool positive(int row, int k) const { return row + to_positive == lane_column<Wide>(k); }
  __device__ float z(float c) const { return fmaf(scale, c, bias); }
};

}  // namespace
}  // namespace lift_fast::gpu
