// Attention of short sequences on the CPU, from packed queries, keys and values: see lift_fast/ops/attention/op.py.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace lift_fast {

struct Attention {
  const void* qkv;  // [batch, tokens, 3, heads, dim], contiguous
  Element type;     // of qkv, out and their gradients: f32, bf16 or f16
  int64_t batch, tokens, heads, dim;
  float scale;
  bool causal;
};

// out: [batch, tokens, heads, dim]; lse: [batch, heads, tokens], the log of each row's sum of exp(scores).
void attention_forward_cpu(const Attention& attention, void* out, float* lse, int threads, Isa isa);
// d_out: like out; d_qkv: like qkv, overwritten. out: recomputed, or null. The same bits for any number of threads.
void attention_backward_cpu(const Attention& attention, const void* d_out, const float* lse, void* d_qkv, void* out,
                            int threads, Isa isa);

}  // namespace lift_fast
