// The own pairs of the symmetric contrastive loss, once the statistics of all others are there (see contrastive.cu).
//
//   z = scale c + bias,  m' = max(m, z),  others = l exp(m - m'),  all = others + exp(z - m')     of its row, its column
//   loss = m' - z + log1p(others + expm1(z - m'))         its derivative by scale = (w exp(m - m') - others c) / all
//   g = -weight others / all,  1 - p of both softmaxes    state of all pairs = (m', all)
//
// All of it comes from sums without the own pair: where a model has learned they are far smaller than what p = 1 is
// rounded by. A thread a pair; 28 bytes in, 36 out. In place of some sixty elementwise launches.
#include "score_tiles.h"

#include "pairs.cuh"

namespace lift_fast::gpu {
namespace {

constexpr int kThreads = 256;

struct Own {
  float m, all, loss, d_scale, rest;
};

__device__ inline Own own_of(const float* state, int64_t stride, int64_t i, float z, float c) {
  float m = state[i], l = state[stride + i], w = state[2 * stride + i];
  if (l > 0.f && l < 1.f) {  // m may lie above the maximum; its state is brought to l = 1
    const float lower = m + logf(l), grow = expf(m - lower);
    m = lower, l *= grow, w *= grow;
  }
  const float most = z > m || z != z ? z : m;  // unlike fmaxf it lets a NaN through
  const float shrink = expf(m - most), others = l * shrink, all = others + expf(z - most);
  return {most, all, (most - z) + log1pf(others + expm1f(z - most)), (w * shrink - others * c) / all, others / all};
}

// out [9, n]: loss, d_scale, g by the row, g by the column, their sum, (m, l) of the row, (m, l) of the column.
__global__ void __launch_bounds__(kThreads)
    own_pairs_kernel(const float* __restrict__ row, int64_t row_stride, const float* __restrict__ col,
                     int64_t col_stride, const float* __restrict__ own, int64_t n, const float* __restrict__ scale,
                     const float* __restrict__ bias, float weight, float* __restrict__ out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  const float c = own[i], z = fmaf(*scale, c, *bias);
  const Own by_row = own_of(row, row_stride, i, z, c), by_col = own_of(col, col_stride, i, z, c);
  const float g_row = -weight * by_row.rest, g_col = -weight * by_col.rest;
  const float results[] = {0.5f * (by_row.loss + by_col.loss),
                           0.5f * (by_row.d_scale + by_col.d_scale),
                           g_row,
                           g_col,
                           g_row + g_col,
                           by_row.m,
                           by_row.all,
                           by_col.m,
                           by_col.all};
#pragma unroll
  for (int k = 0; k < 9; ++k) out[k * n + i] = results[k];
}

}  // namespace

const char* own_pairs(const OwnPairs& of, int device, std::uintptr_t stream) {
  return on_device(device, [&] {
    own_pairs_kernel<<<static_cast<unsigned>(blocks(of.n, kThreads)), dim3(kThreads), 0,
                       reinterpret_cast<cudaStream_t>(stream)>>>(of.row, of.row_stride, of.col, of.col_stride, of.own,
                                                                 of.n, of.scale, of.bias, of.weight, of.out);
  });
}

}  // namespace lift_fast::gpu
