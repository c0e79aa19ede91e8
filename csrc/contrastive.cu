// The symmetric contrastive loss (CLIP, arXiv 2103.00020, fig. 3) around the GEMMs, on the GPU:
//
//   loss = 1/2 mean_i (R_i - z_ii) + 1/2 mean_j (C_j - z_jj)        R_i = logsumexp_j z_ij, C_j = logsumexp_i z_ij
//   g_ij = row_weight exp(z_ij - m_i) / l_i + col_weight exp(z_ij - m_j) / l_j      R_i = m_i + log l_i, C_j likewise
//
//   statistics, 8 rows x 128 columns a warp:                   gradient, the same tile:
//     c = products a q, z = scale c + bias                        c = products a q, z = scale c + bias
//     columns: m = max(m, max_r z); l, w rescaled to it,          g = row_weight / l_i exp(z - m_i)
//              += sum_r exp(z - m) (1, c)       in registers          + col_weight / l_j exp(z - m_j)
//     rows:    m over 32 lanes, then the same sums                out = left g right factor, rounded once
//     (m, l, w) of each to scratch; a second kernel merges
//
// Own pairs are the caller's: the statistics leave them out and report their c, and the gradient takes their g. For
// a converged pair exp(z - R) - 1 would cancel in float32; and m + log l would lose l beside an m of 1e8.
//
// Bytes an element: 4 in, and 12 / band + 12 / 512 of scratch (band 16 to 128: 0.1 to 0.8) for the statistics; 4 in
// and 2 (bf16, fp16) or 4 out for the gradient. Two exponentials each, about 20 and 15 instructions. The bound is
// the memory that holds the products: the L2 when the chunk of rows is small enough (512 x 16384 in float32 is
// 32 MB), else HBM. The two GEMMs beside them do 4 dim FLOP an element.
#include "pairs.cuh"

namespace lift_fast::gpu {
namespace {

// row_parts [col_blocks, 3, rows], col_parts [row_blocks, 3, cols]: the (m, l, w) of each block of threads.
template <bool Wide>
__global__ void __launch_bounds__(32 * kWarps, Wide ? 4 : 3) stats_kernel(
    Scores of, float* __restrict__ own, float* __restrict__ row_parts, float* __restrict__ col_parts,
    int64_t col_blocks, int band) {
  __shared__ float merged[kWarps][3][kMostBand];
  const Walk<Wide> walk(of, col_blocks, band);
  const int lane = threadIdx.x, warp = threadIdx.y;
  State column[kLane];

  // z_of(r, k): z, or -inf for a pair that is left out, whose c is 0.
  const auto take = [&](int64_t first, const float (&c)[kRows][kLane], auto z_of) {
#pragma unroll
    for (int k = 0; k < kLane; ++k) {
      State& state = column[k];
      float z[kRows], most = state.m;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        z[r] = first + r < walk.bottom ? z_of(r, k) : -INFINITY;
        most = fmaxf(most, z[r]);
      }
      const float at = finite(most), before = exp_of(state.m - at);
      state.m = most;
      state.l *= before;
      state.w *= before;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float e = exp_of(z[r] - at);
        state.l += e;
        state.w = fmaf(e, c[r][k], state.w);
      }
    }

    float l[kRows], w[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      l[r] = -INFINITY;  // for now: the maxima
#pragma unroll
      for (int k = 0; k < kLane; ++k) l[r] = fmaxf(l[r], z_of(r, k));
    }
    const float most = over_warp(l, Max());
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float at = finite(__shfl_sync(~0u, most, 4 * r));
      l[r] = w[r] = 0.f;
#pragma unroll
      for (int k = 0; k < kLane; ++k) {
        const float e = exp_of(z_of(r, k) - at);
        l[r] += e;
        w[r] = fmaf(e, c[r][k], w[r]);
      }
    }
    const float l_sum = over_warp(l, Sum()), w_sum = over_warp(w, Sum());
    // Lane 4 r + s has number s of row r.
    const int part = lane % 4, at = static_cast<int>(first - walk.top) + lane / 4;
    if (part < 3) merged[warp][part][at] = part == 0 ? most : part == 1 ? l_sum : w_sum;
  };

  for (int64_t first = walk.top; first < walk.bottom; first += kRows) {
    float c[kRows][kLane];
    walk.load(first, c);
    const int own_at = walk.own(first);
    if (own_at == -kRows) {
      take(first, c, [&](int r, int k) { return walk.z(c[r][k], k); });
      continue;
    }
    unsigned left_out = 0;  // a bit an element
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int k = 0; k < kLane; ++k) {
        const int64_t i = walk.row(first, r);
        if (lane_column<Wide>(k) != own_at + static_cast<int>(i - first)) continue;
        if (lane_column<Wide>(k) < walk.n) own[i] = c[r][k];
        c[r][k] = 0.f;  // what it weighs, 0, times an infinity would be NaN
        left_out |= 1u << (kLane * r + k);
      }
    take(first, c, [&](int r, int k) {
      return left_out >> (kLane * r + k) & 1u ? -INFINITY : walk.z(c[r][k], k);
    });
  }

#pragma unroll
  for (int k = 0; k < kLane; ++k) {
    if (lane_column<Wide>(k) >= walk.n) continue;
    float* out = col_parts + walk.row_block * 3 * of.cols + walk.left + lane_column<Wide>(k);
    out[0] = column[k].m;
    out[of.cols] = column[k].l;
    out[2 * of.cols] = column[k].w;
  }

  __syncthreads();
  const int at = 32 * warp + lane;
  if (walk.top + at >= walk.bottom) return;
  State row;
