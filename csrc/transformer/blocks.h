// The parts of a transformer block on the CPU; ops/transformer/contract.py says what each does. Tokens are [rows, width],
// contiguous, of one type, f32, bf16 or f16; weights, biases and statistics are float32, and so is all arithmetic.
#pragma once
#include <algorithm>
#include <cstdint>

#include "pairs/pairs.h"

namespace lift_fast {

struct LayerNorm {
  Element type;
  int64_t rows, width;
  const void *x, *residual;  // residual: null, then s is x
  const float *weight, *bias;  // [width]
  float eps;
  void *y, *stream;    // stream: s = x + residual, rounded; null without residual
  float *mean, *rstd;  // [rows]
};

struct LayerNormBackward {
  Element type;
  int64_t rows, width;
  const void *dy, *stream, *d_stream;  // d_stream: null or added to dx
  const float *mean, *rstd, *weight, *bias;
  void *dx, *y;              // dx may be dy or d_stream; y: null or written again
  float *d_weight, *d_bias;  // [width], overwritten
};

enum class Activation : int { gelu = 0, gelu_tanh = 1, quick_gelu = 2 };

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
  void *dh, *a;   // dh may be da; a may be h, or null
  float* d_bias;  // [width], overwritten
};

// The same bits for any number of threads: what is summed over rows is summed in blocks of a size that only the rows
// decide, and the blocks' sums in order. AVX-512 with bf16 differs in what it rounds to bf16: by one instruction, which
// takes subnormals for zeros.
void layernorm_cpu(const LayerNorm& job, int threads, PairsIsa isa);
void layernorm_backward_cpu(const LayerNormBackward& job, int threads, PairsIsa isa);
void bias_act_cpu(const BiasAct& job, int threads, PairsIsa isa);
void bias_act_backward_cpu(const BiasActBackward& job, int threads, PairsIsa isa);

// How rows are shared out: blocks of block_rows, as many threads as they are worth.
struct Share {
  int64_t block_rows, blocks;
  int threads;
};

inline Share share_of(int64_t rows, int64_t width, int threads) {
  constexpr int64_t kRows = 32, kBlocks = 256;     // what blocks add up over their rows is at most 1/32 of the rows
  constexpr int64_t kElementsPerThread = 1 << 17;  // with less, a thread costs more to start than it saves
  const int64_t block = std::max(kRows, (rows + kBlocks - 1) / kBlocks), blocks = (rows + block - 1) / block;
  const int64_t worth = rows * width / kElementsPerThread;
  return {block, blocks, static_cast<int>(std::clamp<int64_t>(worth, 1, std::max(threads, 1)))};
}

// out[c] = the sum over blocks of sums[block * stride + c].
inline void add_blocks(const float* sums, int64_t blocks, int64_t stride, int64_t width, float* out) {
  std::fill(out, out + width, 0.f);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t c = 0; c < width; ++c) out[c] += sums[block * stride + c];
}

}  // namespace lift_fast
