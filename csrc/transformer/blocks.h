// The parts of a transformer block on the CPU; lift_fast/ops/transformer/contract.py defines each. Tokens are
// [rows, width], contiguous, of one type (f32, bf16 or f16); weights, biases, statistics and all arithmetic are
// float32.
#pragma once
#include <algorithm>
#include <cstdint>

#include "activation.h"
#include "common/element.h"
#include "common/integers.h"
#include "common/isa.h"
#include "common/scratch.h"

namespace lift_fast {

struct LayerNorm {
  Element type;
  int64_t rows, width;
  const void *x, *residual;    // residual: null, then s = x
  const float *weight, *bias;  // [width]
  float eps;
  void *y, *stream;    // stream: s = x + residual, rounded; null without residual
  float *mean, *rstd;  // [rows]
};

struct LayerNormBackward {
  Element type;
  int64_t rows, width;
  const void *dy, *stream, *d_stream;  // d_stream: added to dx, or null
  const float *mean, *rstd, *weight, *bias;
  void *dx, *y;              // dx may be dy or d_stream; y: recomputed, or null
  float *d_weight, *d_bias;  // [width], overwritten
};

struct BiasAct {
  Element type;
  Activation activation;
  int64_t rows, width;
  const void* h;
  const float* bias;  // [width]
  void* a;            // may be h
};

struct BiasActBackward {
  Element type;
  Activation activation;
  int64_t rows, width;
  const void *da, *h;
  const float* bias;
  void *dh, *a;   // dh may be da; a: recomputed, may be h, or null
  float* d_bias;  // [width], overwritten
};

// The same bits for any number of threads: sums over rows are taken in bands, whose size depends on the number of rows
// alone, and the bands' sums are added in order. With Isa::avx512_bf16, one instruction rounds to bf16, and it turns
// subnormals into zeros.
void layernorm_cpu(const LayerNorm& job, int threads, Isa isa);
void layernorm_backward_cpu(const LayerNormBackward& job, int threads, Isa isa);
void bias_act_cpu(const BiasAct& job, int threads, Isa isa);
void bias_act_backward_cpu(const BiasActBackward& job, int threads, Isa isa);

// Rows are divided into `count` bands of `rows` rows, for at most `threads` threads.
struct Bands {
  int64_t rows, count;
  int threads;
};

inline Bands bands_of(int64_t rows, int64_t width, int threads) {
  constexpr int64_t kLeastRows = 32, kMostBands = 256;  // the bands' sums have at most 1/32 as many rows as the input
  constexpr int64_t kElementsPerThread = 1 << 17;       // with fewer, a thread costs more to start than it saves
  const int64_t band = std::max(kLeastRows, ceil_div(rows, kMostBands));
  const int64_t useful = rows * width / kElementsPerThread;
  return {band, ceil_div(rows, band), static_cast<int>(std::clamp<int64_t>(useful, 1, std::max(threads, 1)))};
}

// out[c] = the sum over bands of sums[band * stride + c].
inline void add_bands(const float* sums, int64_t bands, int64_t stride, int64_t width, float* out) {
  std::fill(out, out + width, 0.f);
  for (int64_t band = 0; band < bands; ++band)
    for (int64_t c = 0; c < width; ++c) out[c] += sums[band * stride + c];
}

}  // namespace lift_fast
