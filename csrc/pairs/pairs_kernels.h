// The loops of pairs.cpp over words (words.h), for every instruction set; see isas.h. A micro-tile reads A where it
// lies, and B packed in panels [k][columns].
#include "common/words.h"

constexpr int kColumns = LANES * VECTORS;

// reference_of, for a vector.
INLINE V references_of(V m) { return m == -INFINITY ? V{} : m; }

// n floats, then zeros.
INLINE V load_part(const float* p, int64_t n) {
  float part[LANES] = {};
  for (int64_t k = 0; k < n; ++k) part[k] = p[k];
  return load(part);
}

// e^x to 1e-7 (1 + |x|) of itself: 2^n 2^f with |f| <= 1/2. 0 where e^x < 2^-126, at most 2^127; a NaN stays one.
INLINE V exp_of(V x) {
  const V wide = x * 1.44269504088896341f;
  V y = wide < -126.f ? splat(-126.f) : wide;
  y = y > 127.f ? splat(127.f) : y;
  const V shifted = y + 12582912.f;  // 1.5 2^23: the low bits are now the nearest integer
  const V f = y - (shifted - 12582912.f);
  return wide < -126.f ? V{} : exp2_of(shifted, f);
}

// log(1 + e) for 0 <= e <= 1, to 2e-7 of itself.
INLINE V log1p_of(V e) {
  V p = e * kLog1p[9] + kLog1p[8];
  for (int k = 7; k >= 0; --k) p = p * e + kLog1p[k];
  return p * e;
}

// a[m, k] lies at a[m * row + k * step]. For every kLine words it prefetches one line of `ahead` into L2.
template <bool Bf16>
void micro(int64_t words, const float* a, int64_t row, int64_t step, const float* b, float* c, int64_t ldc, bool add,
           const float* ahead) {
  V sums[kMicroRows][VECTORS];
  load_sums(sums, c, ldc, add);
  for (int64_t first = 0; first < words; first += kLine) {
    __builtin_prefetch(ahead, 0, 2);
    ahead += 16;
    const int64_t count = std::min(kLine, words - first);
    for (int64_t k = 0; k < count; ++k) {
      add_word<Bf16>(sums, a, row, b);
      a += step;
      b += kColumns;
    }
  }
  store_sums(sums, c, ldc);
}

// Writes words [first, first + count) of row i, zero beyond dim.
template <bool Bf16>
void row_words(const Rows& rows, int64_t i, int64_t dim, int64_t first, int64_t count, float* out) {
  const int64_t per_word = Bf16 ? 2 : 1, from = first * per_word;
  const int64_t n = std::max<int64_t>(0, std::min(count * per_word, dim - from)), at = i * rows.stride + from;
  if constexpr (Bf16) {
    auto* to = reinterpret_cast<uint16_t*>(out);
    if (rows.type == Element::bf16) {
      std::memcpy(to, static_cast<const uint16_t*>(rows.data) + at, n * sizeof *to);
    } else {  // int8 codes are exact in bf16
      const int8_t* code = static_cast<const int8_t*>(rows.data) + at;
      for (int64_t k = 0; k < n; ++k) to[k] = static_cast<uint16_t>(bits_of(static_cast<float>(code[k])) >> 16);
    }
    std::memset(to + n, 0, (count * 2 - n) * sizeof *to);
  } else {
    if (rows.type == Element::f32) {
      std::memcpy(out, static_cast<const float*>(rows.data) + at, n * sizeof *out);
    } else if (rows.type == Element::bf16) {
      const auto* from16 = static_cast<const uint16_t*>(rows.data) + at;
      for (int64_t k = 0; k < n; ++k) out[k] = float_of(static_cast<uint32_t>(from16[k]) << 16);
    } else if (rows.type == Element::f16) {
      const auto* from16 = static_cast<const uint16_t*>(rows.data) + at;
      for (int64_t k = 0; k < n; ++k) out[k] = from_f16(from16[k]);
    } else {
      const int8_t* code = static_cast<const int8_t*>(rows.data) + at;
      for (int64_t k = 0; k < n; ++k) out[k] = static_cast<float>(code[k]);
    }
    std::memset(out + n, 0, (count - n) * sizeof *out);
  }
}

