// The loops of attention.cpp over words (words.h), for every instruction set; see isas.h. A micro-tile reads A where it
// lies, and B packed: "across", in panels [word of dim][tokens], if its columns are tokens and the sum is over dim;
// "along", [word of tokens][dim], if the sum is over tokens.
#include "common/words.h"

// e^x to 1e-7 of itself for -86 < x < 88; below that e^-86, which is negligible against a row's largest. A NaN stays
// one. 2^n 2^f with |f| <= 1/2, and log2(e) in two parts.
INLINE V exp_of(V x) {
  x = x < -86.f ? splat(-86.f) : x;
  const V shifted = x * kLog2e + 12582912.f;  // 1.5 2^23: the low bits are now the nearest integer
  const V f = x * kLog2eRest + (x * kLog2e - (shifted - 12582912.f));
  return exp2_of(shifted, f);
}

// a[m, k] lies at a[m * row + k * step], b's row k at b[k * ldb].
template <bool Bf16, int N>
void micro(int64_t words, const float* a, int64_t row, int64_t step, const float* b, int64_t ldb, float* c,
           int64_t ldc, bool add) {
  V sums[kMicroRows][N];
  load_sums(sums, c, ldc, add);
  for (int64_t k = 0; k < words; ++k) {
    add_word<Bf16>(sums, a, row, b);
    a += step;
    b += ldb;
  }
  store_sums(sums, c, ldc);
}

// Columns in panels of at most VECTORS vectors, as even as possible: 13 vectors are 4, 3, 3 and 3.
struct Panels {
  int64_t vectors, count;
  explicit Panels(int64_t columns)
      : vectors(ceil_div(columns, LANES)), count(ceil_div(vectors, VECTORS)) {}
  int64_t first(int64_t i) const { return (vectors / count * i + std::min(i, vectors % count)) * LANES; }
};

struct OperandA {
  const float* words;
  int64_t row, step;  // word [m, k] is at m * row + k * step
};

struct OperandB {
  const float* words;
  bool across;
  int64_t stride;  // across: words in a column; along: words from one row to the next
};

// c[rows, columns] = a b, or c += a b if `add`. `rows` is a multiple of kMicroRows. Skips panels that begin at
// `columns` or later.
template <bool Bf16>
void multiply(const OperandA& a, const OperandB& b, int64_t rows, int64_t words, const Panels& panels, int64_t columns,
              float* c, int64_t ldc, bool add) {
  for (int64_t k = 0; k < words; k += kWords) {
    const int64_t kn = std::min(kWords, words - k);
    for (int64_t i = 0; i < panels.count; ++i) {
      const int64_t n = panels.first(i), width = panels.first(i + 1) - n;
      if (n >= columns) break;
      const int64_t ldb = b.across ? width : b.stride;
      const float* from = b.words + (b.across ? n * b.stride : n) + k * ldb;
      for (int64_t m = 0; m < rows; m += kMicroRows) {
        const float* am = a.words + m * a.row + k * a.step;
        float* to = c + m * ldc + n;
        const bool more = add || k > 0;
        if (width == LANES) micro<Bf16, 1>(kn, am, a.row, a.step, from, ldb, to, ldc, more);
        else if (width == 2 * LANES) micro<Bf16, 2>(kn, am, a.row, a.step, from, ldb, to, ldc, more);
#if VECTORS > 2
        else if (width == 3 * LANES) micro<Bf16, 3>(kn, am, a.row, a.step, from, ldb, to, ldc, more);
        else micro<Bf16, 4>(kn, am, a.row, a.step, from, ldb, to, ldc, more);
#endif
      }
    }
  }
}

// Writes `dim` elements as words, then zeros up to `width` words.
template <bool Bf16>
void row_words(Element type, const void* data, int64_t dim, float* out, int64_t width) {
  if constexpr (Bf16) {
    std::memcpy(out, data, dim * 2);
    std::memset(reinterpret_cast<uint16_t*>(out) + dim, 0, width * 4 - dim * 2);
    return;
  }
  const auto* from = static_cast<const uint16_t*>(data);
  int64_t k = 0;
  if (type == Element::f32) {
    std::memcpy(out, data, dim * 4);
    k = dim;
  } else if (type == Element::bf16) {
    for (; k < dim; ++k) out[k] = float_of(static_cast<uint32_t>(from[k]) << 16);
  } else {
#if LANES == 16
    for (; k + 16 <= dim; k += 16)
      _mm512_storeu_ps(out + k, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k))));
