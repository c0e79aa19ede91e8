// LayerNorm (arXiv 1607.06450, eq. 4) over rows of tokens, with the residual's addition, on the GPU:
//
//   s = x + residual      x^ = (s - mean) rstd      y = x^ weight + bias
//   g = dy weight         dx = rstd (g - mean(g) - x^ mean(g x^)) + d_s      d_weight = sum dy x^, d_bias = sum dy
//
//   forward, a row in the registers of 1 to 8 warps:        backward, likewise, in persistent thread blocks:
//     load x, residual: 4 to 16 loads of 16 B a lane          for each of this block's rows:
//     s = x + residual, rounded; store s                        load dy, s, d_s
//     m = sum(s) / width, then sums of d = s - m and d d        d_weight += dy x^, d_bias += dy     in registers
//     mean = m + sum(d) / width, variance without E[s s]        sums of g, g x^ over the row
//     store y, mean, rstd                                       store dx, and y if wanted
//                                                             add the block's warps; one part to scratch
//                                                             a second kernel adds the parts (blocks.cuh)
//
// Bytes for a bf16 element: forward 4 (8 with a residual), backward 6 (8 with d_s, 2 more with y), and 16 of scratch
// once for all rows of a block. FLOPs: about 8 and 14. Each element is read once, and the bound is HBM; a
// multiprocessor has 8 to 12 rows in flight, and d_s is being loaded while the sums are taken. Not measured on a GPU
// yet. Plain kernels serve rows that are not aligned, or whose width is no multiple of 16 bytes or is beyond 8192: they
// read a row two or three times, from the caches where possible, and keep the backward sums in scratch memory.
#include "blocks.cuh"

namespace lift_fast::gpu {
namespace {

constexpr int kHeld = 32;       // columns a thread holds
constexpr int kBlockWarps = 4;  // a thread block, where rows need no more than that
constexpr int kMostWarps = 8;   // a row, at most
constexpr int64_t kMostHeld = kMostWarps * 32 * kHeld;

// How rows are assigned to the warps of a thread block.
struct Layout {
  int warps, at_once;  // warps a row, rows a block

  explicit Layout(int64_t width) {
    const int64_t wanted = ceil_div(width, 32 * kHeld);
    warps = wanted < kMostWarps ? static_cast<int>(wanted) : kMostWarps;
    at_once = warps < kBlockWarps ? kBlockWarps / warps : 1;
  }
  dim3 block() const { return dim3(32 * warps, at_once); }
};

// The threads of a row in the plain kernels.
inline dim3 plain_block(int64_t width) {
  return dim3(static_cast<unsigned>(width < 32 * kMostWarps ? 32 * ceil_div(width, 32) : 32 * kMostWarps));
}

// Sums over the threads of a row. Every thread of the block must call it. Calls in a loop pass their iteration as
// `turn`: a warp may already be in the next one while another still reads the sums of this one.
template <int N>
__device__ inline void over_row(float (&sums)[N], int turn = 0) {
  __shared__ float parts[2][N][kMostWarps];
#pragma unroll
  for (int offset = 16; offset; offset /= 2)
#pragma unroll
    for (int n = 0; n < N; ++n) sums[n] += __shfl_xor_sync(~0u, sums[n], offset);
  if (blockDim.x == 32) return;
  const int warps = blockDim.x / 32, first = threadIdx.y * warps;
  if (threadIdx.x % 32 == 0)
#pragma unroll
    for (int n = 0; n < N; ++n) parts[turn % 2][n][first + threadIdx.x / 32] = sums[n];
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    sums[n] = 0.f;
#pragma unroll 1
    for (int w = 0; w < warps; ++w) sums[n] += parts[turn % 2][n][first + w];
  }
}

// The mean is kept as two floats, m + rest: rounded to one float, a mean near 1e4 would put its rounding error into
// every deviation.
struct Statistics {
  float m, rest, rstd;

