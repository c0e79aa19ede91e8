// The positives of the symmetric contrastive loss, from the statistics over all other pairs (see contrastive.cu):
//
//   for the pair's row and for its column:
//   z = scale c + bias,  m' = max(m, z),  rest = l exp(m - m'),  all = rest + exp(z - m')
//   loss = m' - z + log1p(rest + expm1(z - m'))         its derivative by scale = (w exp(m - m') - rest c) / all
//   g = -weight rest / all,  where rest / all = 1 - p   state over all pairs = (m', all)
//
// Everything is computed from sums without the positive: in a trained model they are far smaller than the rounding
// error of p = 1. One thread a pair; 28 bytes in, 36 out. Replaces some sixty elementwise launches.
#include "common/device.cuh"
#include "common/integers.h"
#include "score_tiles.h"

namespace lift_fast::gpu {
namespace {

constexpr int kThreads = 256;

struct Side {
  float m, all, loss, d_scale, miss;  // miss = 1 - p
};

__device__ inline Side side_of(const float* state, int64_t stride, int64_t i, float z, float c) {
  float m = state[i], l = state[stride + i], w = state[2 * stride + i];
  if (l > 0.f && l < 1.f) {  // m may lie above the maximum; rescale the state to l = 1
    const float lower = m + logf(l), grow = expf(m - lower);
    m = lower, l *= grow, w *= grow;
  }
  const float most = z > m || z != z ? z : m;  // unlike fmaxf, keeps a NaN
  const float shrink = expf(m - most), rest = l * shrink, all = rest + expf(z - most);
  return {most, all, (most - z) + log1pf(rest + expm1f(z - most)), (w * shrink - rest * c) / all, rest / all};
}

// out [9, n]: loss, d_scale, g of the row, g of the column, their sum, (m, l) of the row, (m, l) of the column.
__global__ void __launch_bounds__(kThreads)
    positives_kernel(const float* __restrict__ row, int64_t row_stride, const float* __restrict__ col,
                     int64_t col_stride, const float* __restrict__ cosines, int64_t n, const float* __restrict__ scale,
                     const float* __restrict__ bias, float weight, float* __restrict__ out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  const float c = cosines[i], z = fmaf(*scale, c, *bias);
  const Side by_row = side_of(row, row_stride, i, z, c), by_col = side_of(col, col_stride, i, z, c);
  const float g_row = -weight * by_row.miss, g_col = -weight * by_col.miss;
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

const char* positives(const Positives& job, int device, std::uintptr_t stream) {
  return on_device(device, [&] {
    positives_kernel<<<static_cast<unsigned>(ceil_div(job.n, kThreads)), dim3(kThreads), 0,
                       reinterpret_cast<cudaStream_t>(stream)>>>(
        job.row, job.row_stride, job.col, job.col_stride, job.c, job.n, job.scale, job.bias, job.weight, job.out);
  });
}

}  // namespace lift_fast::gpu
