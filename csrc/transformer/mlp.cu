// The bias and activation between an MLP's two matrix products, on the GPU; z = h + bias:
//
//   a = act(z)        dh = da act'(z)        d_bias = sum over rows of dh        GELU: arXiv 1606.08415
//
//   gelu         z P(z)                  P + z p                          P, p: the normal distribution, its density
//   gelu_tanh    z S(z (k0 + k1 z z))    S + z S (1 - S) (k0 + 3 k1 z z)  S: the logistic function
//   quick_gelu   the same with k0 = 1.702, k1 = 0
//
//   a block of 4 warps keeps to its 32 x 16 bytes of columns:
//     load the bias                                               once
//     for 4 rows of a warp at a time:
//       load h, da                                                4 or 8 loads of 16 bytes in flight a lane
//       store a, or dh (and a if wanted)
//       d_bias += dh before it is rounded                         in registers
//     add the sums of the 4 warps in shared memory, one part to scratch; a second kernel adds the parts (blocks.cuh)
//
// Bytes for a bf16 element: forward 4, backward 6, or 8 with a. About 20 and 25 instructions, of which 2 go to the
// special function unit. In the time that 4 bytes take at 3 TB/s, each of 132 multiprocessors can execute 34 at 1.7
// GHz: the bound is HBM. Not measured on a GPU yet.
#include <algorithm>

#include "blocks.cuh"

namespace lift_fast::gpu {
namespace {

constexpr int kWarps = 4;     // a thread block
constexpr int kRows = 4;      // a warp at a time
constexpr int kForward = 8;   // thread blocks a multiprocessor
constexpr int kBackward = 5;  // likewise

struct Act {
  float value, slope;  // act(z), act'(z)
};

// 1 - P(u) = e^(-u u / 2) t q(t) with t = 1 / (1 + 0.3 u) for every u >= 0, with a relative error of 1.3e-7 before
// rounding: q is a minimax fit on 0 .. 13.3, beyond which 1 - P(u) is 0 in float32. One exponential serves P and its
// density, where erff would need a second one for the density and half a dozen more instructions.
struct Gelu {
  __device__ explicit Gelu(Activation) {}
  __device__ Act operator()(float z) const {
    const float e = exp2_of(z * z * -0.72134752f);
    const float t = reciprocal(fmaf(0.3f, fabsf(z), 1.f));
    float q = 0.036036411f;
    q = fmaf(q, t, -0.15871401f);
    q = fmaf(q, t, 0.20896518f);
    q = fmaf(q, t, -0.056096337f);
    q = fmaf(q, t, 0.12984361f);
    q = fmaf(q, t, 0.099523017f);
    q = fmaf(q, t, 0.12081690f);
    q = fmaf(q, t, 0.11962532f);
    const float tail = q * t * e, p = z < 0.f ? tail : 1.f - tail;
    return {z * p, fmaf(z * 0.39894228f, e, p)};
  }
};

struct Logistic {
  float k0, k1;

  __device__ explicit Logistic(Activation activation)
      : k0(activation == Activation::quick_gelu ? 1.702f : 1.5957691f),
        k1(activation == Activation::quick_gelu ? 0.f : 0.071354816f) {}
  __device__ Act operator()(float z) const {
    const float square = fminf(z * z, 1e30f);  // 0 x infinity would be NaN
    const float s = reciprocal(1.f + exp2_of(-1.44269504f * z * fmaf(k1, square, k0)));
    return {z * s, s * fmaf(z * (1.f - s), fmaf(3.f * k1, square, k0), 1.f)};
  }
};

// A lane's way down its columns: from `row` in steps of `step` rows.
template <int V>
struct Walk {
  int64_t column, row, step;

