// The loops of attention.cpp over words (words.h), for every instruction set: see isas.h. Of a micro-tile, A is read
// where it lies, a broadcast a word. Where B's columns are tokens and the sum is over dim it is packed "across", in
// panels [word of dim][tokens]; where the sum is over tokens, "along", [word of tokens][dim].
#include "common/words.h"

// e^x to 1e-7 of itself for -86 < x < 88, below that e^-86, which is nothing beside the largest of a row; a NaN stays
// one. 2^n 2^f, |f| <= 1/2, with log2(e) in two parts.
INLINE V exp_of(V x) {
  x = x < -86.f ? splat(-86.f) : x;
  const V shifted = x * kLog2e + 12582912.f;  // 1.5 * 2^23: the nearest integer is in the low bits now
  const V f = x * kLog2eRest + (x * kLog2e - (shifted - 12582912.f));
  V p = f * kExp2[6] + kExp2[5];
  for (int k = 4; k >= 0; --k) p = p * f + kExp2[k];
  return p * (V)(((I)shifted + 127) << 23);
}

// a[m, k] lies at a[m * row + k * step], b's row k at b[k * ldb].
template <bool Bf16, int N>
void micro(int64_t words, const float* a, int64_t row, int64_t step, const float* b, int64_t ldb, float* c,
           int64_t ldc, bool add) {
  V sums[kMicroRows][N];
#pragma GCC unroll 8
  for (int m = 0; m < kMicroRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) sums[m][v] = add ? load(c + m * ldc + v * LANES) : V{};
  for (int64_t k = 0; k < words; ++k) {
    V bs[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) bs[v] = load(b + v * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < kMicroRows; ++m) {
      const float am = a[m * row];
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) sums[m][v] = multiply_add<Bf16>(am, bs[v], sums[m][v]);
    }
    a += step;
    b += ldb;
  }
#pragma GCC unroll 8
  for (int m = 0; m < kMicroRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) store(c + m * ldc + v * LANES, sums[m][v]);
}

// Columns in panels of at most VECTORS vectors, as even as can be: 13 vectors are 4, 3, 3 and 3.
struct Panels {
  int64_t vectors, count;
  explicit Panels(int64_t columns)
      : vectors((columns + LANES - 1) / LANES), count((vectors + VECTORS - 1) / VECTORS) {}
  int64_t first(int64_t i) const { return (vectors / count * i + std::min(i, vectors % count)) * LANES; }
};

struct Left {
  const float* words;
  int64_t row, step;  // word [m, k] is at m * row + k * step
};

struct Right {
  const float* words;
  bool across;
  int64_t stride;  // across: words of a column; along: from one word's row to the next's
};

// c[rows, columns] = a b, or += where `add`; rows are whole micro-tiles. Panels that begin at `columns` are left out.
template <bool Bf16>
void multiply(const Left& a, const Right& b, int64_t rows, int64_t words, const Panels& panels, int64_t columns,
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

// `dim` elements as words, zero up to `width` words.
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

// `dim` floats times `factor`, as `type`.
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
// 32 bf16 each: word i of `first` is low's and high's element i, of `second` their element 16 + i.
INLINE void interleave(__m512i low, __m512i high, float* first, float* second) {
  const __m512i even = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                        5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(16));
  _mm512_storeu_si512(first, _mm512_permutex2var_epi16(low, even, high));
  if (second) _mm512_storeu_si512(second, _mm512_permutex2var_epi16(low, odd, high));
}
#endif

// What one task reads and writes beside the tensors, in its worker's scratch. `rows`: of a block of queries.
template <bool Bf16>
struct Room {
  static constexpr int64_t kPerWord = Bf16 ? 2 : 1;
  Panels tokens, dims;
  int64_t words, row, width, scores;  // words of dim; words from row to row of rows, of sums over tokens, of scores
  float *k_across{}, *k_along{}, *v_across{}, *v_along{};
  float* turned{};                                     // rows of words on their way to both; in float32 they are along
  float *q{}, *q_along{}, *d{}, *d_along{};            // a block of queries, and of d_out
  float *s{}, *dp{}, *s_pairs{}, *dp_pairs{};          // [rows, tokens]; as words of two rows
  float *sums{}, *dk{}, *dv{}, *state{};
  int64_t floats = 0;