  // sums: of d = s - m and of d d over the row.
  __device__ Statistics(float m, const float (&sums)[2], int64_t width, float eps) : m(m) {
    rest = sums[0] / width;
    const float variance = sums[1] / width - rest * rest;
    rstd = __fdiv_rn(1.f, __fsqrt_rn((variance < 0.f ? 0.f : variance) + eps));  // a NaN stays one
  }
  __device__ float normed(float s) const { return (s - m - rest) * rstd; }
};

template <Element T>
__global__ void __launch_bounds__(32 * kMostWarps) layernorm_kernel(const LayerNorm job) {
  constexpr int V = kVec<T>, kChunks = kHeld / V;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t start = row * job.width;
  const int width = row < job.rows ? static_cast<int>(job.width) : 0;
  Chunk<T, V> held[kChunks];
  const auto each = [&](auto f) {  // f(j, column) for each chunk of this thread
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      const int column = (j * static_cast<int>(blockDim.x) + threadIdx.x) * V;
      if (column < width) f(j, column);
    }
  };

  each([&](int j, int c) { held[j] = load<T, V>(job.x, start + c); });
  if (job.residual) {
    Chunk<T, V> more[kChunks];
    each([&](int j, int c) { more[j] = load<T, V>(job.residual, start + c); });
    each([&](int j, int c) {
      float s[V];
#pragma unroll
      for (int k = 0; k < V; ++k) s[k] = value(held[j], k) + value(more[j], k);
      held[j] = rounded<T, V>(s);
      store<T, V>(job.s, start + c, held[j]);
    });
  }

  float sum[1] = {}, sums[2] = {};
  each([&](int j, int) {
#pragma unroll
    for (int k = 0; k < V; ++k) sum[0] += value(held[j], k);
  });
  over_row(sum);
  const float m = sum[0] / job.width;
  each([&](int j, int) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const float d = value(held[j], k) - m;
      sums[0] += d;
      sums[1] = fmaf(d, d, sums[1]);
    }
  });
  over_row(sums);
  const Statistics statistics(m, sums, job.width, job.eps);
  each([&](int j, int c) {
    float y[V], weight[V], bias[V];
    load_vector<V>(job.weight, c, weight);
    load_vector<V>(job.bias, c, bias);
#pragma unroll
    for (int k = 0; k < V; ++k) y[k] = fmaf(statistics.normed(value(held[j], k)), weight[k], bias[k]);
    store<T, V>(job.y, start + c, rounded<T, V>(y));
  });
  if (threadIdx.x == 0 && width) job.mean[row] = m + statistics.rest, job.rstd[row] = statistics.rstd;
}

// The same with one row a block, an element at a time.
template <Element T>
__global__ void __launch_bounds__(32 * kMostWarps) layernorm_plain_kernel(const LayerNorm job) {
  const int64_t row = blockIdx.x, start = row * job.width;
  const auto s = [&](int64_t c) {
    const Chunk<T, 1> x = load<T, 1>(job.x, start + c);
    if (!job.residual) return x;
    const float sum[1] = {value(x, 0) + value(load<T, 1>(job.residual, start + c), 0)};
    return rounded<T, 1>(sum);
  };
  float sum[1] = {}, sums[2] = {};
  for (int64_t c = threadIdx.x; c < job.width; c += blockDim.x) {
    const Chunk<T, 1> element = s(c);
    if (job.residual) store<T, 1>(job.s, start + c, element);
    sum[0] += value(element, 0);
  }
  over_row(sum);
  const float m = sum[0] / job.width;
  for (int64_t c = threadIdx.x; c < job.width; c += blockDim.x) {
    const float d = value(s(c), 0) - m;
    sums[0] += d;
    sums[1] = fmaf(d, d, sums[1]);
  }
  over_row(sums);
  const Statistics statistics(m, sums, job.width, job.eps);
  for (int64_t c = threadIdx.x; c < job.width; c += blockDim.x) {
    const float y[1] = {fmaf(statistics.normed(value(s(c), 0)), job.weight[c], job.bias[c])};
    store<T, 1>(job.y, start + c, rounded<T, 1>(y));
  }
  if (threadIdx.x == 0) job.mean[row] = m + statistics.rest, job.rstd[row] = statistics.rstd;
}

