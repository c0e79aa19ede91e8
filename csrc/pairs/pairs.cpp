// The losses over all pairs on the CPU, softmax (arXiv 2103.00020, fig. 3) and sigmoid (arXiv 2303.15343, eq. 1),
// matrix products included; no [rows, rows] tensor is needed. Formulas: pairs.h.
//
//   pass 1    for each band of 192 rows (one thread):             A: the band's rows as words, in L2
//               for each 512 columns: for each 256 words of dim:  B: packed panels, once through the cache a band
//                 tile[192, 512] += A B                           6 x 64 sums in registers, 24 products a word
//               tile -> max, sum of exp, sum of exp c, by row and by column: one exponential an element
//   pass 2      tile (kept or recomputed) -> g, as words;  gradient[192, dim] += g B'
//
// FLOPs: 2 rows columns dim for each of scores, image gradient and text gradient. Bytes from memory: a band reads B
// once, 2 x 192 FLOPs for 4 bytes, so the bound is arithmetic. At dim 512 in bf16 all work but the products takes 12 to
// 16 % of the time.
#include "pairs.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/exp2.h"
#include "common/floats.h"
#include "common/integers.h"
#include "common/micro_tile.h"
#include "common/parallel.h"
#include "common/scratch.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lift_fast {
namespace {

constexpr int64_t kTileRows = 192, kTileColumns = 512;  // their products take 384 KB of a core's L2
constexpr int64_t kLine = 8;  // words per prefetched line: a band's micro-tiles fetch the next panel of 256 words
constexpr int64_t kAheadFloats = kWords / kLine * 16;
constexpr int64_t kGradientRow = kTileColumns + 16;  // words: if a power of two, a tile's rows would share cache sets
constexpr int64_t kTileSide = kTileColumns + 32;     // the weights of a tile's rows or columns, with padding
constexpr float kSpread = 60;  // e^-60 is far above float32's least value, and far below what a float32 sum resolves

// log(1 + e) / e for 0 <= e <= 1 as a polynomial, constant term first.
constexpr float kLog1p[] = {0.9999999946562915f,  -0.49999892648060534f, 0.3332971049886465f,   -0.24951616262414722f,
                            0.19663274255110796f, -0.1526966706883121f,  0.1054362378672801f,   -0.056373612750104135f,
                            0.01954252722123961f, -0.0031760570101959967f};

struct Packing {
  const Rows* rows;
  int64_t dim, words;
  float* out;
};

struct StatsPass {
  const Rows* x;
  const Stats* stats;
  int64_t dim, columns, offset, words, lda, band_rows;
  float scale;
  const float *row_scale, *column_scale, *column_bias;  // padded; the bias is -inf beyond the last column
  const float* packed;
  float* scratch;
  int64_t scratch_stride;
  float* column_state;  // [workers, 3, column_stride]
  int64_t column_stride;
};

// "Row" and "column" are those of a tile. The target's rows are the tile's rows, unless `transposed`: then, in tiles of
// kept products, the summed side's are.
struct GradientPass {
  const Rows *target, *summed;  // the side that gets a gradient, and the side that is summed over
  int64_t dim, offset, words, lda, band_rows;
  float scale, bias;
  const float *row_scale, *column_scale, *target_scale, *summed_scale;
  Softmax softmax;          // its statistics are padded, and are those of a tile's rows and columns
  int64_t positive_offset;  // the positive of the target's row i is the summed side's row positive_offset + i
  bool positive_by_summed;  // softmax.positive has one element an image: whether images are the summed side
  const float* kept;
  float* keep;
  int64_t kept_stride;
  bool transposed;
  const float *packed, *along;
  int64_t along_words;
  void* out;
  Element out_type;
  bool add;
  float factor;
  Sigmoid sigmoid;
  float* scratch;
  int64_t scratch_stride;
};

struct TileRow {
  float factor, bias, reference, weight, max;
};

struct TileColumns {
  const float *scale, *weight, *max;
  bool weighted;
};

// What to subtract for a maximum m: -inf - -inf would be NaN.
inline float reference_of(float m) { return m == -INFINITY ? 0.f : m; }

// Merges (m, l, w) into a softmax state.
inline void merge(float* state, int64_t stride, float m, float l, float w) {
  const float top = std::max(state[0], m), reference = reference_of(top);
  const float old = std::exp(state[0] - reference), now = std::exp(m - reference);
  state[0] = top;
  state[stride] = state[stride] * old + l * now;
  state[2 * stride] = state[2 * stride] * old + w * now;
}

// A copy of `from`, or `missing` if it is null, followed by `beyond`, so that whole vectors can be read.
Scratch padded(const float* from, int64_t count, float missing, float beyond) {
  const int64_t size = count + 2 * kTileSide;
  Scratch out = scratch_floats(size);
  for (int64_t i = 0; i < count; ++i) out[i] = from ? from[i] : missing;
  std::fill(out.get() + count, out.get() + size, beyond);
  return out;
}

// Bands of at most kTileRows rows; their number is a multiple of the threads' if there are enough rows.
int64_t band_rows_of(int64_t rows, int threads) {
  const int64_t bands = rounded_up(ceil_div(rows, kTileRows), threads);
  return rounded_up(ceil_div(rows, bands), kMicroRows);
}

#define KERNELS "pairs/pairs_kernels.h"
#include "common/isas.h"

// The loops for one instruction set and one kind of word: a float or two bf16.
struct Kernels {
  int64_t columns;
  void (*pack_across)(const Packing&, int64_t, int);
  void (*pack_along)(const Packing&, int64_t, int);
  void (*stats)(const StatsPass&, int64_t, int);
  void (*softmax)(const GradientPass&, int64_t, int);
  void (*sigmoid)(const GradientPass&, int64_t, int);
  int per_word;
};

#define LF_KERNELS(isa, bf16)                                                                                     \
  Kernels {                                                                                                       \
    isa::kColumns, isa::pack_across<bf16>, isa::pack_along<bf16>, isa::stats_band<bf16>,                          \
        isa::gradient_band<false, bf16>, isa::gradient_band<true, bf16>, (bf16) ? 2 : 1                           \
  }

Kernels kernels_for(const Pairs& pairs, Isa isa) {
#if defined(__x86_64__)
  isa = std::min(isa, best_isa());
  if (isa == Isa::avx512_bf16 && pairs.x.type == Element::bf16 &&
      (pairs.t.type == Element::bf16 || pairs.t.type == Element::int8))
    return LF_KERNELS(avx512_bf16, true);
  if (isa >= Isa::avx512) return LF_KERNELS(avx512, false);
  if (isa == Isa::avx2) return LF_KERNELS(avx2, false);
#endif
  return LF_KERNELS(scalar, false);
}

Scratch pack_across(const Kernels& kernels, const Rows& rows, int64_t dim, int64_t words, int threads) {
  const int64_t panels = ceil_div(rows.count, kernels.columns);
  Scratch out = scratch_floats(panels * kernels.columns * words);
  parallel(panels, threads, Packing{&rows, dim, words, out.get()}, kernels.pack_across);
  return out;
}

Scratch pack_along(const Kernels& kernels, const Rows& rows, int64_t dim, int64_t words, int threads) {
  Scratch out = scratch_floats(rounded_up(dim, kernels.columns) * words);
  parallel(ceil_div(words, 64), threads, Packing{&rows, dim, words, out.get()}, kernels.pack_along);
  return out;
}

void run_gradient(const Kernels& kernels, const Pairs& pairs, const Gradient& gradient, GradientPass pass, int threads,
                  void (*task)(const GradientPass&, int64_t, int)) {
  const bool text = gradient.of_text;
  pass.target = text ? &pairs.t : &pairs.x;
  pass.summed = text ? &pairs.x : &pairs.t;
  pass.dim = pairs.dim;
  pass.scale = pairs.scale;
  pass.bias = pairs.bias;
  pass.kept = gradient.kept;
  pass.kept_stride = gradient.kept ? gradient.kept_stride : pass.kept_stride;
  pass.transposed = text && gradient.kept;
  pass.out = gradient.out;
  pass.out_type = gradient.out_type;
  pass.add = text;
  pass.factor = gradient.factor;
  // The rows of tiles are images, except in a text gradient that recomputes the scores.
  const bool texts_are_rows = text && !gradient.kept;
  pass.offset = texts_are_rows ? -pairs.offset : pairs.offset;
  const Scratch a = padded(pairs.x.scales, pairs.x.count, 1, 0), q = padded(pairs.t.scales, pairs.t.count, 1, 0);
  pass.row_scale = texts_are_rows ? q.get() : a.get();
  pass.column_scale = texts_are_rows ? a.get() : q.get();
  pass.target_scale = text ? q.get() : a.get();
  pass.summed_scale = text ? a.get() : q.get();
  pass.positive_offset = text ? -pairs.offset : pairs.offset;
  pass.positive_by_summed = text;
  Softmax& softmax = pass.softmax;
  Scratch states[4];
  if (softmax.row_max) {
    const float** all[] = {&softmax.row_max, &softmax.row_sum, &softmax.col_max, &softmax.col_sum};
    for (int i = 0; i < 4; ++i) {
      states[i] = padded(*all[i], i < 2 ? pairs.x.count : pairs.t.count, 0, 1);
      *all[i] = states[i].get();
    }
    if (texts_are_rows) {
      std::swap(softmax.row_max, softmax.col_max);
      std::swap(softmax.row_sum, softmax.col_sum);
      std::swap(softmax.row_weight, softmax.col_weight);
    }
  }
  pass.words = ceil_div(pairs.dim, kernels.per_word);
  pass.lda = pass.words + 16;
  pass.along_words = ceil_div(pass.summed->count, kernels.per_word);
  Scratch packed, along;
  if (!gradient.kept) packed = pack_across(kernels, *pass.summed, pairs.dim, pass.words, threads);
  if (gradient.out) along = pack_along(kernels, *pass.summed, pairs.dim, pass.along_words, threads);
  pass.packed = packed.get();
  pass.along = along.get();
  pass.band_rows = band_rows_of(pass.target->count, threads);
  const int64_t bands = ceil_div(pass.target->count, pass.band_rows);
  const int64_t g_and_sums = kTileRows * (kGradientRow + rounded_up(pairs.dim, kernels.columns));
  const int64_t scores = gradient.kept ? 0 : kTileRows * (pass.lda + kTileColumns);
  pass.scratch_stride = g_and_sums + 2 * kTileSide + pairs.dim + scores + 64;
  const Scratch scratch = scratch_floats(pass.scratch_stride * std::min<int64_t>(threads, bands));
  pass.scratch = scratch.get();
  parallel(bands, threads, pass, task);
}

}  // namespace