// Writes rows [first, first + rows) as words, lda apart, then zero rows up to `even`.
template <bool Bf16>
void copy_rows(const Rows& from, int64_t first, int64_t rows, int64_t even, int64_t dim, int64_t words, float* out,
               int64_t lda) {
  for (int64_t r = 0; r < rows; ++r) row_words<Bf16>(from, first + r, dim, 0, words, out + r * lda);
  for (int64_t r = rows; r < even; ++r) std::memset(out + r * lda, 0, words * sizeof *out);
}

// Rows as columns of B, to be summed over dim: [panel of rows][word of dim][row]. A task is one panel.
template <bool Bf16>
void pack_across(const Packing& p, int64_t panel, int) {
  constexpr int64_t kStep = 128;
  alignas(64) float part[kColumns * kStep];
  float* out = p.out + panel * p.words * kColumns;
  for (int64_t k0 = 0; k0 < p.words; k0 += kStep) {
    const int64_t kn = std::min(kStep, p.words - k0);
    for (int64_t c = 0; c < kColumns; ++c) {
      const int64_t row = panel * kColumns + c;
      if (row < p.rows->count)
        row_words<Bf16>(*p.rows, row, p.dim, k0, kn, part + c * kStep);
      else
        std::memset(part + c * kStep, 0, kn * sizeof *part);
    }
    for (int64_t c = 0; c < kColumns; c += LANES)
      for (int64_t k = 0; k < kn; k += LANES)
        transpose(part + c * kStep + k, kStep, out + (k0 + k) * kColumns + c, kColumns,
                  std::min<int64_t>(LANES, kn - k));
  }
}

// Rows as rows of B, to be summed over them: [panel of dim][word of rows][dim]. A task is 64 words.
template <bool Bf16>
void pack_along(const Packing& p, int64_t task, int) {
  const int64_t last = std::min(p.words, (task + 1) * 64), panels = ceil_div(p.dim, kColumns);
  alignas(64) float low[kColumns], high[kColumns];
  for (int64_t panel = 0; panel < panels; ++panel)
    for (int64_t word = task * 64; word < last; ++word) {
      float* out = p.out + (panel * p.words + word) * kColumns;
      if constexpr (Bf16) {
        const bool both = 2 * word + 1 < p.rows->count;
        row_words<true>(*p.rows, 2 * word, p.dim, panel * kColumns / 2, kColumns / 2, low);
        if (both) row_words<true>(*p.rows, 2 * word + 1, p.dim, panel * kColumns / 2, kColumns / 2, high);
        auto *to = reinterpret_cast<uint16_t*>(out), *l = reinterpret_cast<uint16_t*>(low);
        auto* h = reinterpret_cast<uint16_t*>(high);
        for (int c = 0; c < kColumns; ++c) to[2 * c] = l[c], to[2 * c + 1] = both ? h[c] : uint16_t{0};
      } else {
        row_words<false>(*p.rows, word, p.dim, panel * kColumns, kColumns, out);
      }
    }
}

// c [rows, columns] = the products of A's rows with panels of B; c's rows are kTileColumns apart.
template <bool Bf16>
void products(const float* a, int64_t lda, int64_t rows, const float* packed, int64_t words, int64_t columns,
              float* c) {
  for (int64_t k = 0; k < words; k += kWords) {
    const int64_t kn = std::min(kWords, words - k);
    for (int64_t n = 0; n < columns; n += kColumns) {
      const float *panel = packed + n * words + k * kColumns, *ahead = panel + words * kColumns;
      for (int64_t m = 0; m < rows; m += kMicroRows, ahead += kAheadFloats)
        micro<Bf16>(kn, a + m * lda + k, lda, 1, panel, c + m * kTileColumns + n, kTileColumns, k > 0, ahead);
    }
  }
}

// ---- Pass 1: the softmax state of rows and columns ----