// Threads that a multiprocessor holds: with 255 registers each in float32, else 170. A thread's sums alone take 64.
template <Element T>
constexpr int kThreads = T == Element::f32 ? 256 : 384;

// dx of an element, without d_s.
struct Slope {
  float rstd, of_mean, of_normed;  // means over the row: of g, of g x^

  __device__ float operator()(float g, float normed) const { return rstd * (g - of_mean - normed * of_normed); }
};

template <Element T>
__global__ void __launch_bounds__(kThreads<T>) layernorm_backward_kernel(const LayerNormBackward job) {
  constexpr int V = kVec<T>, kChunks = kHeld / V;
  __shared__ float merged[V][32 * kBlockWarps];
  const int all = static_cast<int>(job.width);
  const float share = 1.f / all;
  float d_weight[kChunks][V] = {}, d_bias[kChunks][V] = {};

  int turn = 0;
  for (int64_t top = static_cast<int64_t>(blockIdx.x) * blockDim.y; top < job.rows;
       top += job.parts * blockDim.y, ++turn) {
    const int64_t row = top + threadIdx.y, start = row * job.width;
    const int width = row < job.rows ? all : 0;
    const float mean = width ? job.mean[row] : 0.f, rstd = width ? job.rstd[row] : 0.f;
    Chunk<T, V> dy[kChunks], s[kChunks], d_s[kChunks];
    const auto each = [&](auto f) {
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        const int column = (j * static_cast<int>(blockDim.x) + threadIdx.x) * V;
        if (column < width) f(j, column);
      }
    };
    each([&](int j, int c) {
      dy[j] = load<T, V>(job.dy, start + c);
      s[j] = load<T, V>(job.s, start + c);
    });
    if (job.d_s) each([&](int j, int c) { d_s[j] = load<T, V>(job.d_s, start + c); });

    float sums[2] = {};
    each([&](int j, int c) {
      float weight[V];
      load_vector<V>(job.weight, c, weight);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const float normed = (value(s[j], k) - mean) * rstd, g = value(dy[j], k) * weight[k];
        d_weight[j][k] = fmaf(value(dy[j], k), normed, d_weight[j][k]);
        d_bias[j][k] += value(dy[j], k);
        sums[0] += g;
        sums[1] = fmaf(g, normed, sums[1]);
      }
    });
    over_row(sums, turn);
    const Slope slope{rstd, sums[0] * share, sums[1] * share};
    each([&](int j, int c) {
      float weight[V], bias[V], v[V];
      load_vector<V>(job.weight, c, weight);
#pragma unroll
      for (int k = 0; k < V; ++k)
        v[k] = slope(value(dy[j], k) * weight[k], (value(s[j], k) - mean) * rstd);
      if (job.d_s)
#pragma unroll
        for (int k = 0; k < V; ++k) v[k] += value(d_s[j], k);
      store<T, V>(job.dx, start + c, rounded<T, V>(v));
      if (!job.y) return;
      load_vector<V>(job.bias, c, bias);
#pragma unroll
      for (int k = 0; k < V; ++k) v[k] = fmaf((value(s[j], k) - mean) * rstd, weight[k], bias[k]);
      store<T, V>(job.y, start + c, rounded<T, V>(v));
    });
  }

  // The sums of the rows that a block holds at once are added in order.
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const auto keep = [&](float(&sums)[kChunks][V], float* to) {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      if (j * static_cast<int>(blockDim.x) * V >= all) break;
      if (blockDim.y > 1) {
        __syncthreads();
#pragma unroll
        for (int k = 0; k < V; ++k) merged[k][thread] = sums[j][k];
        __syncthreads();
        if (threadIdx.y > 0) continue;
        for (int other = 1; other < static_cast<int>(blockDim.y); ++other)
#pragma unroll
          for (int k = 0; k < V; ++k) sums[j][k] += merged[k][other * blockDim.x + thread];
      }
      const int column = (j * static_cast<int>(blockDim.x) + threadIdx.x) * V;
      if (column < all) store_vector<V>(to, column, sums[j]);
    }
  };
  float* part = job.scratch + blockIdx.x * 2 * job.width;
  keep(d_weight, part);
  keep(d_bias, part + job.width);
}

