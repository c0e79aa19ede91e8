// The parts of a transformer block on the GPU: layernorm with the residual's addition, and bias with activation,
// forward and backward. Every pointer is to the device's memory. Tokens are [rows, width], contiguous, of one type
// (f32, bf16 or f16); weights, biases, statistics and sums over rows are float32.
#pragma once
#include <cstdint>

#include "activation.h"
#include "common/element.h"

namespace lift_fast::gpu {

// s = x + residual, y = (s - mean) rstd weight + bias. Without residual s = x, and `s` is not written.
struct LayerNorm {
  const void *x, *residual;
  const float *weight, *bias;
  float eps;
  void *y, *s;
  float *mean, *rstd;  // [rows]
  int64_t rows, width;
  Element type;
};

// dx = the gradient of s through y, plus d_s. dx may be dy or d_s.
struct LayerNormBackward {
  const void *dy, *s;
  const float *mean, *rstd, *weight, *bias;
  const void* d_s;           // null: zeros
  void *dx, *y;              // y = (s - mean) rstd weight + bias, recomputed, or null
  float *d_weight, *d_bias;  // [width], overwritten
  float* scratch;            // [parts, 2, width]
  int64_t parts;             // layernorm_parts(...)
  int64_t rows, width;
  Element type;
};

// a = act(h + bias). a may be h.
struct BiasAct {
  const void* h;
  const float* bias;
  void* a;
  int64_t rows, width;
  int multiprocessors;  // of the GPU
  Activation activation;
  Element type;
};

// dh = da act'(h + bias), d_bias = the sum over rows of dh. dh may be da, a may be h.
struct BiasActBackward {
  const void *da, *h;
  const float* bias;
  void *dh, *a;    // a = act(h + bias), recomputed, or null
  float* d_bias;   // [width], overwritten
  float* scratch;  // [parts, width]
  int64_t parts;   // bias_act_parts(...)
  int64_t rows, width;
  Activation activation;
  Element type;
};

// The number of parts that the rows are divided into on a GPU of this many multiprocessors. The bits of the sums over
// rows depend on the shape and on this number, and on nothing else.
int64_t layernorm_parts(int64_t rows, int64_t width, Element type, int multiprocessors);
int64_t bias_act_parts(int64_t rows, int64_t width, Element type, int multiprocessors);

// Asynchronous on `stream`. Return null, or the CUDA runtime's error message.
const char* layernorm(const LayerNorm& job, int device, std::uintptr_t stream);
const char* layernorm_backward(const LayerNormBackward& job, int device, std::uintptr_t stream);
const char* bias_act(const BiasAct& job, int device, std::uintptr_t stream);
const char* bias_act_backward(const BiasActBackward& job, int device, std::uintptr_t stream);

}  // namespace lift_fast::gpu
