// The losses over all pairs on the CPU, softmax (arXiv 2103.00020, fig. 3) and sigmoid (arXiv 2303.15343, eq. 1), with
// their matrix products: no [rows, rows] tensor is ever needed. Formulas: pairs.h.
//
//   pass 1    for each block of 192 rows (one thread):            A: the block's rows as words, in L2
//               for each 512 columns: for each 256 words of dim:  B: packed panels, once through the cache a block
//                 tile[192, 512] += A B                           6 x 64 sums in registers, 24 products a word
//               tile -> max, sum of exp, sum of exp c, by row and column: one exponential an element
//   pass 2      tile (kept, or made again) -> g, as words;  gradient[192, dim] += g B'
//
// FLOPs: 2 rows columns dim for each of scores, image gradient, text gradient; bytes from memory a block: B once,
// 2 x 192 FLOPs for 4 bytes, so the bound is arithmetic. At dim 512 in bf16 all but the products takes 12 to 16 %.
#include "pairs.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#include "common/floats.h"
#include "common/parallel.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lift_fast {
namespace {

constexpr int kMicroRows = 6;
constexpr int64_t kTileRows = 192, kTileColumns = 512;  // their products take 384 KB of a core's L2
constexpr int64_t kWords = 256;
constexpr int64_t kLine = 8;  // words a prefetched line: 192 rows' micro-tiles fetch the next panel of 256 words
constexpr int64_t kAheadFloats = kWords / kLine * 16;
constexpr int64_t kGradientRow = kTileColumns + 16;  // a power of two apart, a tile's rows would share cache sets
constexpr int64_t kTileSide = kTileColumns + 32;
constexpr int64_t kHeldBytes = 256 << 20;  // of scratch that is kept between calls
constexpr float kSpread = 60;  // e^-60 is far from both float32's least and what a float32 sum still notices

constexpr float kExp2[] = {1.f,
                           0.6931472067028323f,
                           0.2402265092228826f,
                           0.055503272266708814f,
                           0.009618056678584931f,
                           0.001340042817725558f,
                           0.00015461444676459477f};
constexpr float kLog1p[] = {0.9999999946562915f,  -0.49999892648060534f, 0.3332971049886465f,   -0.24951616262414722f,
                            0.19663274255110796f, -0.1526966706883121f,  0.1054362378672801f,   -0.056373612750104135f,
                            0.01954252722123961f, -0.0031760570101959967f};
alignas(64) constexpr float kIota[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

struct Block {
  void* data;
  int64_t bytes;
};

struct Packing {
  const Rows* rows;
  int64_t dim, words;
  float* out;
};

struct StatsPass {
  const Rows* x;
  const Stats* stats;
  int64_t dim, columns, offset, words, lda, block_rows;
  float scale;
  const float *row_scale, *column_scale, *column_bias;  // padded; bias is -inf beyond the last column
  const float* packed;
  float* scratch;
  int64_t scratch_stride;
  float* column_state;  // [workers, 3, column_stride]
  int64_t column_stride;
};

// o: the side that gets a gradient; u: the side that is summed over. "Row" and "column" are those of a tile: o and u,
// unless transposed, where tiles of kept products have u as rows.
struct GradientPass {
  const Rows *o, *u;
  int64_t dim, offset, words, lda, block_rows;
  float scale, bias;
  const float *row_scale, *column_scale, *out_scale, *sum_scale;
  const float *row_max, *row_sum, *col_max, *col_sum;
  float row_weight, col_weight;
  const float* own;  // g of own pairs by image row; row o of the side that gets a gradient belongs to own_offset + o
  int64_t own_offset;
  bool own_by_sum;  // whether the image is on the side that is summed over
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
  float alpha;
  float *loss, *d_scale, *d_bias;
  float* scratch;
  int64_t scratch_stride;
};

struct TileRow {
  float factor, bias, reference, weight, max;
};

struct TileColumns {
  const float *scale, *weight, *max;
  bool any;
};

inline float reference_of(float m) { return m == -INFINITY ? 0.f : m; }

inline void merge(float* state, int64_t stride, float m, float l, float w) {
  const float top = std::max(state[0], m), reference = reference_of(top);
  const float old = std::exp(state[0] - reference), now = std::exp(m - reference);
  state[0] = top;
  state[stride] = state[stride] * old + l * now;
  state[2 * stride] = state[2 * stride] * old + w * now;
}

using Floats = Scratch;

// Not cleared, so that what is not used costs nothing.
Floats floats(int64_t count) { return Scratch(count * static_cast<int64_t>(sizeof(float))); }

Floats padded(const float* from, int64_t count, float missing, float beyond) {
  const int64_t size = count + 2 * kTileSide;
  Floats out = floats(size);
  for (int64_t i = 0; i < count; ++i) out[i] = from ? from[i] : missing;
  std::fill(out.get() + count, out.get() + size, beyond);
  return out;
}

// Blocks of at most kTileRows, as many as a multiple of the threads where there are rows enough.
int64_t block_rows_of(int64_t rows, int threads) {
  int64_t blocks = (rows + kTileRows - 1) / kTileRows;
  blocks = (blocks + threads - 1) / threads * threads;
  const int64_t size = (rows + blocks - 1) / blocks;
  return (size + kMicroRows - 1) / kMicroRows * kMicroRows;
}

#define KERNELS "pairs/pairs_kernels.h"
#include "common/isas.h"

// The loops of one instruction set, for float words and for words of two bf16.
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
    isa::kColumns, isa::pack_across<bf16>, isa::pack_along<bf16>, isa::stats_block<bf16>,                         \
        isa::gradient_block<false, bf16>, isa::gradient_block<true, bf16>, (bf16) ? 2 : 1                         \
  }

Kernels kernels_for(const Pairs& pairs, PairsIsa isa) {
#if defined(__x86_64__)
  isa = std::min(isa, best_pairs_isa());
  if (isa == PairsIsa::avx512_bf16 && pairs.x.type == Element::bf16 &&
      (pairs.t.type == Element::bf16 || pairs.t.type == Element::i8))
    return LF_KERNELS(avx512_bf16, true);
  if (isa >= PairsIsa::avx512) return LF_KERNELS(avx512, false);
  if (isa == PairsIsa::avx2) return LF_KERNELS(avx2, false);
#endif
  return LF_KERNELS(scalar, false);
}

int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

Floats pack_across(const Kernels& kernels, const Rows& rows, int64_t dim, int64_t words, int threads) {
  const int64_t panels = rounded_up(rows.count, kernels.columns) / kernels.columns;
  Floats out = floats(panels * kernels.columns * words);
  parallel(panels, threads, Packing{&rows, dim, words, out.get()}, kernels.pack_across);
  return out;
}

Floats pack_along(const Kernels& kernels, const Rows& rows, int64_t dim, int64_t words, int threads) {
  Floats out = floats(rounded_up(dim, kernels.columns) * words);
  parallel((words + 63) / 64, threads, Packing{&rows, dim, words, out.get()}, kernels.pack_along);
  return out;
}

void gradient(const Kernels& kernels, const Pairs& pairs, const Gradient& gradient, GradientPass pass, int threads,
              void (*task)(const GradientPass&, int64_t, int)) {
  const bool text = gradient.of_text;
  pass.o = text ? &pairs.t : &pairs.x;
  pass.u = text ? &pairs.x : &pairs.t;
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
  // Tiles have images as rows, but for a text's gradient from scores made again.
  const bool turned = text && !gradient.kept;
  pass.offset = turned ? -pairs.offset : pairs.offset;
  const Floats a = padded(pairs.x.scales, pairs.x.count, 1, 0), q = padded(pairs.t.scales, pairs.t.count, 1, 0);
  pass.row_scale = turned ? q.get() : a.get();
  pass.column_scale = turned ? a.get() : q.get();
  pass.out_scale = text ? q.get() : a.get();
  pass.sum_scale = text ? a.get() : q.get();
  pass.own_offset = text ? -pairs.offset : pairs.offset;
  pass.own_by_sum = text;
  Floats states[4];
  if (pass.row_max) {
    const float** all[] = {&pass.row_max, &pass.row_sum, &pass.col_max, &pass.col_sum};
    for (int i = 0; i < 4; ++i) {
      states[i] = padded(*all[i], i < 2 ? pairs.x.count : pairs.t.count, 0, 1);
      *all[i] = states[i].get();
    }
    if (turned) {
      std::swap(pass.row_max, pass.col_max);
      std::swap(pass.row_sum, pass.col_sum);
      std::swap(pass.row_weight, pass.col_weight);
    }
  }
  pass.words = (pairs.dim + kernels.per_word - 1) / kernels.per_word;
  pass.lda = pass.words + 16;
  pass.along_words = (pass.u->count + kernels.per_word - 1) / kernels.per_word;
  Floats packed, along;
  if (!gradient.kept) packed = pack_across(kernels, *pass.u, pairs.dim, pass.words, threads);
  if (gradient.out) along = pack_along(kernels, *pass.u, pairs.dim, pass.along_words, threads);
  pass.packed = packed.get();
  pass.along = along.get();
  pass.block_rows = block_rows_of(pass.o->count, threads);
  const int64_t blocks = (pass.o->count + pass.block_rows - 1) / pass.block_rows;
  const int64_t own = kTileRows * (kGradientRow + rounded_up(pairs.dim, kernels.columns)) + 2 * kTileSide + pairs.dim;
  pass.scratch_stride = own + (gradient.kept ? 0 : kTileRows * (pass.lda + kTileColumns)) + 64;
  const Floats scratch = floats(pass.scratch_stride * std::min<int64_t>(threads, blocks));
  pass.scratch = scratch.get();
  parallel(blocks, threads, pass, task);
}

// Memory given back, for the next call: fresh pages cost 0.3 ms a megabyte, as much as the work at dim 512.
class Pool {
 public:
  Pool() { blocks_.reserve(kBlocks); }  // giving back never allocates under the lock

