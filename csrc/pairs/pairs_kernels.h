// The loops of pairs.cpp over words (words.h), for every instruction set: see isas.h. Of a micro-tile, A is read where
// it lies, a broadcast a word; B is packed in panels [k][columns].
#include "common/words.h"

constexpr int kColumns = LANES * VECTORS;

// Where nothing was seen the maximum is -inf, and -inf - -inf would be NaN.
INLINE V references_of(V m) { return m == -INFINITY ? V{} : m; }

INLINE V load_part(const float* p, int64_t n) {
  float part[LANES] = {};
  for (int64_t k = 0; k < n; ++k) part[k] = p[k];
  return load(part);
}

// e^x to 1e-7 (1 + |x|) of itself: 2^n 2^f with |f| <= 1/2. Below 2^-126 it is 0, above 2^127 that; a NaN stays one.
INLINE V exp_of(V x) {
  const V wide = x * 1.44269504088896341f;
  V y = wide < -126.f ? splat(-126.f) : wide;
  y = y > 127.f ? splat(127.f) : y;
  const V shifted = y + 12582912.f;  // 1.5 * 2^23: the nearest integer is in the low bits now
  const V f = y - (shifted - 12582912.f);
  V p = f * kExp2[6] + kExp2[5];
  for (int k = 4; k >= 0; --k) p = p * f + kExp2[k];
  p *= (V)(((I)shifted + 127) << 23);
  return wide < -126.f ? V{} : p;
}

// log(1 + e) for 0 <= e <= 1, to 2e-7 of itself.
INLINE V log1p_of(V e) {
  V p = e * kLog1p[9] + kLog1p[8];
  for (int k = 7; k >= 0; --k) p = p * e + kLog1p[k];
  return p * e;
}

// a[m, k] lies at a[m * row + k * step]. Fetches a line at `ahead` for every kLine words into L2.
template <bool Bf16>
void micro(int64_t words, const float* a, int64_t row, int64_t step, const float* b, float* c, int64_t ldc, bool add,
           const float* ahead) {
  V sums[kMicroRows][VECTORS];
#pragma GCC unroll 8
  for (int m = 0; m < kMicroRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sums[m][v] = add ? load(c + m * ldc + v * LANES) : V{};
  for (int64_t first = 0; first < words; first += kLine) {
    __builtin_prefetch(ahead, 0, 2);
    ahead += 16;
    const int64_t count = std::min(kLine, words - first);
    for (int64_t k = 0; k < count; ++k) {
      V bs[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) bs[v] = load(b + v * LANES);
#pragma GCC unroll 8
      for (int m = 0; m < kMicroRows; ++m) {
        const float am = a[m * row];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sums[m][v] = multiply_add<Bf16>(am, bs[v], sums[m][v]);
      }
      a += step;
      b += kColumns;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kMicroRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) store(c + m * ldc + v * LANES, sums[m][v]);
}

// Words [first, first + count) of a row, zero beyond dim.
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

// Rows [first, first + rows) as words, lda apart, and zero rows up to `even`.
template <bool Bf16>
void block_words(const Rows& from, int64_t first, int64_t rows, int64_t even, int64_t dim, int64_t words, float* out,
                 int64_t lda) {
  for (int64_t r = 0; r < rows; ++r) row_words<Bf16>(from, first + r, dim, 0, words, out + r * lda);
  for (int64_t r = rows; r < even; ++r) std::memset(out + r * lda, 0, words * sizeof *out);
}

// Rows as columns of B, summed over dim: [panel of rows][word of dim][row]. One task a panel.
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
        turn(part + c * kStep + k, kStep, out + (k0 + k) * kColumns + c, kColumns, std::min<int64_t>(LANES, kn - k));
  }
}

