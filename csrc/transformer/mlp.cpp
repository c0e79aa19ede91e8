// The bias and activation between an MLP's two matrix products, on the CPU: a = act(h + bias), dh = da act'(h + bias).
//
//   arXiv 1606.08415:  gelu z Phi(z),  gelu_tanh z sigma(2 sqrt(2/pi) (z + 0.044715 z^3)),  quick_gelu z sigma(1.702 z)
//
//   for each row, for each vector of columns:  z = h + bias, t = min(|z|, most)
//     P = Phi(-t) or sigma(-...), S = the slope at -t          one 2^y, one division
//     a = max(z, 0) - t P                                      for both signs, as Phi(z) + Phi(-z) = 1
//     dh = da (S where z < 0, else 1 - S), which is added to the band's sums
//   the sums of all bands of rows, added in order -> d_bias
//
// Phi(-t) = exp(-t^2 / 2) R(t), R = erfcx(t / sqrt(2)) / 2 = k (m0 + ... + m5 k^5) with k = 1 / (1 + 0.285 t): the form
// of Abramowitz and Stegun 7.1.26, fitted so that it adds at most 2.3e-8 to the error of a and of its slope, and a
// relative error of 6e-4 far below 0. Together with 2^y (relative error 9e-8) and rounding, the error over all z is at
// most 2.2e-7 for the slope; for a it is 1.1e-7 relative where z > 1, and 2.5e-7 absolute below. `most` is where exp is
// 2^-125: from there to infinity a is z or 0, and the slope 1 or 0.
//
// Bytes for an element of b bytes: forward 2 b, backward 3 b, and b more for a. Instructions a vector: 40, 20 of them
// multiplications. At 16 lanes and 4 bytes an element they take about as long as memory does, at 2 bytes longer.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "blocks.h"
#include "common/exp2.h"
#include "common/floats.h"
#include "common/parallel.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lift_fast {
namespace {

constexpr float kLog2e = 1.44269504088896341f, kInvSqrt2Pi = 0.3989422804014327f;
constexpr float kTwoSqrt2OverPi = 1.5957691216057308f, kCube = 0.044715f, kQuick = 1.702f;
constexpr float kMillsAt = 0.285f;
constexpr float kMills[] = {0.11609541f, 0.08765435f, 0.21606684f, -0.15616175f, 0.33323616f, -0.09689102f};
template <Activation A>  // t where the activation's exponential is 2^-125, or just above
constexpr float kMost = A == Activation::gelu ? 13.16f : A == Activation::gelu_tanh ? 9.95f : 50.9f;

struct BiasActPass {
  BiasAct job;
  int64_t band_rows;
};

struct BiasActBackwardPass {
  BiasActBackward job;
  int64_t band_rows;
  float* sums;  // [bands, width]
};

struct Kernels {  // by Activation
  void (*forward[3])(const BiasActPass&, int64_t, int);
  void (*backward[3])(const BiasActBackwardPass&, int64_t, int);
};

#define KERNELS "transformer/mlp_kernels.h"
#include "blocks_isas.h"

}  // namespace

void bias_act_cpu(const BiasAct& job, int threads, Isa isa) {
  const Bands bands = bands_of(job.rows, job.width, threads);
  parallel(bands.count, bands.threads, BiasActPass{job, bands.rows},
           kernels_for(job.type, isa).forward[static_cast<int>(job.activation)]);
}

void bias_act_backward_cpu(const BiasActBackward& job, int threads, Isa isa) {
  const Bands bands = bands_of(job.rows, job.width, threads);
  const Scratch sums = scratch_floats(bands.count * job.width);
  parallel(bands.count, bands.threads, BiasActBackwardPass{job, bands.rows, sums.get()},
           kernels_for(job.type, isa).backward[static_cast<int>(job.activation)]);
  add_bands(sums.get(), bands.count, job.width, job.width, job.d_bias);
}

}  // namespace lift_fast
