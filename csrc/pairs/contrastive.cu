// The symmetric contrastive loss (CLIP, arXiv 2103.00020, fig. 3) around the GEMMs, on the GPU:
//
//   loss = 1/2 mean_i (R_i - z_ii) + 1/2 mean_j (C_j - z_jj)        R_i = logsumexp_j z_ij, C_j = logsumexp_i z_ij
//   g_ij = row_weight exp(z_ij - m_i) / l_i + col_weight exp(z_ij - m_j) / l_j      R_i = m_i + log l_i, C_j likewise
//
//   statistics, a warp tile of 8 rows x 128 columns:            gradient, the same warp tile:
//     c = products a q, z = scale c + bias                        c = products a q, z = scale c + bias
//     columns: m = max(m, max_r z); l, w rescaled to it,          g = row_weight / l_i exp(z - m_i)
//              += sum_r exp(z - m) (1, c)       in registers          + col_weight / l_j exp(z - m_j)
//     rows:    m over 32 lanes, then the same sums                out = left g right factor, rounded once
//     (m, l, w) of each to scratch; a second kernel merges
//
// Positives are handled by the caller: the statistics leave them out and report their c, and the gradient is given
// their g. For a converged pair exp(z - R) - 1 would cancel in float32. m and l are kept apart, since m + log l would
// lose l if m is near 1e8. For the same reason z - m is formed before it is multiplied by log2 e: folding log2 e into
// scale and bias would save one instruction an exponential, but round z and the stored m, which is in base e,
// differently.
//
// Bytes a score: 4 in, and 12 / block_rows + 12 / 512 of scratch (0.1 to 0.8) for the statistics; 4 in and 2 (bf16,
// fp16) or 4 out for the gradient. Instructions a score: 20.2 and 15.8 (float32: 15.3), of which two exponentials. An
// H100's multiprocessor has instructions for 6.3 and 8.1 scores a cycle, 27 and 49 bytes: the bound is the memory that
// holds the products, HBM by a factor of two and more, or L2 for a score tile that fits, whose 24 bytes the statistics
// just reach (estimates). The two GEMMs around them do 4 dim FLOP a score.
#include "pairs.cuh"

namespace lift_fast::gpu {
namespace {

// row_parts [col_blocks, 3, rows], col_parts [row_blocks, 3, cols]: the (m, l, w) of each thread block.
template <bool Wide>
__global__ void __launch_bounds__(32 * kWarps, Wide ? 4 : 3) stats_kernel(
    ScoreTile scores, float* __restrict__ positive, float* __restrict__ row_parts, float* __restrict__ col_parts,
    int block_rows) {
  alignas(16) __shared__ float row_a[kMaxBlockRows];
  __shared__ float merged[kWarps][4][kMaxBlockRows];  // m, l, w, and an unused fourth, since every lane writes
  const Strip<Wide> strip(scores, block_rows);
  const unsigned lane = threadIdx.x, warp = threadIdx.y;
  const int mine = 32 * warp + lane;
  if (mine < strip.height) row_a[mine] = scores.a ? scores.a[strip.top + mine] : 1.f;
  __syncthreads();
  State column[kLaneCols];

  strip.for_warp_tiles([&](int row, auto edge) {
    constexpr bool kEdge = decltype(edge)::value;
    float c[kWarpRows][kLaneCols], z[kWarpRows][kLaneCols];
    strip.template load<kEdge>(row, c);
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const float a = row_a[row + r];
#pragma unroll
      for (int k = 0; k < kLaneCols; ++k) {
        c[r][k] = c[r][k] * a * strip.q[k];
        z[r][k] = strip.z(c[r][k]);
        if constexpr (kEdge) {
          if (strip.inside(row + r, k)) {
            if (!strip.positive(row + r, k)) continue;
            positive[strip.top + row + r] = c[r][k];
          }
          z[r][k] = -INFINITY;
          c[r][k] = 0.f;  // its weight, 0, times an infinity would be NaN
        }
      }
    }

#pragma unroll
    for (int k = 0; k < kLaneCols; ++k) {
      State& state = column[k];
      float most = state.m;
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) most = fmaxf(most, z[r][k]);
      const float at = finite(most), before = exp_of(state.m - at);
      state.m = most;
      state.l *= before;
      state.w *= before;
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
        const float e = exp_of(z[r][k] - at);
        state.l += e;
        state.w = fmaf(e, c[r][k], state.w);
      }
    }