// Where a tile's row has its positive: the first column of the vector that holds it, and the lane. -1: not in the tile.
struct Positive {
  int64_t at = -1;
  float lane = 0;
};

INLINE Positive positive_at(int64_t column, int64_t columns) {
  if (column < 0 || column >= columns) return {};
  return {column / LANES * LANES, static_cast<float>(column % LANES)};
}

// v, columns s and on, with `by` in the positive's place.
INLINE V replaced(const Positive& positive, int64_t s, V v, V by) {
  return s == positive.at ? (load(kIota) == positive.lane ? by : v) : v;
}

// Adds one tile, without its positives, to the states of its rows and columns. If the maxima of all its rows and
// columns lie within kSpread of each other, one reference serves them all, and one exponential an element; otherwise it
// takes two.
void stats_tile(const StatsPass& pass, const float* c, int64_t r0, int64_t rows, int64_t s0, int64_t columns,
                float* row_state, float* scratch, float* column_state) {
  float *row_max = scratch, *col_max = row_max + kTileRows, *col_l = col_max + kTileColumns;
  float* col_w = col_l + kTileColumns;
  const float *cs = pass.column_scale + s0, *bias = pass.column_bias + s0;
  const int64_t padded = rounded_up(columns, LANES);
  for (int64_t s = 0; s < padded; s += LANES) {
    store(col_max + s, splat(-INFINITY));
    store(col_l + s, V{});
    store(col_w + s, V{});
  }
  float least = INFINITY, most = -INFINITY;
  for (int64_t r = 0; r < rows; ++r) {
    const float factor = pass.scale * pass.row_scale[r0 + r];
    const Positive positive = positive_at(pass.offset + r0 + r - s0, columns);
    V top = splat(-INFINITY);
    for (int64_t s = 0; s < padded; s += LANES) {
      V z = load(c + r * kTileColumns + s) * load(cs + s) * factor + load(bias + s);
      z = replaced(positive, s, z, splat(-INFINITY));
      top = larger(z, top);
      store(col_max + s, larger(z, load(col_max + s)));
    }
    row_max[r] = max_of(top);
    least = std::min(least, row_max[r]);
    most = std::max(most, row_max[r]);
  }
  for (int64_t s = 0; s < columns; ++s) least = std::min(least, col_max[s]);
  const bool one_reference = most - least <= kSpread;
  if (one_reference) {
    for (int64_t s = 0; s < padded; s += LANES) store(col_max + s, splat(most));
    for (int64_t r = 0; r < rows; ++r) row_max[r] = most;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float a = pass.row_scale[r0 + r], factor = pass.scale * a, reference = reference_of(row_max[r]);
    const Positive positive = positive_at(pass.offset + r0 + r - s0, columns);
    V l{}, w{};
    for (int64_t s = 0; s < padded; s += LANES) {
      const V product = replaced(positive, s, load(c + r * kTileColumns + s) * load(cs + s), V{});
      const V z = replaced(positive, s, product * factor + load(bias + s), splat(-INFINITY));
      const V e = exp_of(z - reference);
      const V of_column = one_reference ? e : exp_of(z - references_of(load(col_max + s)));
      l += e;
      w += e * product;
      store(col_l + s, load(col_l + s) + of_column);
      store(col_w + s, load(col_w + s) + of_column * product * a);
    }
    merge(row_state + r, kTileRows, row_max[r], sum_of(l), sum_of(w) * a);
  }
  const int64_t stride = pass.column_stride;
  float* state = column_state + s0;
  for (int64_t s = 0; s < padded; s += LANES) {
    const V m = load(state + s), tile_m = load(col_max + s), top = larger(m, tile_m), reference = references_of(top);
    const V old = exp_of(m - reference), now = exp_of(tile_m - reference);
    store(state + s, top);
    store(state + stride + s, load(state + stride + s) * old + load(col_l + s) * now);
    store(state + 2 * stride + s, load(state + 2 * stride + s) * old + load(col_w + s) * now);
  }
}

