// What the losses over all pairs of image and text rows share on the CPU: scores, their statistics, their gradients.
//
//   c_ij = a_i q_j (x_i . t_j)        z_ij = scale c_ij + bias        row i's own pair is column offset + i
#pragma once
#include <cstdint>
#include <utility>

namespace lift_fast {

enum class Element : int { f32 = 0, bf16 = 1, f16 = 2, i8 = 3 };

struct Rows {
  const void* data;  // [count, dim], rows stride elements apart, each contiguous
  Element type;
  int64_t count, stride;
  const float* scales;  // [count] or null, which means ones
};

struct Pairs {
  Rows x, t;  // images; texts, whose type may be i8
  int64_t dim;
  float scale, bias;
  int64_t offset;
};

// Softmax state of a row or column over all but its own pair: max, sum of exp(z - max), sum of exp(z - max) c. `max`
// may be any reference near it; -inf, 0, 0 where nothing was seen.
struct Stats {
  float* row;  // [3, x.count], row_stride apart: merged into
  float* col;  // [3, t.count], col_stride apart: merged into
  int64_t row_stride, col_stride;
  float* own;   // [x.count]: c of own pairs that lie in this block
  float* keep;  // [x.count, t.count] products x_i . t_j, keep_stride apart, or null
  int64_t keep_stride;
};

// One side's gradient: out_i = factor a_i sum_j g_ij q_j t_j for images; texts likewise.
struct Gradient {
  bool of_text;
  float factor;
  void* out;  // images: [x.count, dim] f32 or x's type, overwritten; texts: [t.count, dim] f32, added to
  Element out_type;
  const float* kept;  // as Stats.keep, or null: the scores are computed again
  int64_t kept_stride;
};

// g = row_weight exp(z - row_max) / row_sum + col_weight exp(z - col_max) / col_sum; for own pairs own[row] instead,
// which enters the gradient in float32: where it has learned, 1 - p is far smaller than what p is rounded by.
struct Softmax {
  const float *row_max, *row_sum, *col_max, *col_sum;
  float row_weight, col_weight;
  const float* own;
};

// g = sigmoid(z) - own. Sums over a row's pairs, added to: loss softplus(z) - own z, alpha g c, alpha g. Null: not asked.
struct Sigmoid {
  float alpha;
  float *loss, *d_scale, *d_bias;
};

// Instruction sets: Isa of rows/dequant.h, and above it AVX-512 with bf16 products.
enum class PairsIsa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };
PairsIsa best_pairs_isa();

// Memory that goes to a pool when it is given back (256 MiB at most), until release_scratch(). Contents: anything.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t bytes);  // std::bad_alloc
  Scratch(Scratch&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  Scratch& operator=(Scratch&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Scratch();
  float* get() const { return static_cast<float*>(data_); }
  float& operator[](int64_t i) const { return get()[i]; }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};
void release_scratch();

void stats_cpu(const Pairs& pairs, const Stats& stats, int threads, PairsIsa isa);
void softmax_gradient_cpu(const Pairs& pairs, const Softmax& softmax, const Gradient& gradient, int threads, PairsIsa isa);
// gradient.out may be null: only the sums. keep: as in Stats, to hand to the texts' gradient as `kept`.
void sigmoid_cpu(const Pairs& pairs, const Sigmoid& sigmoid, const Gradient& gradient, float* keep, int64_t keep_stride,
                 int threads, PairsIsa isa);

}  // namespace lift_fast