    float l[kWarpRows], w[kWarpRows];
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      l[r] = z[r][0];  // the row's maximum, for now
#pragma unroll
      for (int k = 1; k < kLaneCols; ++k) l[r] = fmaxf(l[r], z[r][k]);
    }
    const float most = over_warp(l, Max()), finite_most = finite(most);
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const float at = __shfl_sync(~0u, finite_most, 4 * r);
#pragma unroll
      for (int k = 0; k < kLaneCols; ++k) {
        const float e = exp_of(z[r][k] - at);
        l[r] = k ? l[r] + e : e;
        w[r] = k ? fmaf(e, c[r][k], w[r]) : e * c[r][k];
      }
    }
    const float l_sum = over_warp(l, Sum()), w_sum = over_warp(w, Sum());
    // Lane 4 r + s writes number s of row r.
    const unsigned part = lane % 4;
    merged[warp][part][row + lane / 4] = part == 0 ? most : part == 1 ? l_sum : w_sum;
  });

#pragma unroll
  for (int k = 0; k < kLaneCols; ++k) {
    if (lane_column<Wide>(k) >= strip.width) continue;
    float* out = col_parts + int64_t{3} * blockIdx.x * scores.cols + strip.left + lane_column<Wide>(k);
    out[0] = column[k].m;
    out[scores.cols] = column[k].l;
    out[2 * scores.cols] = column[k].w;
  }

  __syncthreads();
  if (mine >= strip.height) return;
  State all;
#pragma unroll
  for (int other = 0; other < kWarps; ++other)
    all.merge({merged[other][0][mine], merged[other][1][mine], merged[other][2][mine]});
  float* out = row_parts + int64_t{3} * blockIdx.y * scores.rows + strip.top + mine;
  out[0] = all.m;
  out[scores.rows] = all.l;
  out[2 * scores.rows] = all.w;
}

struct Parts {
  const float* parts;  // (m, l, w) [count, 3, n]
  int64_t count, n;
  float* state;  // [3, n], `stride` apart: merged into
  int64_t stride;
};

// 32 rows or columns a thread block, 8 threads each: thread y takes parts y, y + 8, ...
__global__ void __launch_bounds__(32 * kMergers) merge_kernel(Parts rows, Parts cols) {
  __shared__ float found[kMergers][3][32];
  const int64_t row_blocks = (rows.n + 31) / 32;
  const bool of_rows = blockIdx.x < row_blocks;
  const Parts of{of_rows ? rows.parts : cols.parts, of_rows ? rows.count : cols.count, of_rows ? rows.n : cols.n,
                 of_rows ? rows.state : cols.state, of_rows ? rows.stride : cols.stride};
  const int lane = threadIdx.x, y = threadIdx.y;
  const int64_t i = (blockIdx.x - (of_rows ? 0 : row_blocks)) * 32 + lane;
  State state;
  if (i < of.n) {
#pragma unroll 4
    for (int64_t part = y; part < of.count; part += kMergers) {
      const float* from = of.parts + part * 3 * of.n + i;
      state.merge({from[0], from[of.n], from[2 * of.n]});
    }
  }
  found[y][0][lane] = state.m;
  found[y][1][lane] = state.l;
  found[y][2][lane] = state.w;
  __syncthreads();
  if (y > 0 || i >= of.n) return;
  float* to = of.state + i;
  State all{to[0], to[of.stride], to[2 * of.stride]};
#pragma unroll
  for (int other = 0; other < kMergers; ++other)
    all.merge({found[other][0][lane], found[other][1][lane], found[other][2][lane]});
  to[0] = all.m;
  to[of.stride] = all.l;
  to[2 * of.stride] = all.w;
}

