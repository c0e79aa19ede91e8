// Attention of short sequences on the CPU, from packed queries, keys and values: lift_fast/ops/attention/op.py.
#pragma once
#include <cstdint>

#include "pairs/pairs.h"  // Element, PairsIsa, Scratch

namespace lift_fast {

struct Attention {
  const void* qkv;  // [batch, tokens, 3, heads, dim], contiguous
  Element type;     // of qkv, out and their gradients: not i8
  int64_t batch, tokens, heads, dim;
  float scale;
  bool causal;
};

// out: [batch, tokens, heads, dim]; lse: [batch, heads, tokens], log of each row's sum of exp(scores).
void attention_forward_cpu(const Attention& attention, void* out, float* lse, int threads, PairsIsa isa);
// d_out as out; d_qkv as qkv, overwritten. out, if not null, is made again. The same bits whatever the threads.
void attention_backward_cpu(const Attention& attention, const void* d_out, const float* lse, void* d_qkv, void* out,
                            int threads, PairsIsa isa);

}  // namespace lift_fast