  Block take(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = blocks_.end();
    for (auto i = blocks_.begin(); i != blocks_.end(); ++i)
      if (i->bytes >= bytes && i->bytes <= 2 * bytes && (best == blocks_.end() || i->bytes < best->bytes)) best = i;
    if (best == blocks_.end()) return {nullptr, 0};
    const Block found = *best;
    blocks_.erase(best);
    held_ -= found.bytes;
    return found;
  }

  void give(Block block) {
    std::vector<Block> out;
    out.reserve(kBlocks + 1);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (blocks_.size() == kBlocks) drop(out);
      blocks_.push_back(block);
      held_ += block.bytes;
      while (held_ > kHeldBytes) drop(out);
    }
    for (const Block& old : out) std::free(old.data);
  }

  void release() {
    std::vector<Block> out;
    out.reserve(kBlocks);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (!blocks_.empty()) drop(out);
    }
    for (const Block& old : out) std::free(old.data);
  }

 private:
  static constexpr size_t kBlocks = 64;

  void drop(std::vector<Block>& out) {  // the oldest, to be freed when the lock is open again
    out.push_back(blocks_.front());
    held_ -= blocks_.front().bytes;
    blocks_.erase(blocks_.begin());
  }

  std::mutex mutex_;
  std::vector<Block> blocks_;
  int64_t held_ = 0;
};