#pragma unroll
  for (int other = 0; other < kWarps; ++other)
    row.merge({merged[other][0][at], merged[other][1][at], merged[other][2][at]});
  float* out = row_parts + walk.col_block * 3 * of.rows + walk.top + at;
  out[0] = row.m;
  out[of.rows] = row.l;
  out[2 * of.rows] = row.w;
}

struct Parts {
  const float* parts;  // [count, 3, n]
  int64_t count, n;
  float* state;  // [3, n], stride apart: merged into
  int64_t stride;
};

// 32 rows or columns a block, 8 threads each: thread y takes parts y, y + 8, ...
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

// In float32 `out` may be the products: a lane has read its 32 before it writes them.
template <typename T, bool Wide>
__global__ void __launch_bounds__(32 * kWarps, 4)
    gradient_kernel(Scores of, Softmax softmax, Gradient to, int64_t col_blocks, int band) {
  const Walk<Wide> walk(of, col_blocks, band);
  if (walk.n < 1) return;
  const float factor = to.scaled ? to.factor * walk.scale : to.factor;
  // A side of weight 0 is not read: its m is infinite, which makes exp(z - m) 0.
  const bool by_row = softmax.row_weight != 0.f, by_col = softmax.col_weight != 0.f;
  float right[kLane], col_m[kLane], col_weight[kLane];
  load_vector<Wide>(to.right, walk.left, walk.n, 0.f, right);
#pragma unroll
  for (int k = 0; k < kLane; ++k) {
    const bool read = by_col && lane_column<Wide>(k) < walk.n;
    const float* col = softmax.col + walk.left + lane_column<Wide>(k);
    col_m[k] = read ? col[0] : INFINITY;
    col_weight[k] = read ? softmax.col_weight / col[softmax.col_stride] : 0.f;
  }

  for (int64_t first = walk.top; first < walk.bottom; first += kRows) {
    float c[kRows][kLane];
    walk.load(first, c);
    const int own_at = walk.own(first);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t i = first + r;
      if (i >= walk.bottom) break;
      const float left = to.left ? to.left[i] * factor : factor;
      const float row_m = by_row ? softmax.row[i] : INFINITY;
      const float row_weight = by_row ? __fdividef(softmax.row_weight, softmax.row[softmax.row_stride + i]) : 0.f;
      float g[kLane];
#pragma unroll
      for (int k = 0; k < kLane; ++k) {
        const float z = walk.z(c[r][k], k);
        g[k] = row_weight * exp_of(z - row_m) + col_weight[k] * exp_of(z - col_m[k]);
        if (own_at > -kRows && lane_column<Wide>(k) == own_at + r) g[k] = softmax.own[i];
        g[k] *= left * right[k];
      }
      store4<Wide>(static_cast<T*>(to.out) + i * to.stride + walk.left, walk.n, g);
    }
  }
}

template <typename T>
void launch_gradient(const Scores& of, const Softmax& softmax, const Gradient& to, cudaStream_t stream) {
  const Cut by = cut(of.rows, of.cols);
  const unsigned grid = static_cast<unsigned>(by.row_blocks * by.col_blocks);
  const bool wide = in_fours(of.products, of.stride, sizeof(float)) && in_fours(to.out, to.stride, sizeof(T));
  const auto kernel = wide ? gradient_kernel<T, true> : gradient_kernel<T, false>;
  kernel<<<grid, dim3(32, kWarps), 0, stream>>>(of, softmax, to, by.col_blocks, by.band);
}

}  // namespace

int64_t stats_scratch(int64_t rows, int64_t cols) {
  const Cut by = cut(rows, cols);
  return 3 * (by.col_blocks * rows + by.row_blocks * cols);
}

const char* contrastive_stats(const Scores& of, const Stats& to, int device, std::uintptr_t stream_handle) {
  return on_device(device, [&] {
    const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
    const Cut by = cut(of.rows, of.cols);
    float *row_parts = to.scratch, *col_parts = to.scratch + 3 * by.col_blocks * of.rows;
    const unsigned grid = static_cast<unsigned>(by.row_blocks * by.col_blocks);
    const auto kernel = in_fours(of.products, of.stride, sizeof(float)) ? stats_kernel<true> : stats_kernel<false>;
    kernel<<<grid, dim3(32, kWarps), 0, stream>>>(of, to.own, row_parts, col_parts, by.col_blocks, by.band);
    const Parts rows{row_parts, by.col_blocks, of.rows, to.row, to.row_stride};
    const Parts cols{col_parts, by.row_blocks, of.cols, to.col, to.col_stride};
    const unsigned merge_grid = static_cast<unsigned>(blocks(of.rows, 32) + blocks(of.cols, 32));
    merge_kernel<<<merge_grid, dim3(32, kMergers), 0, stream>>>(rows, cols);
  });
}

const char* contrastive_gradient(const Scores& of, const Softmax& softmax, const Gradient& to, int device,
                                 std::uintptr_t stream_handle) {
  return on_device(device, [&] {
    const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
    if (to.type == Out::f32) launch_gradient<float>(of, softmax, to, stream);
    if (to.type == Out::bf16) launch_gradient<__nv_bfloat16>(of, softmax, to, stream);
    if (to.type == Out::f16) launch_gradient<__half>(of, softmax, to, stream);
  });
}

}  // namespace lift_fast::gpu
