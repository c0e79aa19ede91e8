// The pairwise sigmoid loss (SigLIP, arXiv 2303.15343, eq. 1) around the GEMMs, on the GPU:
//
//   loss = sum_ij softplus(-y_ij z_ij) / rows     g_ij = -y_ij sigmoid(-y_ij z_ij)      y_ij = 1 for positives, else -1
//
//   a warp tile of 8 rows x 128 columns, one pass:
//     c = products a q,  z = scale c + bias,  u = -y z,  e = exp(-|u|)
//     sigmoid(u) = (1 or e) / (1 + e);  softplus(u) = max(u, 0) + log(1 + e)
//     rows: sums of max(u, 0), g c and g, and prod (1 + e) - 1, whose log1p is taken once for 32 scores
//           over 32 lanes, then over the warps; to scratch, where a second kernel adds them up
//     out = left g right factor, rounded once
//
// Bytes a score: 4 in, 2 (bf16, fp16) or 4 out, 12 / 512 of scratch. Instructions a score: 23.4 (float32: 22.8; 19.9
// where no gradient is asked for), of which an exponential and a reciprocal. An H100's multiprocessor has instructions
// for 5.5 scores a cycle, 33 bytes: the bound is the memory that holds the products, HBM by a factor of two and more,
// or L2 for a score tile that fits (estimates). The two GEMMs around it do 4 dim FLOP a score.
#include "pairs.cuh"

namespace lift_fast::gpu {
namespace {

// log(1 + x) for 0 <= x <= 2^32, to 1.3e-7 of itself where x <= 1; there log(1.f + x) would lose most digits of a small
// x.
__device__ inline float log1p_of(float x) {
  constexpr float kLog1p[] = {1.0f,           -0.499998927f, 0.333297104f,  -0.249516159f, 0.196632743f,
                              -0.152696669f,  0.105436236f,  -0.0563736111f, 0.0195425265f, -0.00317605701f};
  // 1 + x = 2^k (1 + e), 0 <= e < 1.
  const int power = __float_as_int(1.f + x) & 0x7f800000;
  const float inverse = __int_as_float(0x7f000000 - power), e = fmaf(x, inverse, inverse - 1.f);
  float p = kLog1p[9];
#pragma unroll
  for (int n = 8; n >= 0; --n) p = fmaf(p, e, kLog1p[n]);
  return fmaf(static_cast<float>((power >> 23) - 127), 0.693147181f, p * e);
}

// Combines two values of prod (1 + e) - 1 without cancellation, so that the logarithm keeps every digit of a tiny e.
struct Product {
  __device__ float operator()(float x, float y) const { return fmaf(x, y, x + y); }
};

constexpr int kSignBit = INT32_MIN;
__device__ inline float flipped(float x, int sign) { return __int_as_float(__float_as_int(x) ^ sign); }

// T: the type of to.out; void: no gradient. parts [col_blocks, 3, rows]: each thread block's sums of loss, g c and g.
// In float32 to.out may be the products: a lane reads its 32 of a warp tile before it overwrites them.
template <typename T, bool Wide>
__global__ void __launch_bounds__(32 * kWarps, 5)
    sigmoid_kernel(ScoreTile scores, Gradient to, float* __restrict__ parts, int block_rows) {
  __shared__ float2 row_values[kMaxBlockRows];  // a, left factor
  __shared__ float partial[kWarps][3][kMaxBlockRows];
  const Strip<Wide> strip(scores, block_rows);
  const unsigned lane = threadIdx.x, warp = threadIdx.y;
  const int mine = 32 * warp + lane;
  if (mine < strip.height) {
    const int64_t i = strip.top + mine;
    const float factor = to.scaled ? to.factor * strip.scale : to.factor;
    row_values[mine] = {scores.a ? scores.a[i] : 1.f, to.left ? to.left[i] * factor : factor};
  }
  __syncthreads();
  float right[kLaneCols];
  load_vector<Wide>(to.right, strip.left, strip.width, right);

  strip.for_warp_tiles([&](int row, auto edge) {
    constexpr bool kEdge = decltype(edge)::value;
    float p[kWarpRows][kLaneCols], positive[kWarpRows], product[kWarpRows], gc[kWarpRows], sum[kWarpRows];
    strip.template load<kEdge>(row, p);
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const float2 mine = row_values[row + r];
      const float a = mine.x, left = mine.y;
      float g[kLaneCols];
#pragma unroll
      for (int k = 0; k < kLaneCols; ++k) {
        float c = p[r][k] * a * strip.q[k], u = strip.z(c);
        int flip = 0;  // the sign bit for a positive
        if constexpr (kEdge) {
          if (strip.positive(row + r, k)) flip = kSignBit;
          u = flipped(u, flip);
          if (!strip.inside(row + r, k)) u = -INFINITY, c = 0.f;  // contributes nothing
        }
        const float e = exp_of(-fabsf(u)), y = 1.f + e, inverse = reciprocal(y), relu = fmaxf(u, 0.f);
        g[k] = flipped(u >= 0.f ? inverse : e * inverse, flip);
        positive[r] = k ? positive[r] + relu : relu;
        product[r] = k ? fmaf(product[r], y, e) : e;
        gc[r] = k ? fmaf(g[k], c, gc[r]) : g[k] * c;
        sum[r] = k ? sum[r] + g[k] : g[k];
        g[k] *= left * right[k];
      }
      if constexpr (!std::is_void_v<T>) {
        T* out = static_cast<T*>(to.out) + (strip.top + row + r) * to.stride + strip.left;
        if (!kEdge || row + r < strip.height) store_four<Wide, kEdge>(out, strip.width, g);
      }
    }
    // The product has 32 factors of at most 2 each.
    const float loss = log1p_of(over_eighths(product, Product())) + over_eighths(positive, Sum());
    const float losses = over_quad(loss, Sum()), gcs = over_warp(gc, Sum()), sums = over_warp(sum, Sum());
    // Lane 4 r + s writes number s of row r.
    const unsigned part = lane % 4;
    if (part < 3) partial[warp][part][row + lane / 4] = part == 0 ? losses : part == 1 ? gcs : sums;
  });