// Rows as rows of B, summed over them: [panel of dim][word of rows][dim]. One task 64 words.
template <bool Bf16>
void pack_along(const Packing& p, int64_t task, int) {
  const int64_t last = std::min(p.words, (task + 1) * 64), panels = (p.dim + kColumns - 1) / kColumns;
  alignas(64) float low[kColumns], high[kColumns];
  for (int64_t panel = 0; panel < panels; ++panel)
    for (int64_t word = task * 64; word < last; ++word) {
      float* out = p.out + (panel * p.words + word) * kColumns;
      if constexpr (Bf16) {
        const bool pair = 2 * word + 1 < p.rows->count;
        row_words<true>(*p.rows, 2 * word, p.dim, panel * kColumns / 2, kColumns / 2, low);
        if (pair) row_words<true>(*p.rows, 2 * word + 1, p.dim, panel * kColumns / 2, kColumns / 2, high);
        auto *to = reinterpret_cast<uint16_t*>(out), *l = reinterpret_cast<uint16_t*>(low);
        auto* h = reinterpret_cast<uint16_t*>(high);
        for (int c = 0; c < kColumns; ++c) to[2 * c] = l[c], to[2 * c + 1] = pair ? h[c] : uint16_t{0};
      } else {
        row_words<false>(*p.rows, word, p.dim, panel * kColumns, kColumns, out);
      }
    }
}

// products[m, n] of A's rows with panels of B: [rows, columns], rows kTileColumns apart.
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

// The vector of a tile's row that holds its own pair, and the lane; -1: the pair is not in the tile.
struct Own {
  int64_t at = -1;
  float lane = 0;
};

INLINE Own own_of(int64_t column, int64_t columns) {
  if (column < 0 || column >= columns) return {};
  return {column / LANES * LANES, static_cast<float>(column % LANES)};
}

INLINE V without(const Own& own, int64_t s, V v, V instead) {
  return s == own.at ? (load(kIota) == own.lane ? instead : v) : v;
}