template <bool Bf16>
void stats_band(const StatsPass& pass, int64_t band, int worker) {
  const int64_t r0 = band * pass.band_rows, rows = std::min(pass.band_rows, pass.x->count - r0);
  const int64_t even = rounded_up(rows, kMicroRows);
  float* a = pass.scratch + worker * pass.scratch_stride;
  float *c = a + kTileRows * pass.lda, *state = c + kTileRows * kTileColumns, *rest = state + 3 * kTileRows;
  copy_rows<Bf16>(*pass.x, r0, rows, even, pass.dim, pass.words, a, pass.lda);
  for (int64_t r = 0; r < rows; ++r) state[r] = -INFINITY, state[kTileRows + r] = state[2 * kTileRows + r] = 0;
  for (int64_t s0 = 0; s0 < pass.columns; s0 += kTileColumns) {
    const int64_t columns = std::min(kTileColumns, pass.columns - s0);
    products<Bf16>(a, pass.lda, even, pass.packed + s0 * pass.words, pass.words, columns, c);
    if (pass.stats->keep)
      for (int64_t r = 0; r < rows; ++r)
        std::memcpy(pass.stats->keep + (r0 + r) * pass.stats->keep_stride + s0, c + r * kTileColumns,
                    columns * sizeof *c);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = pass.offset + r0 + r - s0;
      if (at >= 0 && at < columns)
        pass.stats->positive[r0 + r] = c[r * kTileColumns + at] * pass.row_scale[r0 + r] * pass.column_scale[s0 + at];
    }
    stats_tile(pass, c, r0, rows, s0, columns, state, rest, pass.column_state + worker * 3 * pass.column_stride);
  }
  for (int64_t r = 0; r < rows; ++r)
    merge(pass.stats->row + r0 + r, pass.stats->row_stride, state[r], state[kTileRows + r], state[2 * kTileRows + r]);
}

// ---- Pass 2: gradients ----

// Rounds to bf16, in the high half of each lane; the low half must be masked off.
INLINE V round_bits_bf16(V x) {
  const I u = (I)x;
  return (V)(u + 0x7fff + ((u >> 16) & 1));
}

// Stores two vectors of g as words. Along: a word holds neighbours of one vector; else, an element of low and of high.
template <bool Along>
INLINE void store_bf16(float* out, V low, V high) {
#if BF16
  if constexpr (Along) {
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
    return;
  }
  const __m512i l = _mm512_srli_epi32((__m512i)round_bits_bf16(low), 16);
  const __m512i h = _mm512_and_si512((__m512i)round_bits_bf16(high), _mm512_set1_epi32(~0xffff));
  _mm512_storeu_si512(out, _mm512_or_si512(l, h));
#endif
}

struct RowSums {
  V loss{}, scale{}, bias{};
};

// g of one vector of a tile's row, as if no pair were a positive. Kind 0: softmax with one exponential; 1: softmax with
// two; 2: sigmoid.
template <int Kind, bool Summed>
INLINE V gradient_of(const TileRow& row, const TileColumns& cols, V product, int64_t s, RowSums& sums) {
  const V u = product * load(cols.scale + s);
  const V z = u * row.factor + row.bias;
  if constexpr (Kind == 0) return exp_of(z - row.reference) * (row.weight + load(cols.weight + s));
  if constexpr (Kind == 1) {
    V g{};
    if (row.weight != 0) g += row.weight * exp_of(z - row.max);
    if (cols.weighted) g += load(cols.weight + s) * exp_of(z - load(cols.max + s));
    return g;
  }
  const V magnitude = larger(z, -z);
  const V e = exp_of(-magnitude), inverse = 1.f / (1.f + e);
  const V g = z > 0.f ? inverse : e * inverse;
  if constexpr (Summed) {
    sums.loss += larger(z, V{}) + log1p_of(e);
    sums.scale += g * u;
    sums.bias += g;
  }
  return g;
}

