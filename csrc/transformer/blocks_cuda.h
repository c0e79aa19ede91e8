// What a transformer block does between its matrix products, on the GPU: layernorm with the residual added, and bias
// with activation, forward and backward. Every pointer is to the device's memory. Rows are tokens [rows, width],
// contiguous, of one type (f32, bf16, f16); weights, biases, statistics and sums over rows are float32.
#pragma once
#include <cstdint>

#include "rows/dequant.h"

namespace lift_fast::gpu {

// s = x + residual, y = (s - mean) rstd weight + bias. Without residual s is x, and `s` is not written.
struct LayerNorm {
  const void *x, *residual;
  const float *weight, *bias;
  float eps;
  void *y, *s;
  float *mean, *rstd;  // [rows]
  int64_t rows, width;
  Out type;
};

// dx = the gradient of s by way of y, plus d_s. dx may be dy or d_s.
struct LayerNormBackward {
  const void *dy, *s;
  const float *mean, *rstd, *weight, *bias;
  const void* d_s;           // null: zeros
  void *dx, *y;              // y = (s - mean) rstd weight + bias; null: not asked
  float *d_weight, *d_bias;  // [width], written
  float* scratch;            // [parts, 2, width]
  int64_t parts;             // layernorm_parts(...)
  int64_t rows, width;
  Out type;
};

enum class Activation : int { gelu = 0, gelu_tanh = 1, quick_gelu = 2 };

// a = act(h + bias). a may be h.
struct BiasAct {
  const void* h;
  const float* bias;
  void* a;
  int64_t rows, width;
  int multiprocessors;  // to keep busy
  Activation activation;
  Out type;
};

// dh = da act'(h + bias), d_bias = the sum of its rows. dh may be da, a may be h.
struct BiasActBackward {
  const void *da, *h;
  const float* bias;
  void *dh, *a;    // a = act(h + bias); null: not asked
  float* d_bias;   // [width], written
  float* scratch;  // [parts, width]
  int64_t parts;   // bias_act_parts(...)
  int64_t rows, width;
  Activation activation;
  Out type;
};

// Into how many parts the rows are cut on a GPU of this many multiprocessors. The bits of the sums over rows depend on
// the shape and on this number, and on nothing else.
int64_t layernorm_parts(int64_t rows, int64_t width, Out type, int multiprocessors);
int64_t bias_act_parts(int64_t rows, int64_t width, Out type, int multiprocessors);

// Null, or the CUDA runtime's words for what went wrong. Asynchronous on `stream`.
const char* layernorm(const LayerNorm& job, int device, std::uintptr_t stream);
const char* layernorm_backward(const LayerNormBackward& job, int device, std::uintptr_t stream);
const char* bias_act(const BiasAct& job, int device, std::uintptr_t stream);
const char* bias_act_backward(const BiasActBackward& job, int device, std::uintptr_t stream);

}  // namespace lift_fast::gpu
