// The GPU epilogues of the losses over all pairs: what cuBLAS leaves, products x_i . t_j in float32, becomes
// statistics, losses and what the gradients' GEMMs take in. Every pointer is to the device's memory.
//
//   c_ij = a_i q_j (x_i . t_j)        z_ij = scale c_ij + bias        row i's own pair is column offset + i
#pragma once
#include <cstdint>

#include "rows/dequant.h"

namespace lift_fast::gpu {

// One block of the score matrix; rows and cols are at least 1.
struct Scores {
  const float* products;  // [rows, cols], rows `stride` apart
  int64_t stride, rows, cols;
  const float *a, *q;          // [rows], [cols]; null: ones
  const float *scale, *bias;   // one number each
  int64_t offset;
};

// Merged into, without the own pairs: m = max z, l = sum of exp(z - m), w = sum of exp(z - m) c.
struct Stats {
  float* row;  // [3, rows], row_stride apart
  int64_t row_stride;
  float* col;  // [3, cols], col_stride apart
  int64_t col_stride;
  float* own;      // [rows]: c of the own pairs in this block is written
  float* scratch;  // stats_scratch(rows, cols) floats
};

// g = row_weight exp(z - m_i) / l_i + col_weight exp(z - m_j) / l_j, and own_i at own pairs
struct Softmax {
  const float* row;  // m and l [2, rows], row_stride apart, over all pairs; not read where row_weight is 0
  int64_t row_stride;
  const float* col;  // [2, cols], likewise
  int64_t col_stride;
  float row_weight, col_weight;
  const float* own;  // [rows]; read where a row's own pair is in this block
};

// g = -y sigmoid(-y z). Added to, [rows] each: sum of softplus(-y z), alpha sum of g c, alpha sum of g. Null: not
// asked.
struct Sigmoid {
  float alpha;
  float *loss, *d_scale, *d_bias;
  float* scratch;  // sigmoid_scratch(rows, cols) floats
};

// What a gradient's GEMM takes in: out_ij = round(left_i g_ij right_j factor), times scale if `scaled`.
struct Gradient {
  void* out;  // [rows, cols], rows `stride` apart; float32: may be the products themselves. Null: not asked
  int64_t stride;
  Out type;                   // float16: out saturates at 65504
  const float *left, *right;  // [rows], [cols]; null: ones
  float factor;
  bool scaled;
};

int64_t stats_scratch(int64_t rows, int64_t cols);
int64_t sigmoid_scratch(int64_t rows, int64_t cols);

// Null, or the CUDA runtime's words for what went wrong. Asynchronous on `stream`. The same bits at every run.
const char* contrastive_stats(const Scores& of, const Stats& to, int device, std::uintptr_t stream);
const char* contrastive_gradient(const Scores& of, const Softmax& softmax, const Gradient& to, int device,
                                 std::uintptr_t stream);
const char* sigmoid(const Scores& of, const Sigmoid& sums, const Gradient& to, int device, std::uintptr_t stream);

}  // namespace lift_fast::gpu