Pool& pool() {
  static auto* const only = new Pool;  // never destroyed: threads may outlive static objects
  return *only;
}

}  // namespace

Scratch::Scratch(int64_t bytes) : bytes_(std::max<int64_t>(bytes, 1)) {
  bytes_ = (bytes_ + 4095) / 4096 * 4096;
  const Block block = pool().take(bytes_);
  if (block.data) {
    data_ = block.data;
    bytes_ = block.bytes;
  } else {
    data_ = std::aligned_alloc(4096, bytes_);
    if (!data_) throw std::bad_alloc();
  }
}

Scratch::~Scratch() {
  if (data_) pool().give({data_, bytes_});
}

void release_scratch() { pool().release(); }

PairsIsa best_pairs_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return __builtin_cpu_supports("avx512bf16") ? PairsIsa::avx512_bf16 : PairsIsa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return PairsIsa::avx2;
#endif
  return PairsIsa::scalar;
}

void stats_cpu(const Pairs& pairs, const Stats& stats, int threads, PairsIsa isa) {
  const Kernels kernels = kernels_for(pairs, isa);
  threads = std::max(threads, 1);
  StatsPass pass{};
  pass.x = &pairs.x;
  pass.stats = &stats;
  pass.dim = pairs.dim;
  pass.columns = pairs.t.count;
  pass.offset = pairs.offset;
  pass.scale = pairs.scale;
  pass.words = (pairs.dim + kernels.per_word - 1) / kernels.per_word;
  pass.lda = pass.words + 16;
  pass.block_rows = block_rows_of(pairs.x.count, threads);
  const Floats a = padded(pairs.x.scales, pairs.x.count, 1, 0), q = padded(pairs.t.scales, pairs.t.count, 1, 0);
  const Floats bias = padded(nullptr, pairs.t.count, pairs.bias, -INFINITY);
  pass.row_scale = a.get();
  pass.column_scale = q.get();
  pass.column_bias = bias.get();
  const Floats packed = pack_across(kernels, pairs.t, pairs.dim, pass.words, threads);
  pass.packed = packed.get();
  const int64_t blocks = (pairs.x.count + pass.block_rows - 1) / pass.block_rows;
  const int64_t workers = std::min<int64_t>(threads, blocks);
  pass.scratch_stride = kTileRows * (pass.lda + kTileColumns + 4) + 3 * kTileColumns + 64;
  const Floats scratch = floats(pass.scratch_stride * workers);
  pass.scratch = scratch.get();
  pass.column_stride = rounded_up(pairs.t.count, 64);
  const Floats state = floats(workers * 3 * pass.column_stride);
  pass.column_state = state.get();
  for (int64_t worker = 0; worker < workers; ++worker) {
    float* own = state.get() + worker * 3 * pass.column_stride;
    std::fill(own, own + pass.column_stride, -INFINITY);
    std::fill(own + pass.column_stride, own + 3 * pass.column_stride, 0.f);
  }
  parallel(blocks, threads, pass, kernels.stats, true);
  for (int64_t worker = 0; worker < workers; ++worker) {
    const float* own = state.get() + worker * 3 * pass.column_stride;
    for (int64_t j = 0; j < pairs.t.count; ++j)
      if (own[pass.column_stride + j] != 0)  // else this worker has seen nothing of it
        merge(stats.col + j, stats.col_stride, own[j], own[pass.column_stride + j], own[2 * pass.column_stride + j]);
  }
}