// Turns a tile of products into words of g times the scale of the summed side, at `out`, whose rows (or pairs of rows)
// are ldo words apart. RowsSummed: the tile's rows are summed over, else its columns.
template <int Kind, bool Bf16, bool RowsSummed>
void gradient_tile(const GradientPass& pass, const TileColumns& cols, const float* weights, const float* c, int64_t ldc,
                   int64_t r0, int64_t rows, int64_t s0, int64_t columns, float reference, float* out, int64_t ldo) {
  constexpr bool kPairs = Bf16 && RowsSummed, kSummed = Kind == 2 && !RowsSummed;
  constexpr int64_t kStep = Bf16 && !RowsSummed ? 2 * LANES : LANES;
  for (int64_t r = 0; r < rows; r += kPairs ? 2 : 1) {
    TileRow row[2];
    RowSums sums[2];
    float multiplier[2] = {1, 0};
    for (int p = 0; p < (kPairs ? 2 : 1); ++p) {
      const int64_t i = r0 + std::min(r + p, rows - 1);
      row[p].factor = pass.scale * pass.row_scale[i];
      row[p].bias = pass.bias;
      row[p].reference = reference;
      if constexpr (Kind != 2) {
        row[p].max = pass.softmax.row_max[i];
        row[p].weight = weights[i - r0];
      }
      if (RowsSummed) multiplier[p] = r + p < rows ? pass.row_scale[i] : 0.f;
    }
    const Positive positive = positive_at(pass.offset + r0 + r - s0, columns);
    const float *c0 = c + r * ldc, *c1 = c + std::min(r + 1, rows - 1) * ldc;
    float* to = out + (kPairs ? r / 2 : r) * ldo;
    for (int64_t s = 0; s < columns; s += kStep) {
      const int64_t left = columns - s;
      if constexpr (kPairs) {
        const V low = left >= LANES ? load(c0 + s) : load_part(c0 + s, left);
        const V high = left >= LANES ? load(c1 + s) : load_part(c1 + s, left);
        store_bf16<false>(to + s, gradient_of<Kind, false>(row[0], cols, low, s, sums[0]) * multiplier[0],
                          gradient_of<Kind, false>(row[1], cols, high, s, sums[1]) * multiplier[1]);
      } else {
        V g[2] = {};
        for (int half = 0; half < kStep / LANES; ++half) {
          const int64_t at = s + half * LANES, n = columns - at;
          if (n <= 0) break;
          const V product = n >= LANES ? load(c0 + at) : load_part(c0 + at, n);
          RowSums vector;
          g[half] = gradient_of<Kind, kSummed>(row[0], cols, product, at, vector);
          g[half] *= RowsSummed ? splat(multiplier[0]) : load(cols.scale + at);
          if (n < LANES) {  // clear what lies beyond the last column: it may be NaN
            const I inside = load(kIota) < static_cast<float>(n);
            g[half] = inside ? g[half] : V{};
            vector.loss = inside ? vector.loss : V{};
            vector.scale = inside ? vector.scale : V{};
            vector.bias = inside ? vector.bias : V{};
          }
          if constexpr (kSummed) {
            sums[0].loss += replaced(positive, at, vector.loss, V{});
            sums[0].scale += replaced(positive, at, vector.scale, V{});
            sums[0].bias += replaced(positive, at, vector.bias, V{});
          }
        }
        if constexpr (Bf16)
          store_bf16<true>(to + s / 2, g[0], g[1]);
        else
          store(to + s, g[0]);
      }
    }
    // Overwrite g of the positive, once a row: 0 for softmax, which adds positives at the end, in float32.
    for (int p = 0; p < (kPairs ? 2 : 1) && r + p < rows; ++p) {
      const int64_t i = r0 + r + p, at = pass.offset + i - s0;
      float loss = 0, u = 0, g = 0;
      if (at >= 0 && at < columns) {
        if constexpr (Kind == 2) {
          u = c[(r + p) * ldc + at] * cols.scale[at];
          const float z = u * row[p].factor + pass.bias;
          loss = std::log1p(std::exp(-std::abs(z))) + (z < 0 ? -z : 0.f);
          g = -1.f / (1.f + std::exp(z));
        }
        const float scaled = g * (RowsSummed ? multiplier[p] : cols.scale[at]);
        if constexpr (!Bf16)
          to[at] = scaled;
        else
          reinterpret_cast<uint16_t*>(to)[kPairs ? 2 * at + p : at] = to_bf16(scaled);
      }
      if constexpr (kSummed)
        if (const Sigmoid& to_sums = pass.sigmoid; to_sums.loss) {
          to_sums.loss[i] += sum_of(sums[p].loss) + loss;
          to_sums.d_scale[i] += to_sums.alpha * pass.row_scale[i] * (sum_of(sums[p].scale) + g * u);
          to_sums.d_bias[i] += to_sums.alpha * (sum_of(sums[p].bias) + g);
        }
    }
  }
}

