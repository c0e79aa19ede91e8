// LayerNorm over rows of tokens on the CPU, with the residual's addition (arXiv 1607.06450).
//
//   s = x + residual,  y = (s - mean) rstd weight + bias              x^ = (s - mean) rstd,  g = dy weight
//   dx = rstd (g - mean_row(g) - x^ mean_row(g x^)) + d_stream,  d_weight = sum_rows dy x^,  d_bias = sum_rows dy
//
//   forward   for each row:  s, its sum; then from the first cache the deviations' sums, then y
//   backward  for each 2 rows:  sums of g and g x^ along the rows, d_weight and d_bias of the block; then from the
//                               first cache dx and, if asked for, y
//   the sums of all blocks of rows -> d_weight, d_bias, in order
//
// Bytes an element of b bytes: forward 2 b, 4 b with a residual; backward 3 b, and b each for d_stream and y. About 10
// and 20 FLOPs for them: memory is the bound.
//
// The variance is that of the deviations d from a mean rounded to float32, less what that rounding made of it:
// mean_row(d^2) - mean_row(d)^2 (Chan, Golub, LeVeque 1983); y subtracts the rest of the mean as well, so that rows
// far from zero lose nothing but what their elements were rounded by.
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

constexpr int kRowsAtOnce = 2;  // with their gradients and d_weight, d_bias, weight they should fit the first cache

struct LayerNormPass {
  LayerNorm job;
  int64_t block_rows;
  float* scratch;  // [workers, width]
};

struct LayerNormBackwardPass {
  LayerNormBackward job;
  int64_t block_rows;
  float* sums;  // [blocks, 2, width]: of dy x^, of dy
};

struct Kernels {
  void (*forward)(const LayerNormPass&, int64_t, int);
  void (*backward)(const LayerNormBackwardPass&, int64_t, int);
};

#define KERNELS "transformer/layernorm_kernels.h"
#include "blocks_isas.h"

}  // namespace

void layernorm_cpu(const LayerNorm& job, int threads, PairsIsa isa) {
  const Share share = share_of(job.rows, job.width, threads);
  const Scratch scratch(share.threads * job.width * static_cast<int64_t>(sizeof(float)));
  parallel(share.blocks, share.threads, LayerNormPass{job, share.block_rows, scratch.get()},
           kernels_for(job.type, isa).forward);
}

void layernorm_backward_cpu(const LayerNormBackward& job, int threads, PairsIsa isa) {
  const Share share = share_of(job.rows, job.width, threads);
  const Scratch sums(share.blocks * 2 * job.width * static_cast<int64_t>(sizeof(float)));
  parallel(share.blocks, share.threads, LayerNormBackwardPass{job, share.block_rows, sums.get()},
           kernels_for(job.type, isa).backward);
  add_blocks(sums.get(), share.blocks, 2 * job.width, job.width, job.d_weight);
  add_blocks(sums.get() + job.width, share.blocks, 2 * job.width, job.width, job.d_bias);
}

}  // namespace lift_fast