#endif
    for (; k < dim; ++k) out[k] = from_f16(from[k]);
  }
  std::memset(out + k, 0, (width - k) * 4);
}

// Writes `dim` floats times `factor` as `type`.
void store_row(const float* from, float factor, int64_t dim, void* out, Element type) {
  auto* to = static_cast<uint16_t*>(out);
  int64_t k = 0;
  if (type == Element::f32) {
    for (; k < dim; ++k) static_cast<float*>(out)[k] = factor * from[k];
  } else if (type == Element::bf16) {
#if BF16
    for (; k + 16 <= dim; k += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k),
                          (__m256i)_mm512_cvtneps_pbh((__m512)(load(from + k) * factor)));
#endif
    for (; k < dim; ++k) to[k] = to_bf16(factor * from[k]);
  } else {
#if LANES == 16
    for (; k + 16 <= dim; k += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k),
                          _mm512_cvtps_ph((__m512)(load(from + k) * factor), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; k < dim; ++k) to[k] = to_f16(factor * from[k]);
  }
}

#if BF16
// low and high are 32 bf16 each. Word i of `first` is their elements i, word i of `second` their elements 16 + i.
INLINE void interleave(__m512i low, __m512i high, float* first, float* second) {
  const __m512i even = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                        5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(16));
  _mm512_storeu_si512(first, _mm512_permutex2var_epi16(low, even, high));
  if (second) _mm512_storeu_si512(second, _mm512_permutex2var_epi16(low, odd, high));
}
#endif

// The workspace of one task, in its worker's scratch memory; with a null base it only counts the floats.
template <bool Bf16>
struct Workspace {
  static constexpr int64_t kPerWord = Bf16 ? 2 : 1;
  Panels tokens, dims;
  int64_t words;               // of dim
  int64_t row, width, scores;  // from row to row of copied rows, of sums over tokens, and of scores
  float *k_across{}, *k_along{}, *v_across{}, *v_along{};
  float* rows_of_words{};                      // k or v before packing; in float32 these are already packed along
  float *q{}, *q_along{}, *d{}, *d_along{};    // a band of queries, and of d_out
  float *s{}, *dp{}, *s_pairs{}, *dp_pairs{};  // scores [band, tokens]; _pairs: as words of two rows
  float *sums{}, *dk{}, *dv{}, *inverse{};
  int64_t floats = 0;

  Workspace(const AttentionPass& pass, float* base)
      : tokens(pass.job.tokens), dims(pass.job.dim), words(ceil_div(pass.job.dim, kPerWord)) {
    const int64_t n = pass.job.tokens, r = pass.band_rows;
    width = dims.vectors * LANES;
    row = rounded_up(words, LANES);
    // Whole micro-tiles and vectors, and an odd number of cache lines, so that a column's scores lie in many cache
    // sets.
    scores = rounded_up(rounded_up(n, kMicroRows), 2 * LANES) + LANES;
    const int64_t all = rounded_up(n, 2 * LANES);
    const auto take = [&](float*& at, int64_t count) {
      if (base) at = base + floats;
      floats += rounded_up(count, 16);
    };
    take(k_across, words * all);
    take(v_along, Bf16 ? all / 2 * width : all * row);
    if (Bf16) take(rows_of_words, all * row);
    take(q, r * row);
    take(s, r * scores);
    take(sums, r * width);
    take(inverse, r);
    if (!pass.backward) return;
    take(k_along, Bf16 ? all / 2 * width : all * row);
    take(v_across, words * all);
    take(d, r * row);
    take(dp, r * scores);
    take(dk, rounded_up(n, kMicroRows) * width);
    take(dv, rounded_up(n, kMicroRows) * width);
    if (!Bf16) return;
    take(q_along, r / 2 * width);
    take(d_along, r / 2 * width);
    take(s_pairs, r / 2 * scores);
    take(dp_pairs, r / 2 * scores);
  }
};

// Writes rows, `stride` elements apart, as words, then zero rows up to `even`.
template <bool Bf16>
void copy_rows(const AttentionPass& pass, const char* data, int64_t stride, int64_t rows, int64_t even, float* out,
               int64_t ldo) {
  const int64_t bytes = bytes_of(pass.job.type), size = pass.job.dim * bytes;
  stride *= bytes;
  for (int64_t r = 0; r < rows; ++r) {
    if (r + kAhead < rows)
      for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(data + (r + kAhead) * stride + i);
    row_words<Bf16>(pass.job.type, data + r * stride, pass.job.dim, out + r * ldo, ldo);
  }
  if (even > rows) std::memset(out + rows * ldo, 0, (even - rows) * ldo * sizeof *out);
}