// Writes the softmax weights w / l of a tile's rows and columns, and returns its reference. one_reference: whether all
// maxima lie within kSpread; then exp(z - m) w / l = exp(z - reference) exp(reference - m) w / l, where the second
// factor goes into the weights, and one exponential an element serves rows and columns.
float tile_weights(const GradientPass& pass, const TileColumns& cols, int64_t r0, int64_t rows, int64_t s0,
                   int64_t columns, float* row_weights, float* col_weights, bool& one_reference) {
  float least = INFINITY, most = -INFINITY;
  if (pass.softmax.row_weight != 0)
    for (int64_t r = 0; r < rows; ++r) {
      least = std::min(least, pass.softmax.row_max[r0 + r]);
      most = std::max(most, pass.softmax.row_max[r0 + r]);
    }
  if (cols.weighted)
    for (int64_t s = 0; s < columns; ++s) {
      least = std::min(least, cols.max[s]);
      most = std::max(most, cols.max[s]);
    }
  one_reference = most - least <= kSpread;
  for (int64_t s = 0; s < columns + 2 * LANES; s += LANES) {
    V weight{};
    if (cols.weighted) weight = pass.softmax.col_weight / load(pass.softmax.col_sum + s0 + s);
    if (cols.weighted && one_reference) weight *= exp_of(most - load(cols.max + s));
    store(col_weights + s, weight);
  }
  for (int64_t r = 0; r < rows; r += LANES) {
    V weight{};
    if (pass.softmax.row_weight != 0) weight = pass.softmax.row_weight / load(pass.softmax.row_sum + r0 + r);
    if (pass.softmax.row_weight != 0 && one_reference) weight *= exp_of(most - load(pass.softmax.row_max + r0 + r));
    store(row_weights + r, weight);
  }
  return most;
}

template <bool IsSigmoid, bool Bf16, bool RowsSummed>
void tile_of_g(const GradientPass& pass, const float* c, int64_t ldc, int64_t r0, int64_t rows, int64_t s0,
               int64_t columns, float* weights, float* out, int64_t ldo) {
  float *row_weights = weights, *col_weights = weights + kTileSide;
  TileColumns cols{pass.column_scale + s0, col_weights, pass.softmax.col_max ? pass.softmax.col_max + s0 : nullptr,
                   pass.softmax.col_weight != 0};
  if constexpr (IsSigmoid) {
    gradient_tile<2, Bf16, RowsSummed>(pass, cols, weights, c, ldc, r0, rows, s0, columns, 0, out, ldo);
  } else {
    bool one_reference;
    const float reference = tile_weights(pass, cols, r0, rows, s0, columns, row_weights, col_weights, one_reference);
    if (one_reference)
      gradient_tile<0, Bf16, RowsSummed>(pass, cols, weights, c, ldc, r0, rows, s0, columns, reference, out, ldo);
    else
      gradient_tile<1, Bf16, RowsSummed>(pass, cols, weights, c, ldc, r0, rows, s0, columns, reference, out, ldo);
  }
}

