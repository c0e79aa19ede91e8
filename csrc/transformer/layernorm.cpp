// LayerNorm over rows of tokens on the CPU, with the residual's addition (arXiv 1607.06450).
//
//   s = x + residual,  y = (s - mean) rstd weight + bias              x^ = (s - mean) rstd,  g = dy weight
//   dx = rstd (g - mean_row(g) - x^ mean_row(g x^)) + d_stream,  d_weight = sum_rows dy x^,  d_bias = sum_rows dy
//
//   each thread takes bands of rows:
//     forward   for each row:     s and its sum; then, from the L1 cache, the sums of the deviations, then y
//     backward  for each 2 rows:  sums of g and g x^ along the rows, d_weight and d_bias of the band; then, from the L1
//                                 cache, dx and, if wanted, y
//   the bands' sums, added in order -> d_weight, d_bias
//
// Bytes for an element of b bytes: forward 2 b, 4 b with a residual; backward 3 b, and b more for each of d_stream and
// y. FLOPs an element: about 10 and 20. Memory is the bound.
//
// With d the deviations from a mean rounded to float32, the variance is mean_row(d^2) - mean_row(d)^2, which corrects
// for that rounding (Chan, Golub, LeVeque 1983). y subtracts the rest of the mean as well. So rows far from zero lose
// no more than their elements had lost by rounding.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "blocks.h"
#include "common/floats.h"
#include "common/parallel.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lift_fast {
namespace {

constexpr int kRowsAtOnce = 2;  // they, their gradients, d_weight, d_bias and weight should fit in the L1 cache

struct LayerNormPass {
  LayerNorm job;
  int64_t band_rows;
  float* scratch;  // [workers, width]
};

struct LayerNormBackwardPass {
  LayerNormBackward job;
  int64_t band_rows;
  float* sums;  // [bands, 2, width]: of dy x^, of dy
};

struct Kernels {
  void (*forward)(const LayerNormPass&, int64_t, int);
  void (*backward)(const LayerNormBackwardPass&, int64_t, int);
};

#define KERNELS "transformer/layernorm_kernels.h"
#include "blocks_isas.h"

}  // namespace

void layernorm_cpu(const LayerNorm& job, int threads, Isa isa) {
  const Bands bands = bands_of(job.rows, job.width, threads);
  const Scratch scratch = scratch_floats(bands.threads * job.width);
  parallel(bands.count, bands.threads, LayerNormPass{job, bands.rows, scratch.get()},
           kernels_for(job.type, isa).forward);
}

void layernorm_backward_cpu(const LayerNormBackward& job, int threads, Isa isa) {
  const Bands bands = bands_of(job.rows, job.width, threads);
  const Scratch sums = scratch_floats(bands.count * 2 * job.width);
  parallel(bands.count, bands.threads, LayerNormBackwardPass{job, bands.rows, sums.get()},
           kernels_for(job.type, isa).backward);
  add_bands(sums.get(), bands.count, 2 * job.width, job.width, job.d_weight);
  add_bands(sums.get() + job.width, bands.count, 2 * job.width, job.width, job.d_bias);
}

}  // namespace lift_fast
