// The GPU epilogues of the losses over all pairs: cuBLAS forms the products x_i . t_j in float32, and these make
// statistics, losses and the inputs of the gradients' GEMMs from them. Every pointer is to the device's memory.
//
//   c_ij = a_i q_j (x_i . t_j)        z_ij = scale c_ij + bias        row i's positive is column offset + i
#pragma once
#include <cstdint>

#include "common/element.h"

namespace lift_fast::gpu {

// A tile of the score matrix; rows and cols are at least 1.
struct ScoreTile {
  const float* products;  // [rows, cols], rows `stride` apart
  int64_t stride, rows, cols;
  const float *a, *q;         // [rows], [cols]; null: ones
  const float *scale, *bias;  // one number each
  int64_t offset;
};

// Merged into, without the positives: m = max z, l = sum of exp(z - m), w = sum of exp(z - m) c.
struct Stats {
  float* row;  // [3, rows], row_stride apart
  int64_t row_stride;
  float* col;  // [3, cols], col_stride apart
  int64_t col_stride;
  float* positive;  // [rows]: receives c of the positives in this tile
  float* scratch;   // stats_scratch(rows, cols) floats
};

// g = row_weight exp(z - m_i) / l_i + col_weight exp(z - m_j) / l_j, and positive_i for positives.
struct Softmax {
  const float* row;  // m and l [2, rows], row_stride apart, over all pairs; not read if row_weight is 0
  int64_t row_stride;
  const float* col;  // [2, cols], likewise
  int64_t col_stride;
  float row_weight, col_weight;
  const float* positive;  // [rows]; read for rows whose positive is in this tile
};

// g = -y sigmoid(-y z). Added to, [rows] each: sum of softplus(-y z), alpha sum of g c, alpha sum of g; null: not
// wanted.
struct Sigmoid {
  float alpha;
  float *loss, *d_scale, *d_bias;
  float* scratch;  // sigmoid_scratch(rows, cols) floats
};

// The input of a gradient's GEMM: out_ij = round(left_i g_ij right_j factor), times scale if `scaled`.
struct Gradient {
  void* out;  // [rows, cols], rows `stride` apart; in float32 it may be the products themselves. Null: not wanted
  int64_t stride;
  Element type;               // float16: out saturates at 65504
  const float *left, *right;  // [rows], [cols]; null: ones
  float factor;
  bool scaled;
};

int64_t stats_scratch(int64_t rows, int64_t cols);
int64_t sigmoid_scratch(int64_t rows, int64_t cols);

// Asynchronous on `stream`. The same bits at every run. Return null, or the CUDA runtime's error message.
const char* contrastive_stats(const ScoreTile& scores, const Stats& to, int device, std::uintptr_t stream);
const char* contrastive_gradient(const ScoreTile& scores, const Softmax& softmax, const Gradient& to, int device,
                                 std::uintptr_t stream);
const char* sigmoid(const ScoreTile& scores, const Sigmoid& sums, const Gradient& to, int device,
                    std::uintptr_t stream);

}  // namespace lift_fast::gpu