// The same, an element at a time, with one row a block.
template <Element T>
__global__ void __launch_bounds__(32 * kMostWarps) layernorm_backward_plain_kernel(const LayerNormBackward job) {
  float* part = job.scratch + blockIdx.x * 2 * job.width;
  int turn = 0;
  for (int64_t row = blockIdx.x; row < job.rows; row += job.parts, ++turn) {
    const int64_t start = row * job.width;
    const float mean = job.mean[row], rstd = job.rstd[row];
    float sums[2] = {};
    for (int64_t c = threadIdx.x; c < job.width; c += blockDim.x) {
      const float dy = value(load<T, 1>(job.dy, start + c), 0), g = dy * job.weight[c];
      const float normed = (value(load<T, 1>(job.s, start + c), 0) - mean) * rstd;
      part[c] = fmaf(dy, normed, turn ? part[c] : 0.f);
      part[job.width + c] = dy + (turn ? part[job.width + c] : 0.f);
      sums[0] += g;
      sums[1] = fmaf(g, normed, sums[1]);
    }
    over_row(sums, turn);
    const Slope slope{rstd, sums[0] / job.width, sums[1] / job.width};
    for (int64_t c = threadIdx.x; c < job.width; c += blockDim.x) {
      const float normed = (value(load<T, 1>(job.s, start + c), 0) - mean) * rstd;
      float dx[1] = {slope(value(load<T, 1>(job.dy, start + c), 0) * job.weight[c], normed)};
      if (job.d_s) dx[0] += value(load<T, 1>(job.d_s, start + c), 0);
      store<T, 1>(job.dx, start + c, rounded<T, 1>(dx));
      const float y[1] = {fmaf(normed, job.weight[c], job.bias[c])};
      if (job.y) store<T, 1>(job.y, start + c, rounded<T, 1>(y));
    }
  }
}

}  // namespace

int64_t layernorm_parts(int64_t rows, int64_t width, Element type, int multiprocessors) {
  const Layout layout(width);
  const int threads = type == Element::f32 ? kThreads<Element::f32> : kThreads<Element::bf16>;
  const int64_t fill = static_cast<int64_t>(multiprocessors) * (threads / (32 * layout.warps * layout.at_once));
  const int64_t most = ceil_div(rows, layout.at_once);  // every part has at least one row
  return most < fill ? most : fill;
}

const char* layernorm(const LayerNorm& job, int device, std::uintptr_t stream_handle) {
  if (job.rows == 0) return nullptr;
  return on_device(device, [&] {
    const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
    const Layout layout(job.width);
    const bool wide = job.width <= kMostHeld &&
                      aligned(job.width, job.type, job.x, job.residual, job.weight, job.bias, job.y, job.s);
    const dim3 block = wide ? layout.block() : plain_block(job.width);
    const unsigned grid = static_cast<unsigned>(ceil_div(job.rows, wide ? layout.at_once : 1));
    with_type(job.type, [&](auto type) {
      const auto kernel = wide ? layernorm_kernel<type()> : layernorm_plain_kernel<type()>;
      kernel<<<grid, block, 0, stream>>>(job);
    });
  });
}

const char* layernorm_backward(const LayerNormBackward& job, int device, std::uintptr_t stream_handle) {
  return on_device(device, [&] {
    const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
    const bool wide = job.width <= kMostHeld && aligned(job.width, job.type, job.dy, job.s, job.weight, job.bias,
                                                        job.d_s, job.dx, job.y, job.scratch);
    const dim3 block = wide ? Layout(job.width).block() : plain_block(job.width);
    const unsigned grid = static_cast<unsigned>(job.parts);
    if (grid)
      with_type(job.type, [&](auto type) {
        const auto kernel = wide ? layernorm_backward_kernel<type()> : layernorm_backward_plain_kernel<type()>;
        kernel<<<grid, block, 0, stream>>>(job);
      });
    add_parts(job.scratch, job.parts, 2 * job.width, job.width, job.d_weight, job.d_bias, stream);
  });
}

}  // namespace lift_fast::gpu