// One tile: with one exponential an element where the largest entries of its rows and columns lie within kSpread of
// each other, so that one reference serves all; else with two. Own pairs are left out.
void stats_tile(const StatsPass& pass, const float* c, int64_t r0, int64_t rows, int64_t s0, int64_t columns,
                float* row_state, float* scratch, float* column_state) {
  float *row_max = scratch, *col_max = row_max + kTileRows, *col_l = col_max + kTileColumns;
  float* col_w = col_l + kTileColumns;
  const float *cs = pass.column_scale + s0, *bias = pass.column_bias + s0;
  const int64_t padded = (columns + LANES - 1) / LANES * LANES;
  for (int64_t s = 0; s < padded; s += LANES) {
    store(col_max + s, splat(-INFINITY));
    store(col_l + s, V{});
    store(col_w + s, V{});
  }
  float least = INFINITY, most = -INFINITY;
  for (int64_t r = 0; r < rows; ++r) {
    const float factor = pass.scale * pass.row_scale[r0 + r];
    const Own own = own_of(pass.offset + r0 + r - s0, columns);
    V top = splat(-INFINITY);
    for (int64_t s = 0; s < padded; s += LANES) {
      V z = load(c + r * kTileColumns + s) * load(cs + s) * factor + load(bias + s);
      z = without(own, s, z, splat(-INFINITY));
      top = larger(z, top);
      store(col_max + s, larger(z, load(col_max + s)));
    }
    row_max[r] = max_of(top);
    least = std::min(least, row_max[r]);
    most = std::max(most, row_max[r]);
  }
  for (int64_t s = 0; s < columns; ++s) least = std::min(least, col_max[s]);
  const bool one = most - least <= kSpread;
  if (one) {
    for (int64_t s = 0; s < padded; s += LANES) store(col_max + s, splat(most));
    for (int64_t r = 0; r < rows; ++r) row_max[r] = most;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float a = pass.row_scale[r0 + r], factor = pass.scale * a, reference = reference_of(row_max[r]);
    const Own own = own_of(pass.offset + r0 + r - s0, columns);
    V l{}, w{};
    for (int64_t s = 0; s < padded; s += LANES) {
      const V product = without(own, s, load(c + r * kTileColumns + s) * load(cs + s), V{});
      const V z = without(own, s, product * factor + load(bias + s), splat(-INFINITY));
      const V e = exp_of(z - reference);
      const V of_column = one ? e : exp_of(z - references_of(load(col_max + s)));
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
    const V m = load(state + s), here = load(col_max + s), top = larger(m, here), reference = references_of(top);
    const V old = exp_of(m - reference), now = exp_of(here - reference);
    store(state + s, top);
    store(state + stride + s, load(state + stride + s) * old + load(col_l + s) * now);
    store(state + 2 * stride + s, load(state + 2 * stride + s) * old + load(col_w + s) * now);
  }
}

template <bool Bf16>
void stats_block(const StatsPass& pass, int64_t block, int worker) {
  const int64_t r0 = block * pass.block_rows, rows = std::min(pass.block_rows, pass.x->count - r0);
  const int64_t even = (rows + kMicroRows - 1) / kMicroRows * kMicroRows;
  float* a = pass.scratch + worker * pass.scratch_stride;
  float *c = a + kTileRows * pass.lda, *state = c + kTileRows * kTileColumns, *rest = state + 3 * kTileRows;
  block_words<Bf16>(*pass.x, r0, rows, even, pass.dim, pass.words, a, pass.lda);
  for (int64_t r = 0; r < rows; ++r) state[r] = -INFINITY, state[kTileRows + r] = state[2 * kTileRows + r] = 0;
  for (int64_t s0 = 0; s0 < pass.columns; s0 += kTileColumns) {
    const int64_t columns = std::min(kTileColumns, pass.columns - s0);
    products<Bf16>(a, pass.lda, even, pass.packed + s0 * pass.words, pass.words, columns, c);
    if (pass.stats->keep)
      for (int64_t r = 0; r < rows; ++r)
        std::memcpy(pass.stats->keep + (r0 + r) * pass.stats->keep_stride + s0, c + r * kTileColumns,
                    columns * sizeof *c);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t own = pass.offset + r0 + r - s0;
      if (own >= 0 && own < columns)
        pass.stats->own[r0 + r] = c[r * kTileColumns + own] * pass.row_scale[r0 + r] * pass.column_scale[s0 + own];
    }
    stats_tile(pass, c, r0, rows, s0, columns, state, rest, pass.column_state + worker * 3 * pass.column_stride);
  }
  for (int64_t r = 0; r < rows; ++r)
    merge(pass.stats->row + r0 + r, pass.stats->row_stride, state[r], state[kTileRows + r], state[2 * kTileRows + r]);
}

// ---- Pass 2: gradients ----

INLINE V round_bits_bf16(V x) {  // a bf16 in the high half of each lane, the low half to be masked off
  const I u = (I)x;
  return (V)(u + 0x7fff + ((u >> 16) & 1));
}

// Two vectors of g as words. Along: neighbours in a vector are neighbours in the sum; else those of low and high are.
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