  __device__ explicit Walk(int64_t parts)
      : column((static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x) * V),
        row(static_cast<int64_t>(blockIdx.y) * kWarps + threadIdx.y),
        step(parts * kWarps) {}
};

template <Element T, int V, typename F>
__global__ void __launch_bounds__(32 * kWarps, kForward) bias_act_kernel(const BiasAct job, int64_t parts) {
  const Walk<V> walk(parts);
  if (walk.column >= job.width) return;
  const F act(job.activation);
  float bias[V];
  load_vector<V>(job.bias, walk.column, bias);
  for (int64_t row = walk.row; row < job.rows; row += kRows * walk.step) {
    Chunk<T, V> h[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (row + r * walk.step < job.rows)
        h[r] = load<T, V>(job.h, (row + r * walk.step) * job.width + walk.column);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r * walk.step >= job.rows) break;
      float a[V];
#pragma unroll
      for (int k = 0; k < V; ++k) a[k] = act(value(h[r], k) + bias[k]).value;
      store<T, V>(job.a, (row + r * walk.step) * job.width + walk.column, rounded<T, V>(a));
    }
  }
}

template <Element T, int V, typename F>
__global__ void __launch_bounds__(32 * kWarps, kBackward) bias_act_backward_kernel(const BiasActBackward job) {
  __shared__ float merged[kWarps][V][32];
  const Walk<V> walk(job.parts);
  const bool inside = walk.column < job.width;
  const F act(job.activation);
  float bias[V] = {}, sums[V] = {};
  if (inside) load_vector<V>(job.bias, walk.column, bias);
  for (int64_t row = walk.row; inside && row < job.rows; row += kRows * walk.step) {
    Chunk<T, V> da[kRows], h[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r * walk.step >= job.rows) break;
      const int64_t at = (row + r * walk.step) * job.width + walk.column;
      da[r] = load<T, V>(job.da, at);
      h[r] = load<T, V>(job.h, at);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r * walk.step >= job.rows) break;
      const int64_t at = (row + r * walk.step) * job.width + walk.column;
      float dh[V], a[V];
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const Act result = act(value(h[r], k) + bias[k]);
        dh[k] = value(da[r], k) * result.slope;
        a[k] = result.value;
        sums[k] += dh[k];
      }
      store<T, V>(job.dh, at, rounded<T, V>(dh));
      if (job.a) store<T, V>(job.a, at, rounded<T, V>(a));
    }
  }

#pragma unroll
  for (int k = 0; k < V; ++k) merged[threadIdx.y][k][threadIdx.x] = sums[k];
  __syncthreads();
  if (threadIdx.y > 0 || !inside) return;
#pragma unroll
  for (int other = 1; other < kWarps; ++other)
#pragma unroll
    for (int k = 0; k < V; ++k) sums[k] += merged[other][k][threadIdx.x];
  store_vector<V>(job.scratch + blockIdx.y * job.width, walk.column, sums);
}

// The number of parts to divide rows into so that each multiprocessor has `each` thread blocks.
int64_t parts_of(int64_t rows, int64_t width, Element type, int64_t each, int multiprocessors) {
  const int64_t across = ceil_div(width, 32 * (type == Element::f32 ? kVec<Element::f32> : kVec<Element::bf16>));
  const int64_t fill = std::max<int64_t>(1, each * multiprocessors / across);
  return std::min(fill, ceil_div(rows, kWarps));
}

dim3 grid(int64_t width, int64_t parts, int64_t elements) {
  return dim3(static_cast<unsigned>(ceil_div(width, 32 * elements)), static_cast<unsigned>(parts));
}

}  // namespace

int64_t bias_act_parts(int64_t rows, int64_t width, Element type, int multiprocessors) {
  return parts_of(rows, width, type, kBackward, multiprocessors);
}

const char* bias_act(const BiasAct& job, int device, std::uintptr_t stream_handle) {
  const int64_t parts = parts_of(job.rows, job.width, job.type, kForward, job.multiprocessors);
  if (parts == 0) return nullptr;
  return on_device(device, [&] {
    const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
    const bool wide = aligned(job.width, job.type, job.h, job.bias, job.a);
    const bool exact = job.activation == Activation::gelu;
    with_type(job.type, [&](auto type) {
      constexpr Element T = type();
      const auto kernel = wide ? exact ? bias_act_kernel<T, kVec<T>, Gelu> : bias_act_kernel<T, kVec<T>, Logistic>
                               : exact ? bias_act_kernel<T, 1, Gelu> : bias_act_kernel<T, 1, Logistic>;
      kernel<<<grid(job.width, parts, wide ? kVec<T> : 1), dim3(32, kWarps), 0, stream>>>(job, parts);
    });
  });
}

const char* bias_act_backward(const BiasActBackward& job, int device, std::uintptr_t stream_handle) {
  return on_device(device, [&] {
    const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
    const bool wide = aligned(job.width, job.type, job.da, job.h, job.bias, job.dh, job.a, job.scratch);
    const bool exact = job.activation == Activation::gelu;
    if (job.parts)
      with_type(job.type, [&](auto type) {
        constexpr Element T = type();
        const auto kernel =
            wide ? exact ? bias_act_backward_kernel<T, kVec<T>, Gelu> : bias_act_backward_kernel<T, kVec<T>, Logistic>
                 : exact ? bias_act_backward_kernel<T, 1, Gelu> : bias_act_backward_kernel<T, 1, Logistic>;
        kernel<<<grid(job.width, job.parts, wide ? kVec<T> : 1), dim3(32, kWarps), 0, stream>>>(job);
      });
    add_parts(job.scratch, job.parts, job.width, job.width, job.d_bias, job.d_bias, stream);
  });
}

}  // namespace lift_fast::gpu