  Room(const AttentionPass& pass, float* base)
      : tokens(pass.job.tokens), dims(pass.job.dim), words((pass.job.dim + kPerWord - 1) / kPerWord) {
    const int64_t n = pass.job.tokens, r = pass.block_rows;
    width = dims.vectors * LANES;
    row = rounded_up(words, LANES);
    // Of whole micro-tiles and whole vectors, and an odd number of cache lines: a column's scores lie in many sets.
    scores = rounded_up(rounded_up(n, kMicroRows), 2 * LANES) + LANES;
    const int64_t all = rounded_up(n, 2 * LANES);
    const auto take = [&](float*& at, int64_t count) {
      if (base) at = base + floats;
      floats += rounded_up(count, 16);
    };
    take(k_across, words * all);
    take(v_along, Bf16 ? all / 2 * width : all * row);
    if (Bf16) take(turned, all * row);
    take(q, r * row);
    take(s, r * scores);
    take(sums, r * width);
    take(state, r);
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

// Rows `stride` elements apart as words, and zero rows up to `even`.
template <bool Bf16>
void block_words(const AttentionPass& pass, const char* data, int64_t stride, int64_t rows, int64_t even, float* out,
                 int64_t ldo) {
  const int64_t bytes = pass.job.type == Element::f32 ? 4 : 2, size = pass.job.dim * bytes;
  stride *= bytes;
  for (int64_t r = 0; r < rows; ++r) {
    if (r + kAhead < rows)
      for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(data + (r + kAhead) * stride + i);
    row_words<Bf16>(pass.job.type, data + r * stride, pass.job.dim, out + r * ldo, ldo);
  }
  if (even > rows) std::memset(out + rows * ldo, 0, (even - rows) * ldo * sizeof *out);
}

// Rows of words -> [word of dim][rows], a panel at a time. What lies beyond the last row is turned too, and not used.
void pack_across(const float* rows, int64_t row, int64_t words, const Panels& panels, float* out) {
  for (int64_t i = 0; i < panels.count; ++i) {
    const int64_t first = panels.first(i), width = panels.first(i + 1) - first;
    for (int64_t c = 0; c < width; c += LANES)
      for (int64_t k = 0; k < words; k += LANES)
        turn(rows + (first + c) * row + k, row, out + first * words + k * width + c, width,
             std::min<int64_t>(LANES, words - k));
  }
}

// Rows of words of two elements -> words of two rows. `count` rows, after which there is a zero row if it is odd.
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

INLINE V before(int64_t at, int64_t valid, V x) {
  return load(kIota) < static_cast<float>(valid - at) ? x : V{};
}

// ---- Forward ----

// A row of products -> exp(scale product - max) in its place, as words; zero from `valid` to `end`. The max, the sum.
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
  const Room<Bf16> room(pass, pass.scratch + worker * pass.scratch_stride);
  const int64_t head = task / pass.parts, part = task % pass.parts;
  const Head at = head_of(pass, head);
  const int64_t all = rounded_up(job.tokens, 2);
  float* rows = Bf16 ? room.turned : room.v_along;
  block_words<Bf16>(pass, at.k, at.stride, job.tokens, job.tokens, rows, room.row);
  pack_across(rows, room.row, room.words, room.tokens, room.k_across);
  block_words<Bf16>(pass, at.v, at.stride, job.tokens, all, rows, room.row);
  pack_along<Bf16>(rows, room.row, job.tokens, room.width, room.v_along);
  for (int64_t block = pass.blocks * part / pass.parts; block < pass.blocks * (part + 1) / pass.parts; ++block) {
    const int64_t r0 = block * pass.block_rows, count = std::min(pass.block_rows, job.tokens - r0);
    const int64_t even = rounded_up(count, kMicroRows), columns = job.causal ? r0 + count : job.tokens;
    block_words<Bf16>(pass, at.q + r0 * at.stride * at.bytes, at.stride, count, even, room.q, room.row);
    multiply<Bf16>({room.q, room.row, 1}, {room.k_across, true, room.words}, even, room.words, room.tokens, columns,
                   room.s, room.scores, false);
    for (int64_t r = 0; r < count; ++r) {
      float most, total;
      softmax_row<Bf16>(room.s + r * room.scores, job.causal ? r0 + r + 1 : job.tokens, columns, job.scale, most,
                        total);
      room.state[r] = 1 / total;
      pass.lse_out[head * job.tokens + r0 + r] = most + std::log(total);
    }
    multiply<Bf16>({room.s, room.scores, 1}, {room.v_along, false, room.width}, even,
                   (columns + kPerWord - 1) / kPerWord, room.dims, job.dim, room.sums, room.width, false);
    for (int64_t r = 0; r < count; ++r)
      store_row(room.sums + r * room.width, room.state[r], job.dim, at.out + (r0 + r) * at.out_stride * at.bytes,
                job.type);
  }
}

// ---- Backward ----

// A row of products -> exp(scale product - lse) in its place, zero from `valid` to `end`. As lse is rounded, they do
// not sum to 1 exactly: inverse = 1 / sum P, delta = sum P dP / sum P.
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

// P and dS = P (dP - delta) of one row, in place of s and dp.
INLINE void gradient_row(float* s, float* dp, int64_t valid, int64_t end, float inverse, float delta) {
  for (int64_t j = 0; j < end; j += LANES) {
    const V p = load(s + j) * inverse, ds = p * (load(dp + j) - delta);
    store(s + j, p);
    store(dp + j, j + LANES <= valid ? ds : before(j, valid, ds));
  }
}

#if BF16
// The same of two rows, as words of two columns in place, and as words of the two rows.
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
  const Room<Bf16> room(pass, pass.scratch + worker * pass.scratch_stride);
  const Head at = head_of(pass, head);
  const int64_t all = rounded_up(job.tokens, 2);
  for (const bool of_v : {false, true}) {
    float* along = of_v ? room.v_along : room.k_along;
    float* rows = Bf16 ? room.turned : along;
    block_words<Bf16>(pass, of_v ? at.v : at.k, at.stride, job.tokens, all, rows, room.row);
    pack_across(rows, room.row, room.words, room.tokens, of_v ? room.v_across : room.k_across);
    pack_along<Bf16>(rows, room.row, job.tokens, room.width, along);
  }
  const Left p{room.s, room.scores, 1}, ds{room.dp, room.scores, 1};
  const Left p_turned{Bf16 ? room.s_pairs : room.s, 1, room.scores};
  const Left ds_turned{Bf16 ? room.dp_pairs : room.dp, 1, room.scores};
  std::memset(room.dk, 0, rounded_up(job.tokens, kMicroRows) * room.width * sizeof(float));
  std::memset(room.dv, 0, rounded_up(job.tokens, kMicroRows) * room.width * sizeof(float));
  for (int64_t block = 0; block < pass.blocks; ++block) {
    const int64_t r0 = block * pass.block_rows, count = std::min(pass.block_rows, job.tokens - r0);
    const int64_t even = rounded_up(count, kMicroRows), columns = job.causal ? r0 + count : job.tokens;
    const int64_t tiles = rounded_up(columns, kMicroRows), end = rounded_up(tiles, LANES);
    block_words<Bf16>(pass, at.q + r0 * at.stride * at.bytes, at.stride, count, even, room.q, room.row);
    block_words<Bf16>(pass, at.d_out + r0 * at.out_stride * at.bytes, at.out_stride, count, even, room.d, room.row);
    pack_along<Bf16>(room.q, room.row, count, room.width, room.q_along);
    pack_along<Bf16>(room.d, room.row, count, room.width, room.d_along);
    multiply<Bf16>({room.q, room.row, 1}, {room.k_across, true, room.words}, even, room.words, room.tokens, columns,
                   room.s, room.scores, false);
    multiply<Bf16>({room.d, room.row, 1}, {room.v_across, true, room.words}, even, room.words, room.tokens, columns,
                   room.dp, room.scores, false);
    for (int64_t r = 0; r < count; r += kPerWord) {
      float *s = room.s + r * room.scores, *dp = room.dp + r * room.scores;
      float inverse[2] = {}, delta[2] = {};
      int64_t valid[2] = {};
      for (int64_t i = 0; i < std::min(kPerWord, count - r); ++i) {
        valid[i] = job.causal ? r0 + r + i + 1 : job.tokens;
        probabilities(s + i * room.scores, dp + i * room.scores, valid[i], end, job.scale,
                      pass.lse[head * job.tokens + r0 + r + i], inverse[i], delta[i]);
      }
#if BF16
      if constexpr (Bf16)
        gradient_rows(s, dp, room.scores, valid, end, inverse, delta, room.s_pairs + r / 2 * room.scores,
                      room.dp_pairs + r / 2 * room.scores);
#endif
      if constexpr (!Bf16) gradient_row(s, dp, valid[0], end, inverse[0], delta[0]);
    }
    const int64_t column_words = (columns + kPerWord - 1) / kPerWord, row_pairs = (count + kPerWord - 1) / kPerWord;
    if (at.out) {
      multiply<Bf16>(p, {room.v_along, false, room.width}, even, column_words, room.dims, job.dim, room.sums,
                     room.width, false);
      for (int64_t r = 0; r < count; ++r)
        store_row(room.sums + r * room.width, 1, job.dim, at.out + (r0 + r) * at.out_stride * at.bytes, job.type);
    }
    multiply<Bf16>(ds, {room.k_along, false, room.width}, even, column_words, room.dims, job.dim, room.sums, room.width,
                   false);
    for (int64_t r = 0; r < count; ++r)
      store_row(room.sums + r * room.width, job.scale, job.dim, at.dq + (r0 + r) * at.stride * at.bytes, job.type);
    multiply<Bf16>(p_turned, {Bf16 ? room.d_along : room.d, false, room.width}, tiles, row_pairs, room.dims, job.dim,
                   room.dv, room.width, true);
    multiply<Bf16>(ds_turned, {Bf16 ? room.q_along : room.q, false, room.width}, tiles, row_pairs, room.dims, job.dim,
                   room.dk, room.width, true);
  }
  for (int64_t r = 0; r < job.tokens; ++r) {
    store_row(room.dk + r * room.width, job.scale, job.dim, at.dk + r * at.stride * at.bytes, job.type);
    store_row(room.dv + r * room.width, 1, job.dim, at.dv + r * at.stride * at.bytes, job.type);
  }
}

template <bool Bf16>
int64_t room_floats(const AttentionPass& pass) {
  return Room<Bf16>(pass, nullptr).floats;
}