void stats_cpu(const Pairs& pairs, const Stats& stats, int threads, Isa isa) {
  const Kernels kernels = kernels_for(pairs, isa);
  threads = std::max(threads, 1);
  StatsPass pass{};
  pass.x = &pairs.x;
  pass.stats = &stats;
  pass.dim = pairs.dim;
  pass.columns = pairs.t.count;
  pass.offset = pairs.offset;
  pass.scale = pairs.scale;
  pass.words = ceil_div(pairs.dim, kernels.per_word);
  pass.lda = pass.words + 16;
  pass.band_rows = band_rows_of(pairs.x.count, threads);
  const Scratch a = padded(pairs.x.scales, pairs.x.count, 1, 0), q = padded(pairs.t.scales, pairs.t.count, 1, 0);
  const Scratch bias = padded(nullptr, pairs.t.count, pairs.bias, -INFINITY);
  pass.row_scale = a.get();
  pass.column_scale = q.get();
  pass.column_bias = bias.get();
  const Scratch packed = pack_across(kernels, pairs.t, pairs.dim, pass.words, threads);
  pass.packed = packed.get();
  const int64_t bands = ceil_div(pairs.x.count, pass.band_rows);
  const int64_t workers = std::min<int64_t>(threads, bands);
  pass.scratch_stride = kTileRows * (pass.lda + kTileColumns + 4) + 3 * kTileColumns + 64;
  const Scratch scratch = scratch_floats(pass.scratch_stride * workers);
  pass.scratch = scratch.get();
  pass.column_stride = rounded_up(pairs.t.count, 64);
  const Scratch states = scratch_floats(workers * 3 * pass.column_stride);
  pass.column_state = states.get();
  for (int64_t worker = 0; worker < workers; ++worker) {
    float* state = states.get() + worker * 3 * pass.column_stride;
    std::fill(state, state + pass.column_stride, -INFINITY);
    std::fill(state + pass.column_stride, state + 3 * pass.column_stride, 0.f);
  }
  parallel(bands, threads, pass, kernels.stats, true);
  for (int64_t worker = 0; worker < workers; ++worker) {
    const float *max = states.get() + worker * 3 * pass.column_stride, *l = max + pass.column_stride;
    const float* w = l + pass.column_stride;
    for (int64_t j = 0; j < pairs.t.count; ++j)
      if (l[j] != 0) merge(stats.col + j, stats.col_stride, max[j], l[j], w[j]);  // 0: this worker saw no pair of it
  }
}

void softmax_gradient_cpu(const Pairs& pairs, const Softmax& softmax, const Gradient& side, int threads, Isa isa) {
  const Kernels kernels = kernels_for(pairs, isa);
  GradientPass pass{};
  pass.softmax = softmax;
  run_gradient(kernels, pairs, side, pass, std::max(threads, 1), kernels.softmax);
}

void sigmoid_cpu(const Pairs& pairs, const Sigmoid& sigmoid, const Gradient& side, float* keep, int64_t keep_stride,
                 int threads, Isa isa) {
  const Kernels kernels = kernels_for(pairs, isa);
  GradientPass pass{};
  pass.sigmoid = sigmoid;
  pass.keep = keep;
  pass.kept_stride = keep_stride;
  run_gradient(kernels, pairs, side, pass, std::max(threads, 1), kernels.sigmoid);
}

}  // namespace lift_fast