// Rows of words -> [word of dim][rows], a panel at a time. What lies beyond the last row is transposed too, but unused.
void pack_across(const float* rows, int64_t row, int64_t words, const Panels& panels, float* out) {
  for (int64_t i = 0; i < panels.count; ++i) {
    const int64_t first = panels.first(i), width = panels.first(i + 1) - first;
    for (int64_t c = 0; c < width; c += LANES)
      for (int64_t k = 0; k < words; k += LANES)
        transpose(rows + (first + c) * row + k, row, out + first * words + k * width + c, width,
             std::min<int64_t>(LANES, words - k));
  }
}

// Rows of words of two elements -> words of two rows. If `count` is odd, a zero row follows the last one.
template <bool Bf16>
void pack_along([[maybe_unused]] const float* rows, [[maybe_unused]] int64_t row, [[maybe_unused]] int64_t count,
                [[maybe_unused]] int64_t width, [[maybe_unused]] float* out) {
#if BF16
  if constexpr (Bf16)
    for (int64_t r = 0; r < count; r += 2, out += width)
      for (int64_t d = 0; d < width; d += 32)
        interleave(_mm512_loadu_si512(rows + r * row + d / 2), _mm512_loadu_si512(rows + (r + 1) * row + d / 2),
                   out + d, d + 16 < width ? out + d + 16 : nullptr);
#endif
}

// x where at + lane < valid, else 0.
INLINE V before(int64_t at, int64_t valid, V x) {
  return load(kIota) < static_cast<float>(valid - at) ? x : V{};
}

// ---- Forward ----