// g of one vector of a tile's row, without the own pair. Kind 0: softmax, one exponential; 1: softmax, two; 2: sigmoid.
template <int Kind, bool Summed>
INLINE V gradient_of(const TileRow& row, const TileColumns& cols, V product, int64_t s, RowSums& sums) {
  const V u = product * load(cols.scale + s);
  const V z = u * row.factor + row.bias;
  if constexpr (Kind == 0) return exp_of(z - row.reference) * (row.weight + load(cols.weight + s));
  if constexpr (Kind == 1) {
    V g{};
    if (row.weight != 0) g += row.weight * exp_of(z - row.max);
    if (cols.any) g += load(cols.weight + s) * exp_of(z - load(cols.max + s));
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

// Tile of products -> words of g times the scale of the side that is summed over, at out: ldo words a row (or pair
// of rows). RowsSummed: the tile's rows are summed over, else its columns.
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
        row[p].max = pass.row_max[i];
        row[p].weight = weights[i - r0];
      }
      if (RowsSummed) multiplier[p] = r + p < rows ? pass.row_scale[i] : 0.f;
    }
    const Own own_lane = own_of(pass.offset + r0 + r - s0, columns);
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
          RowSums here;
          g[half] = gradient_of<Kind, kSummed>(row[0], cols, product, at, here);
          g[half] *= RowsSummed ? splat(multiplier[0]) : load(cols.scale + at);
          if (n < LANES) {  // beyond the last column nothing may count, not even a NaN
            const I inside = load(kIota) < static_cast<float>(n);
            g[half] = inside ? g[half] : V{};
            here.loss = inside ? here.loss : V{};
            here.scale = inside ? here.scale : V{};
            here.bias = inside ? here.bias : V{};
          }
          if constexpr (kSummed) {
            sums[0].loss += without(own_lane, at, here.loss, V{});
            sums[0].scale += without(own_lane, at, here.scale, V{});
            sums[0].bias += without(own_lane, at, here.bias, V{});
          }
        }
        if constexpr (Bf16)
          store_bf16<true>(to + s / 2, g[0], g[1]);
        else
          store(to + s, g[0]);
      }
    }
    // Own pairs, once a row, in place of what the loop left: softmax adds them at the end, in float32.
    for (int p = 0; p < (kPairs ? 2 : 1) && r + p < rows; ++p) {
      const int64_t i = r0 + r + p, own = pass.offset + i - s0;
      float loss = 0, u = 0, g = 0;
      if (own >= 0 && own < columns) {
        if constexpr (Kind == 2) {
          u = c[(r + p) * ldc + own] * cols.scale[own];
          const float z = u * row[p].factor + pass.bias;
          loss = std::log1p(std::exp(-std::abs(z))) + (z < 0 ? -z : 0.f);
          g = -1.f / (1.f + std::exp(z));
        }
        const float scaled = g * (RowsSummed ? multiplier[p] : cols.scale[own]);
        if constexpr (!Bf16)
          to[own] = scaled;
        else
          reinterpret_cast<uint16_t*>(to)[kPairs ? 2 * own + p : own] = to_bf16(scaled);
      }
      if constexpr (kSummed)
        if (pass.loss) {
          pass.loss[i] += sum_of(sums[p].loss) + loss;
          pass.d_scale[i] += pass.alpha * pass.row_scale[i] * (sum_of(sums[p].scale) + g * u);
          pass.d_bias[i] += pass.alpha * (sum_of(sums[p].bias) + g);
        }
    }
  }
}

// The weights of a softmax tile, w / l for rows and columns, and its reference: where all maxima lie within kSpread,
// exp(z - m) w / l = exp(z - reference) exp(reference - m) w / l needs one exponential an element for both.
float tile_weights(const GradientPass& pass, const TileColumns& cols, int64_t r0, int64_t rows, int64_t s0,
                   int64_t columns, float* row_weights, float* col_weights, bool& one) {
  float least = INFINITY, most = -INFINITY;
  if (pass.row_weight != 0)
    for (int64_t r = 0; r < rows; ++r) {
      least = std::min(least, pass.row_max[r0 + r]);
      most = std::max(most, pass.row_max[r0 + r]);
    }
  if (cols.any)
    for (int64_t s = 0; s < columns; ++s) {
      least = std::min(least, cols.max[s]);
      most = std::max(most, cols.max[s]);
    }
  one = most - least <= kSpread;
  for (int64_t s = 0; s < columns + 2 * LANES; s += LANES) {
    V weight{};
    if (cols.any) weight = pass.col_weight / load(pass.col_sum + s0 + s);
    if (cols.any && one) weight *= exp_of(most - load(cols.max + s));
    store(col_weights + s, weight);
  }
  for (int64_t r = 0; r < rows; r += LANES) {
    V weight{};
    if (pass.row_weight != 0) weight = pass.row_weight / load(pass.row_sum + r0 + r);
    if (pass.row_weight != 0 && one) weight *= exp_of(most - load(pass.row_max + r0 + r));
    store(row_weights + r, weight);
  }
  return most;
}