void softmax_gradient_cpu(const Pairs& pairs, const Softmax& softmax, const Gradient& side, int threads, PairsIsa isa) {
  const Kernels kernels = kernels_for(pairs, isa);
  GradientPass pass{};
  pass.row_max = softmax.row_max;
  pass.row_sum = softmax.row_sum;
  pass.col_max = softmax.col_max;
  pass.col_sum = softmax.col_sum;
  pass.own = softmax.own;
  pass.row_weight = softmax.row_weight;
  pass.col_weight = softmax.col_weight;
  gradient(kernels, pairs, side, pass, std::max(threads, 1), kernels.softmax);
}

void sigmoid_cpu(const Pairs& pairs, const Sigmoid& sigmoid, const Gradient& side, float* keep, int64_t keep_stride,
                 int threads, PairsIsa isa) {
  const Kernels kernels = kernels_for(pairs, isa);
  GradientPass pass{};
  pass.alpha = sigmoid.alpha;
  pass.loss = sigmoid.loss;
  pass.d_scale = sigmoid.d_scale;
  pass.d_bias = sigmoid.d_bias;
  pass.keep = keep;
  pass.kept_stride = keep_stride;
  gradient(kernels, pairs, side, pass, std::max(threads, 1), kernels.sigmoid);
}

}  // namespace lift_fast