// Overwrites a row of products with exp(scale product - most), as words, zero from `valid` to `end`. most: the maximum
// of scale product; total: the sum of the exponentials.
template <bool Bf16>
INLINE void softmax_row(float* s, int64_t valid, int64_t end, float scale, float& most, float& total) {
  const int64_t full = valid / LANES * LANES;
  V top = splat(-INFINITY);
  for (int64_t j = 0; j < full; j += LANES) top = larger(load(s + j) * scale, top);
  most = max_of(top);
  for (int64_t j = full; j < valid; ++j) most = std::max(most, s[j] * scale);
  V sum{};
  const auto exponential = [&](int64_t j) {
    const V e = exp_of(load(s + j) * scale - most);
    const V p = j < full ? e : before(j, valid, e);
    sum += p;
    return p;
  };
  if constexpr (Bf16) {
#if BF16
    for (int64_t j = 0; j < end; j += 32) {
      const V low = exponential(j), high = exponential(j + 16);
      _mm512_storeu_si512(s + j / 2, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
    }
#endif
  } else {
    for (int64_t j = 0; j < end; j += LANES) store(s + j, exponential(j));
  }
  total = sum_of(sum);
}

template <bool Bf16>
void forward_task(const AttentionPass& pass, int64_t task, int worker) {
  constexpr int64_t kPerWord = Bf16 ? 2 : 1;
  const Attention& job = pass.job;
  const Workspace<Bf16> work(pass, pass.scratch + worker * pass.scratch_stride);
  const int64_t head = task / pass.parts, part = task % pass.parts;
  const Head at = head_of(pass, head);
  const int64_t all = rounded_up(job.tokens, 2);
  float* rows = Bf16 ? work.rows_of_words : work.v_along;
  copy_rows<Bf16>(pass, at.k, at.stride, job.tokens, job.tokens, rows, work.row);
  pack_across(rows, work.row, work.words, work.tokens, work.k_across);
  copy_rows<Bf16>(pass, at.v, at.stride, job.tokens, all, rows, work.row);
  pack_along<Bf16>(rows, work.row, job.tokens, work.width, work.v_along);
  for (int64_t band = pass.bands * part / pass.parts; band < pass.bands * (part + 1) / pass.parts; ++band) {
    const int64_t r0 = band * pass.band_rows, count = std::min(pass.band_rows, job.tokens - r0);
    const int64_t even = rounded_up(count, kMicroRows), columns = job.causal ? r0 + count : job.tokens;
    copy_rows<Bf16>(pass, at.q + r0 * at.stride * at.bytes, at.stride, count, even, work.q, work.row);
    multiply<Bf16>({work.q, work.row, 1}, {work.k_across, true, work.words}, even, work.words, work.tokens, columns,
                   work.s, work.scores, false);
    for (int64_t r = 0; r < count; ++r) {
      float most, total;
      softmax_row<Bf16>(work.s + r * work.scores, job.causal ? r0 + r + 1 : job.tokens, columns, job.scale, most,
                        total);
      work.inverse[r] = 1 / total;
      pass.lse_out[head * job.tokens + r0 + r] = most + std::log(total);
    }
    multiply<Bf16>({work.s, work.scores, 1}, {work.v_along, false, work.width}, even,
                   ceil_div(columns, kPerWord), work.dims, job.dim, work.sums, work.width, false);
    for (int64_t r = 0; r < count; ++r)
      store_row(work.sums + r * work.width, work.inverse[r], job.dim, at.out + (r0 + r) * at.out_stride * at.bytes,
                job.type);
  }
}

// ---- Backward ----

// Overwrites a row of products with P = exp(scale product - lse), zero from `valid` to `end`. As lse is rounded, they
// do not sum to exactly 1: inverse = 1 / sum P, delta = sum P dP / sum P.
INLINE void probabilities(float* s, const float* dp, int64_t valid, int64_t end, float scale, float lse, float& inverse,
                          float& delta) {
  const int64_t full = valid / LANES * LANES;
  V sum{}, dot{};
  int64_t j = 0;
  for (; j < full; j += LANES) {
    const V p = exp_of(load(s + j) * scale - lse);
    store(s + j, p);
    sum += p;
    dot += p * load(dp + j);
  }
  for (; j < end; j += LANES) {
    const V p = before(j, valid, exp_of(load(s + j) * scale - lse));
    store(s + j, p);
    sum += p;
    dot += before(j, valid, p * load(dp + j));
  }
  inverse = 1 / sum_of(sum);
  delta = sum_of(dot) * inverse;
}

// Overwrites one row of s and dp with P and dS = P (dP - delta).
INLINE void gradient_row(float* s, float* dp, int64_t valid, int64_t end, float inverse, float delta) {
  for (int64_t j = 0; j < end; j += LANES) {
    const V p = load(s + j) * inverse, ds = p * (load(dp + j) - delta);
    store(s + j, p);
    store(dp + j, j + LANES <= valid ? ds : before(j, valid, ds));
  }
}

#if BF16
// The same for two rows: in place as words of two columns, and in s_pairs and dp_pairs as words of the two rows.
INLINE void gradient_rows(float* s, float* dp, int64_t row, const int64_t* valid, int64_t end, const float* inverse,
                          const float* delta, float* s_pairs, float* dp_pairs) {
  for (int64_t j = 0; j < end; j += 32) {
    __m512i ps[2], ds[2];
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      V p[2], d[2];
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int64_t at = j + 16 * half;
        const V products = load(s + r * row + at) * inverse[r], d_products = load(dp + r * row + at);
        p[half] = at + 16 <= valid[r] ? products : before(at, valid[r], products);
        d[half] = products * (d_products - delta[r]);
        if (at + 16 > valid[r]) d[half] = before(at, valid[r], d[half]);
      }
      ps[r] = (__m512i)_mm512_cvtne2ps_pbh((__m512)p[1], (__m512)p[0]);
      ds[r] = (__m512i)_mm512_cvtne2ps_pbh((__m512)d[1], (__m512)d[0]);
      _mm512_storeu_si512(s + r * row + j / 2, ps[r]);
      _mm512_storeu_si512(dp + r * row + j / 2, ds[r]);
    }
    interleave(ps[0], ps[1], s_pairs + j, s_pairs + j + 16);
    interleave(ds[0], ds[1], dp_pairs + j, dp_pairs + j + 16);
  }
}
#endif

