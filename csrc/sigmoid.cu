// The pairwise sigmoid loss (SigLIP, arXiv 2303.15343, eq. 1) around the GEMMs, on the GPU; y = 1 for own pairs, else -1:
//
//   loss = sum_ij softplus(-y_ij z_ij) / rows        g_ij = -y_ij sigmoid(-y_ij z_ij)
//
//   8 rows x 128 columns a warp, one pass:
//     c = products a q,  z = scale c + bias,  u = -y z
//     e = exp(-|u|);  loss: max(u, 0) + log1p(e);  sigmoid(u) = (1 or e) / (1 + e)
//     rows: sums of loss, g c and g over 32 lanes, then over the warps; to scratch, and a second kernel adds
//     out = left g right factor, rounded once
//
// Bytes an element: 4 in, 2 (bf16, fp16) or 4 out, 12 / 512 of scratch; one exponential, one reciprocal, about 35
// instructions. The bound is the memory that holds the products: L2 for a chunk of rows that fits, else HBM; from
// L2 the instructions come close to it. The two GEMMs beside it do 4 dim FLOP an element.
#include "pairs.cuh"

namespace lift_fast::gpu {
namespace {

// log(1 + e) for 0 <= e <= 1 to 1.3e-7 of itself. Not log(1 + e) as it stands: 65 536 far negatives of 1e-7 each count.
__device__ inline float log1p_of(float e) {
  constexpr float kLog1p[] = {1.0f,           -0.499998927f, 0.333297104f,  -0.249516159f, 0.196632743f,
                              -0.152696669f,  0.105436236f,  -0.0563736111f, 0.0195425265f, -0.00317605701f};
  float p = kLog1p[9];
#pragma unroll
  for (int k = 8; k >= 0; --k) p = fmaf(p, e, kLog1p[k]);
  return p * e;
}

// parts [col_blocks, 3, rows]: each block's sums of loss, g c, g. In float32 `to.out` may be the products.
template <typename T, bool Wide>
__global__ void __launch_bounds__(32 * kWarps, 5)
    sigmoid_kernel(Scores of, Gradient to, float* __restrict__ parts, int64_t col_blocks, int band) {
  __shared__ float found[kWarps][3][kMostBand];
  const Walk<Wide> walk(of, col_blocks, band);
  const int lane = threadIdx.x, warp = threadIdx.y;
  const float factor = to.scaled ? to.factor * walk.scale : to.factor;
  float right[kLane];
  load_vector<Wide>(to.right, walk.left, walk.n, 0.f, right);

  for (int64_t first = walk.top; first < walk.bottom; first += kRows) {
    float c[kRows][kLane];
    walk.load(first, c);
    const int own_at = walk.own(first);
    float loss[kRows], gc[kRows], sum[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float g[kLane];
      loss[r] = gc[r] = sum[r] = 0.f;
#pragma unroll
      for (int k = 0; k < kLane; ++k) {
        // Beyond the last column z is -inf and c 0, which adds nothing.
        const bool own = own_at > -kRows && lane_column<Wide>(k) == own_at + r && own_at + r < walk.n;
        const float z = walk.z(c[r][k], k), u = own ? -z : z, e = exp_of(-fabsf(u));
        const float s = __fdividef(u >= 0.f ? 1.f : e, 1.f + e);
        loss[r] += fmaxf(u, 0.f) + log1p_of(e);
        g[k] = own ? -s : s;
        gc[r] = fmaf(g[k], c[r][k], gc[r]);
        sum[r] += g[k];
      }
      const int64_t i = first + r;
      if (to.out && i < walk.bottom) {
        const float left = to.left ? to.left[i] * factor : factor;
#pragma unroll
        for (int k = 0; k < kLane; ++k) g[k] *= left * right[k];
        store4<Wide>(static_cast<T*>(to.out) + i * to.stride + walk.left, walk.n, g);
      }
    }
    const float losses = over_warp(loss, Sum()), gcs = over_warp(gc, Sum()), sums = over_warp(sum, Sum());
    // Lane 4 r + s has number s of row r.
    const int part = lane % 4, at = static_cast<int>(first - walk.top) + lane / 4;
    if (part < 3) found[warp][part][at] = part == 0 ? losses : part == 1 ? gcs : sums;
  }

  __syncthreads();
  const int at = 32 * warp + lane;
  if (walk.top + at >= walk.bottom) return;
  float* out = parts + walk.col_block * 3 * of.rows + walk.top + at;
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    float all = 0.f;
#pragma unroll
    for (int other = 0; other < kWarps; ++other) all += found[other][s][at];
    out[s * of.rows] = all;
  }
}

// 32 rows a block, 8 threads each: thread y takes parts y, y + 8, ...
__global__ void __launch_bounds__(32 * kMergers)
    add_kernel(const float* __restrict__ parts, int64_t count, int64_t n, Sigmoid to) {
  __shared__ float found[kMergers][3][32];
  const int lane = threadIdx.x, y = threadIdx.y;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  float sums[3] = {0.f, 0.f, 0.f};
  if (i < n) {
#pragma unroll 4
    for (int64_t part = y; part < count; part += kMergers)
#pragma unroll
      for (int s = 0; s < 3; ++s) sums[s] += parts[(part * 3 + s) * n + i];
  }
#pragma unroll
  for (int s = 0; s < 3; ++s) found[y][s][lane] = sums[s];
  __syncthreads();
  if (y >= 3 || i >= n) return;
  float all = 0.f;
#pragma unroll
  for (int other = 0; other < kMergers; ++other) all += found[other][y][lane];
  if (y == 0 && to.loss) to.loss[i] += all;
  if (y == 1 && to.d_scale) to.d_scale[i] += to.alpha * all;
  if (y == 2 && to.d_bias) to.d_bias[i] += to.alpha * all;
}

template <typename T>
void launch(const Scores& of, const Sigmoid& sums, const Gradient& to, cudaStream_t stream) {
  const Cut by = cut(of.rows, of.cols);
  const unsigned grid = static_cast<unsigned>(by.row_blocks * by.col_blocks);
  const bool wide = in_fours(of.products, of.stride, sizeof(float)) && in_fours(to.out, to.stride, sizeof(T));
  const auto kernel = wide ? sigmoid_kernel<T, true> : sigmoid_kernel<T, false>;
  kernel<<<grid, dim3(32, kWarps), 0, stream>>>(of, to, sums.scratch, by.col_blocks, by.band);
  add_kernel<<<static_cast<unsigned>(blocks(of.rows, 32)), dim3(32, kMergers), 0, stream>>>(
      sums.scratch, by.col_blocks, of.rows, sums);
}

}  // namespace

int64_t sigmoid_scratch(int64_t rows, int64_t cols) { return 3 * cut(rows, cols).col_blocks * rows; }

const char* sigmoid(const Scores& of, const Sigmoid& sums, const Gradient& to, int device,
                    std::uintptr_t stream_handle) {
  return on_device(device, [&] {
    const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
    if (to.type == Out::f32) launch<float>(of, sums, to, stream);
    if (to.type == Out::bf16) launch<__nv_bfloat16>(of, sums, to, stream);
    if (to.type == Out::f16) launch<__half>(of, sums, to, stream);
  });
}

}  // namespace lift_fast::gpu