template <bool Sigmoid, bool Bf16, bool RowsSummed>
void tile_of_g(const GradientPass& pass, const float* c, int64_t ldc, int64_t r0, int64_t rows, int64_t s0,
               int64_t columns, float* weights, float* out, int64_t ldo) {
  float *row_weights = weights, *col_weights = weights + kTileSide;
  TileColumns cols{pass.column_scale + s0, col_weights, pass.col_max ? pass.col_max + s0 : nullptr,
                   pass.col_weight != 0};
  if constexpr (Sigmoid) {
    gradient_tile<2, Bf16, RowsSummed>(pass, cols, weights, c, ldc, r0, rows, s0, columns, 0, out, ldo);
  } else {
    bool one;
    const float reference = tile_weights(pass, cols, r0, rows, s0, columns, row_weights, col_weights, one);
    if (one)
      gradient_tile<0, Bf16, RowsSummed>(pass, cols, weights, c, ldc, r0, rows, s0, columns, reference, out, ldo);
    else
      gradient_tile<1, Bf16, RowsSummed>(pass, cols, weights, c, ldc, r0, rows, s0, columns, reference, out, ldo);
  }
}

// One block of the side that gets a gradient, against all of the other side, `o` and `u` below.
template <bool Sigmoid, bool Bf16>
void gradient_block(const GradientPass& pass, int64_t block, int worker) {
  constexpr int64_t kPerWord = Bf16 ? 2 : 1;
  const int64_t o0 = block * pass.block_rows, rows = std::min(pass.block_rows, pass.o->count - o0);
  const int64_t even = (rows + kMicroRows - 1) / kMicroRows * kMicroRows;
  const int64_t panels = (pass.dim + kColumns - 1) / kColumns, width = panels * kColumns;
  float* a = pass.scratch + worker * pass.scratch_stride;
  float* c = a + (pass.kept ? 0 : kTileRows * pass.lda);
  float* g = c + (pass.kept ? 0 : kTileRows * kTileColumns);
  float* weights = g + kTileRows * kGradientRow;
  float *sums = weights + 2 * kTileSide, *own_row = sums + kTileRows * width;
  if (!pass.kept) block_words<Bf16>(*pass.o, o0, rows, even, pass.dim, pass.words, a, pass.lda);
  for (int64_t u0 = 0; u0 < pass.u->count; u0 += kTileColumns) {
    const int64_t columns = std::min(kTileColumns, pass.u->count - u0), words = (columns + kPerWord - 1) / kPerWord;
    int64_t row, step;  // of g as the A of products
    if (pass.transposed) {
      row = 1, step = kTileRows;
      tile_of_g<Sigmoid, Bf16, true>(pass, pass.kept + u0 * pass.kept_stride + o0, pass.kept_stride, u0, columns, o0,
                                     rows, weights, g, step);
    } else {
      row = kGradientRow, step = 1;
      const float* tile = c;
      if (pass.kept)
        tile = pass.kept + o0 * pass.kept_stride + u0;
      else
        products<Bf16>(a, pass.lda, even, pass.packed + u0 * pass.words, pass.words, columns, c);
      if (pass.keep)
        for (int64_t r = 0; r < rows; ++r)
          std::memcpy(pass.keep + (o0 + r) * pass.kept_stride + u0, c + r * kTileColumns, columns * sizeof *c);
      tile_of_g<Sigmoid, Bf16, false>(pass, tile, pass.kept ? pass.kept_stride : kTileColumns, o0, rows, u0, columns,
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
    const float factor = pass.factor * pass.out_scale[o0 + r];
    float* from = sums + r * width;
    const int64_t at = (o0 + r) * pass.dim, own = pass.own_offset + o0 + r;
    if (pass.own && own >= 0 && own < pass.u->count) {
      const float g = pass.own[pass.own_by_sum ? own : o0 + r] * pass.sum_scale[own];
      row_words<false>(*pass.u, own, pass.dim, 0, pass.dim, own_row);
      for (int64_t d = 0; d < pass.dim; ++d) from[d] += g * own_row[d];
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