template <bool Bf16>
void backward_task(const AttentionPass& pass, int64_t head, int worker) {
  constexpr int64_t kPerWord = Bf16 ? 2 : 1;
  const Attention& job = pass.job;
  const Workspace<Bf16> work(pass, pass.scratch + worker * pass.scratch_stride);
  const Head at = head_of(pass, head);
  const int64_t all = rounded_up(job.tokens, 2);
  for (const bool of_v : {false, true}) {
    float* along = of_v ? work.v_along : work.k_along;
    float* rows = Bf16 ? work.rows_of_words : along;
    copy_rows<Bf16>(pass, of_v ? at.v : at.k, at.stride, job.tokens, all, rows, work.row);
    pack_across(rows, work.row, work.words, work.tokens, of_v ? work.v_across : work.k_across);
    pack_along<Bf16>(rows, work.row, job.tokens, work.width, along);
  }
  const OperandA p{work.s, work.scores, 1}, ds{work.dp, work.scores, 1};
  const OperandA p_transposed{Bf16 ? work.s_pairs : work.s, 1, work.scores};
  const OperandA ds_transposed{Bf16 ? work.dp_pairs : work.dp, 1, work.scores};
  std::memset(work.dk, 0, rounded_up(job.tokens, kMicroRows) * work.width * sizeof(float));
  std::memset(work.dv, 0, rounded_up(job.tokens, kMicroRows) * work.width * sizeof(float));
  for (int64_t band = 0; band < pass.bands; ++band) {
    const int64_t r0 = band * pass.band_rows, count = std::min(pass.band_rows, job.tokens - r0);
    const int64_t even = rounded_up(count, kMicroRows), columns = job.causal ? r0 + count : job.tokens;
    const int64_t tile_rows = rounded_up(columns, kMicroRows), end = rounded_up(tile_rows, LANES);
    copy_rows<Bf16>(pass, at.q + r0 * at.stride * at.bytes, at.stride, count, even, work.q, work.row);
    copy_rows<Bf16>(pass, at.d_out + r0 * at.out_stride * at.bytes, at.out_stride, count, even, work.d, work.row);
    pack_along<Bf16>(work.q, work.row, count, work.width, work.q_along);
    pack_along<Bf16>(work.d, work.row, count, work.width, work.d_along);
    multiply<Bf16>({work.q, work.row, 1}, {work.k_across, true, work.words}, even, work.words, work.tokens, columns,
                   work.s, work.scores, false);
    multiply<Bf16>({work.d, work.row, 1}, {work.v_across, true, work.words}, even, work.words, work.tokens, columns,
                   work.dp, work.scores, false);
    for (int64_t r = 0; r < count; r += kPerWord) {
      float *s = work.s + r * work.scores, *dp = work.dp + r * work.scores;
      float inverse[2] = {}, delta[2] = {};
      int64_t valid[2] = {};
      for (int64_t i = 0; i < std::min(kPerWord, count - r); ++i) {
        valid[i] = job.causal ? r0 + r + i + 1 : job.tokens;
        probabilities(s + i * work.scores, dp + i * work.scores, valid[i], end, job.scale,
                      pass.lse[head * job.tokens + r0 + r + i], inverse[i], delta[i]);
      }
#if BF16
      if constexpr (Bf16)
        gradient_rows(s, dp, work.scores, valid, end, inverse, delta, work.s_pairs + r / 2 * work.scores,
                      work.dp_pairs + r / 2 * work.scores);
#endif
      if constexpr (!Bf16) gradient_row(s, dp, valid[0], end, inverse[0], delta[0]);
    }
    const int64_t key_words = ceil_div(columns, kPerWord), query_words = ceil_div(count, kPerWord);
    if (at.out) {
      multiply<Bf16>(p, {work.v_along, false, work.width}, even, key_words, work.dims, job.dim, work.sums,
                     work.width, false);
      for (int64_t r = 0; r < count; ++r)
        store_row(work.sums + r * work.width, 1, job.dim, at.out + (r0 + r) * at.out_stride * at.bytes, job.type);
    }
    multiply<Bf16>(ds, {work.k_along, false, work.width}, even, key_words, work.dims, job.dim, work.sums, work.width,
                   false);
    for (int64_t r = 0; r < count; ++r)
      store_row(work.sums + r * work.width, job.scale, job.dim, at.dq + (r0 + r) * at.stride * at.bytes, job.type);
    multiply<Bf16>(p_transposed, {Bf16 ? work.d_along : work.d, false, work.width}, tile_rows, query_words, work.dims,
                   job.dim, work.dv, work.width, true);
    multiply<Bf16>(ds_transposed, {Bf16 ? work.q_along : work.q, false, work.width}, tile_rows, query_words, work.dims,
                   job.dim, work.dk, work.width, true);
  }
  for (int64_t r = 0; r < job.tokens; ++r) {
    store_row(work.dk + r * work.width, job.scale, job.dim, at.dk + r * at.stride * at.bytes, job.type);
    store_row(work.dv + r * work.width, 1, job.dim, at.dv + r * at.stride * at.bytes, job.type);
  }
}

template <bool Bf16>
int64_t workspace_floats(const AttentionPass& pass) {
  return Workspace<Bf16>(pass, nullptr).floats;
}