// One band of the target against all rows of the summed side.
template <bool IsSigmoid, bool Bf16>
void gradient_band(const GradientPass& pass, int64_t band, int worker) {
  constexpr int64_t kPerWord = Bf16 ? 2 : 1;
  const int64_t t0 = band * pass.band_rows, rows = std::min(pass.band_rows, pass.target->count - t0);
  const int64_t even = rounded_up(rows, kMicroRows);
  const int64_t panels = ceil_div(pass.dim, kColumns), width = panels * kColumns;
  float* a = pass.scratch + worker * pass.scratch_stride;
  float* c = a + (pass.kept ? 0 : kTileRows * pass.lda);
  float* g = c + (pass.kept ? 0 : kTileRows * kTileColumns);
  float* weights = g + kTileRows * kGradientRow;
  float *sums = weights + 2 * kTileSide, *positive_row = sums + kTileRows * width;
  if (!pass.kept) copy_rows<Bf16>(*pass.target, t0, rows, even, pass.dim, pass.words, a, pass.lda);
  for (int64_t u0 = 0; u0 < pass.summed->count; u0 += kTileColumns) {
    const int64_t columns = std::min(kTileColumns, pass.summed->count - u0), words = ceil_div(columns, kPerWord);
    int64_t row, step;  // where g's elements lie when it is A of a product
    if (pass.transposed) {
      row = 1, step = kTileRows;
      tile_of_g<IsSigmoid, Bf16, true>(pass, pass.kept + u0 * pass.kept_stride + t0, pass.kept_stride, u0, columns, t0,
                                     rows, weights, g, step);
    } else {
      row = kGradientRow, step = 1;
      const float* tile = c;
      if (pass.kept)
        tile = pass.kept + t0 * pass.kept_stride + u0;
      else
        products<Bf16>(a, pass.lda, even, pass.packed + u0 * pass.words, pass.words, columns, c);
      if (pass.keep)
        for (int64_t r = 0; r < rows; ++r)
          std::memcpy(pass.keep + (t0 + r) * pass.kept_stride + u0, c + r * kTileColumns, columns * sizeof *c);
      tile_of_g<IsSigmoid, Bf16, false>(pass, tile, pass.kept ? pass.kept_stride : kTileColumns, t0, rows, u0, columns,
                                      weights, g, row);
    }
    if (!pass.out) continue;
    const float* b = pass.along + u0 / kPerWord * kColumns;
    for (int64_t n = 0; n < panels; ++n) {
      const float *panel = b + n * pass.along_words * kColumns, *ahead = panel + pass.along_words * kColumns;
      for (int64_t m = 0; m < even; m += kMicroRows)
        for (int64_t k = 0; k < words; k += kWords, ahead += kAheadFloats)
          micro<Bf16>(std::min(kWords, words - k), g + m * row + k * step, row, step, panel + k * kColumns,
                      sums + m * width + n * kColumns, width, u0 > 0 || k > 0, ahead);
    }
  }
  if (!pass.out) return;
  for (int64_t r = 0; r < rows; ++r) {
    const float factor = pass.factor * pass.target_scale[t0 + r];
    float* from = sums + r * width;
    const int64_t at = (t0 + r) * pass.dim, positive = pass.positive_offset + t0 + r;
    if (pass.softmax.positive && positive >= 0 && positive < pass.summed->count) {
      const float g = pass.softmax.positive[pass.positive_by_summed ? positive : t0 + r] * pass.summed_scale[positive];
      row_words<false>(*pass.summed, positive, pass.dim, 0, pass.dim, positive_row);
      for (int64_t d = 0; d < pass.dim; ++d) from[d] += g * positive_row[d];
    }
    if (pass.add) {
      float* to = static_cast<float*>(pass.out) + at;
      for (int64_t d = 0; d < pass.dim; ++d) to[d] += factor * from[d];
    } else if (pass.out_type == Element::f32) {
      float* to = static_cast<float*>(pass.out) + at;
      for (int64_t d = 0; d < pass.dim; ++d) to[d] = factor * from[d];
    } else {
      auto* to = static_cast<uint16_t*>(pass.out) + at;
      if (pass.out_type == Element::bf16)
        for (int64_t d = 0; d < pass.dim; ++d) to[d] = to_bf16(factor * from[d]);
      else
        for (int64_t d = 0; d < pass.dim; ++d) to[d] = to_f16(factor * from[d]);
    }
  }
}
