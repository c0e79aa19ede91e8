// The losses over all pairs of image and text rows on the CPU: scores, their statistics and their gradients.
//
//   c_ij = a_i q_j (x_i . t_j)        z_ij = scale c_ij + bias        row i's positive is column offset + i
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace lift_fast {

struct Rows {
  const void* data;  // [count, dim], rows `stride` elements apart, each contiguous
  Element type;
  int64_t count, stride;
  const float* scales;  // [count]; null: ones
};

struct Pairs {
  Rows x, t;  // images; texts, which may also be int8
  int64_t dim;
  float scale, bias;
  int64_t offset;
};

// The softmax state of a row or column, without its positive: max, sum of exp(z - max), sum of exp(z - max) c. `max`
// may be any reference near the maximum. Over no pairs at all: -inf, 0, 0.
struct Stats {
  float* row;  // [3, x.count], row_stride apart: merged into
  float* col;  // [3, t.count], col_stride apart: merged into
  int64_t row_stride, col_stride;
  float* positive;  // [x.count]: c of those positives that are among these columns
  float* keep;      // [x.count, t.count]: the products x_i . t_j, keep_stride apart; or null
  int64_t keep_stride;
};

// The gradient of one side: out_i = factor a_i sum_j g_ij q_j t_j for images; for texts likewise.
struct Gradient {
  bool of_text;
  float factor;
  void* out;  // images: [x.count, dim] f32 or x's type, overwritten; texts: [t.count, dim] f32, added to
  Element out_type;
  const float* kept;  // what Stats.keep received; null: the scores are recomputed
  int64_t kept_stride;
};

// g = row_weight exp(z - row_max) / row_sum + col_weight exp(z - col_max) / col_sum; for positives, positive[row]
// instead, which enters the gradient in float32: in a trained model 1 - p is far smaller than p's rounding error.
struct Softmax {
  const float *row_max, *row_sum, *col_max, *col_sum;
  float row_weight, col_weight;
  const float* positive;
};

// g = sigmoid(z) - y, y = 1 for positives, else 0. Added to, per row: the sums of softplus(z) - y z, of alpha g c and
// of alpha g. Null pointers: not wanted.
struct Sigmoid {
  float alpha;
  float *loss, *d_scale, *d_bias;
};

void stats_cpu(const Pairs& pairs, const Stats& stats, int threads, Isa isa);
void softmax_gradient_cpu(const Pairs& pairs, const Softmax& softmax, const Gradient& gradient, int threads, Isa isa);
// gradient.out null: only the sums. keep: as in Stats, to be the `kept` of the texts' gradient.
void sigmoid_cpu(const Pairs& pairs, const Sigmoid& sigmoid, const Gradient& gradient, float* keep, int64_t keep_stride,
                 int threads, Isa isa);

}  // namespace lift_fast