// In float32 to.out may be the products: a lane reads its 32 of a warp tile before it overwrites them.
template <typename T, bool Wide>
__global__ void __launch_bounds__(32 * kWarps, 4)
    gradient_kernel(ScoreTile scores, Softmax softmax, Gradient to, int block_rows) {
  __shared__ float4 row_values[kMaxBlockRows];  // a, m, weight / l, left factor
  const Strip<Wide> strip(scores, block_rows);
  // A side of weight 0 is not read: m is set to infinity, which makes exp(z - m) 0.
  const bool by_row = softmax.row_weight != 0.f, by_col = softmax.col_weight != 0.f;
  const int mine = 32 * threadIdx.y + threadIdx.x;
  if (mine < strip.height) {
    const int64_t i = strip.top + mine;
    const float factor = to.scaled ? to.factor * strip.scale : to.factor;
    row_values[mine] = {scores.a ? scores.a[i] : 1.f, by_row ? softmax.row[i] : INFINITY,
                    by_row ? softmax.row_weight / softmax.row[softmax.row_stride + i] : 0.f,
                    to.left ? to.left[i] * factor : factor};
  }
  __syncthreads();
  if (strip.width == 0) return;
  float right[kLaneCols], col_m[kLaneCols], col_weight[kLaneCols];
  load_vector<Wide>(to.right, strip.left, strip.width, right);
#pragma unroll
  for (int k = 0; k < kLaneCols; ++k) {
    const bool read = by_col && lane_column<Wide>(k) < strip.width;
    const float* col = softmax.col + strip.left + lane_column<Wide>(k);
    col_m[k] = read ? col[0] : INFINITY;
    col_weight[k] = read ? softmax.col_weight / col[softmax.col_stride] : 0.f;
  }

  strip.for_warp_tiles([&](int row, auto edge) {
    constexpr bool kEdge = decltype(edge)::value;
    float p[kWarpRows][kLaneCols];
    strip.template load<kEdge>(row, p);
    T* out = static_cast<T*>(to.out) + (strip.top + row) * to.stride + strip.left;
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      if (kEdge && row + r >= strip.height) break;
      const float4 mine = row_values[row + r];
      const float a = mine.x, row_m = mine.y, row_weight = mine.z, left = mine.w;
      float g[kLaneCols];
#pragma unroll
      for (int k = 0; k < kLaneCols; ++k) {
        const float z = strip.z(p[r][k] * a * strip.q[k]);
        g[k] = row_weight * exp_of(z - row_m) + col_weight[k] * exp_of(z - col_m[k]);
        if constexpr (kEdge) {
          if (strip.positive(row + r, k)) g[k] = softmax.positive[strip.top + row + r];
        }
        g[k] *= left * right[k];
      }
      store_four<Wide, kEdge>(out + r * to.stride, strip.width, g);
    }
  });
}

template <typename T>
void launch_gradient(const ScoreTile& scores, const Softmax& softmax, const Gradient& to, cudaStream_t stream) {
  const Division by = divide(scores.rows, scores.cols);
  const bool wide = aligned(scores.products, scores.stride, sizeof(float)) && aligned(to.out, to.stride, sizeof(T));
  const auto kernel = wide ? gradient_kernel<T, true> : gradient_kernel<T, false>;
  kernel<<<by.grid(), dim3(32, kWarps), 0, stream>>>(scores, softmax, to, by.block_rows);
}

}  // namespace

int64_t stats_scratch(int64_t rows, int64_t cols) {
  const Division by = divide(rows, cols);
  return 3 * (by.col_blocks * rows + by.row_blocks * cols);
}

const char* contrastive_stats(const ScoreTile& scores, const Stats& to, int device, std::uintptr_t stream_handle) {
  return on_device(device, [&] {
    const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
    const Division by = divide(scores.rows, scores.cols);
    float *row_parts = to.scratch, *col_parts = to.scratch + 3 * by.col_blocks * scores.rows;
    const bool wide = aligned(scores.products, scores.stride, sizeof(float));
    const auto kernel = wide ? stats_kernel<true> : stats_kernel<false>;
    kernel<<<by.grid(), dim3(32, kWarps), 0, stream>>>(scores, to.positive, row_parts, col_parts, by.block_rows);
    const Parts rows{row_parts, by.col_blocks, scores.rows, to.row, to.row_stride};
    const Parts cols{col_parts, by.row_blocks, scores.cols, to.col, to.col_stride};
    const unsigned merge_grid = static_cast<unsigned>(ceil_div(scores.rows, 32) + ceil_div(scores.cols, 32));
    merge_kernel<<<merge_grid, dim3(32, kMergers), 0, stream>>>(rows, cols);
  });
}

const char* contrastive_gradient(const ScoreTile& scores, const Softmax& softmax, const Gradient& to, int device,
                                 std::uintptr_t stream_handle) {
  return on_device(device, [&] {
    const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
    if (to.type == Element::f32) launch_gradient<float>(scores, softmax, to, stream);
    if (to.type == Element::bf16) launch_gradient<__nv_bfloat16>(scores, softmax, to, stream);
    if (to.type == Element::f16) launch_gradient<__half>(scores, softmax, to, stream);
  });
}

}  // namespace lift_fast::gpu