  __syncthreads();
  if (mine >= strip.height) return;
  float* out = parts + int64_t{3} * blockIdx.y * scores.rows + strip.top + mine;
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    float all = 0.f;
#pragma unroll
    for (int other = 0; other < kWarps; ++other) all += partial[other][s][mine];
    out[s * scores.rows] = all;
  }
}

// 32 rows a thread block, 8 threads each: thread y takes parts y, y + 8, ...
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
void launch(const ScoreTile& scores, const Sigmoid& sums, const Gradient& to, cudaStream_t stream) {
  const Division by = divide(scores.rows, scores.cols);
  bool wide = aligned(scores.products, scores.stride, sizeof(float));
  if constexpr (!std::is_void_v<T>) wide = wide && aligned(to.out, to.stride, sizeof(T));
  const auto kernel = wide ? sigmoid_kernel<T, true> : sigmoid_kernel<T, false>;
  kernel<<<by.grid(), dim3(32, kWarps), 0, stream>>>(scores, to, sums.scratch, by.block_rows);
  add_kernel<<<static_cast<unsigned>(ceil_div(scores.rows, 32)), dim3(32, kMergers), 0, stream>>>(
      sums.scratch, by.col_blocks, scores.rows, sums);
}

}  // namespace

int64_t sigmoid_scratch(int64_t rows, int64_t cols) { return 3 * divide(rows, cols).col_blocks * rows; }

const char* sigmoid(const ScoreTile& scores, const Sigmoid& sums, const Gradient& to, int device,
                    std::uintptr_t stream_handle) {
  return on_device(device, [&] {
    const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
    if (!to.out) return launch<void>(scores, sums, to, stream);
    if (to.type == Element::f32) launch<float>(scores, sums, to, stream);
    if (to.type == Element::bf16) launch<__nv_bfloat16>(scores, sums, to, stream);
    if (to.type == Element::f16) launch<__half>(scores, sums, to, stream);
  });
}

}  // namespace lift_fast::gpu
