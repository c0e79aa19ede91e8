// The loops of layernorm.cpp over vectors (tokens.h), for every instruction set; see isas.h. A row is read from memory
// once, then from the L1 cache.
#include "transformer/tokens.h"

// Stores elements [at, at + LANES) of s = x + residual, and returns them as stored.
template <Element T, bool Residual, bool Part>
INLINE V summed(const LayerNorm& job, int64_t at, int64_t n) {
  const V x = get<T, Part>(job.x, at, n);
  if constexpr (!Residual) return x;
  put<T, Part>(job.stream, at, x + get<T, Part>(job.residual, at, n), n);
  return get<T, Part>(job.stream, at, n);
}

// Writes s as float32 to `row`, except for float32 tokens, where the stream itself serves. Returns the sum of s.
template <Element T, bool Residual>
float read_row(const LayerNorm& of, int64_t first, float* row) {
  const LayerNorm job = of;
  const int64_t width = job.width, even = width / LANES * LANES, rest = width - even;
  V sums[4] = {};
  int64_t c = 0;
  for (; c + 4 * LANES <= width; c += 4 * LANES)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const V s = summed<T, Residual, false>(job, first + c + k * LANES, LANES);
      if constexpr (T != Element::f32) narrow<Element::f32>(row + c + k * LANES, s);
      sums[k] += s;
    }
  for (; c < even; c += LANES) {
    const V s = summed<T, Residual, false>(job, first + c, LANES);
    if constexpr (T != Element::f32) narrow<Element::f32>(row + c, s);
    sums[0] += s;
  }
  if (rest) {
    const V s = summed<T, Residual, true>(job, first + c, rest);
    if constexpr (T != Element::f32) put<Element::f32, true>(row, c, s, rest);
    sums[1] += s;
  }
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <Element T, bool Part>
INLINE void write_normed(const LayerNorm& job, int64_t first, int64_t c, int64_t n, const float* row, float rough,
                         float rstd, float shift) {
  constexpr Element F = Element::f32;
  const V x = (get<F, Part>(row, c, n) - rough) * rstd - shift;
  put<T, Part>(job.y, first + c, x * get<F, Part>(job.weight, c, n) + get<F, Part>(job.bias, c, n), n);
}

template <Element T>
void layernorm_band(const LayerNormPass& pass, int64_t band, int worker) {
  constexpr Element F = Element::f32;
  const LayerNorm job = pass.job;  // a copy: else the compiler must assume that the stores below change its pointers
  const int64_t width = job.width, even = width / LANES * LANES, rest = width - even;
  const int64_t end = std::min(job.rows, (band + 1) * pass.band_rows);
  const V inside = (V)(iota() < static_cast<int32_t>(rest) ? ~I{} : I{});
  for (int64_t r = band * pass.band_rows; r < end; ++r) {
    const int64_t first = r * width;
    float* buffer = pass.scratch + worker * width;
    const float* row = buffer;
    if constexpr (T == F) row = static_cast<const float*>(job.residual ? job.stream : job.x) + first;
    const float sum = job.residual ? read_row<T, true>(job, first, buffer) : read_row<T, false>(job, first, buffer);
    const float rough = sum / static_cast<float>(width);
    V offs[4] = {}, squares[4] = {};
    int64_t c = 0;
    for (; c + 4 * LANES <= width; c += 4 * LANES)
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const V d = widen<F>(row + c + k * LANES) - rough;
        offs[k] += d;
        squares[k] += d * d;
      }
    for (; c < even; c += LANES) {
      const V d = widen<F>(row + c) - rough;
      offs[0] += d;
      squares[0] += d * d;
    }
    if (rest) {
      const V d = (V)((I)(get<F, true>(row, c, rest) - rough) & (I)inside);
      offs[1] += d;
      squares[1] += d * d;
    }
    // The rounding error of the mean: when the mean is large, this is as large as the errors of the deviations.
    const float off = sum_of((offs[0] + offs[1]) + (offs[2] + offs[3])) / static_cast<float>(width);
    const float square = sum_of((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(width);
    const float rstd = 1.f / std::sqrt(std::max(square - off * off, 0.f) + job.eps);
    job.mean[r] = rough + off;
    job.rstd[r] = rstd;
    const float shift = off * rstd;
#pragma GCC unroll 4
    for (c = 0; c < even; c += LANES) write_normed<T, false>(job, first, c, LANES, row, rough, rstd, shift);
    if (rest) write_normed<T, true>(job, first, c, rest, row, rough, rstd, shift);
  }
}

// A row of the gradient. x^ = (s - mean) rstd.
struct Row {
  int64_t first;
  float mean, rstd, plain, normed;  // plain, normed: the means of g and of g x^ over the row
};

// Adds LANES columns of R rows at once, so that d_weight and d_bias are read and written once for all R.
template <Element T, int R, bool Part>
INLINE void add_sums(const LayerNormBackward& job, const Row* rows, int64_t c, int64_t n, float* d_weight,
                     float* d_bias, V* plain, V* normed) {
  constexpr Element F = Element::f32;
  const V weight = get<F, Part>(job.weight, c, n);
  V dw = get<F, Part>(d_weight, c, n), db = get<F, Part>(d_bias, c, n);
#pragma GCC unroll 4
  for (int k = 0; k < R; ++k) {
    const int64_t at = rows[k].first + c;
    const V x = (get<T, Part>(job.stream, at, n) - rows[k].mean) * rows[k].rstd;
    const V g = get<T, Part>(job.dy, at, n);  // zero beyond the row's end, and so is everything summed below
    const V gx = g * x;
    dw += gx;
    db += g;
    plain[k] += g * weight;
    normed[k] += gx * weight;
  }
  put<F, Part>(d_weight, c, dw, n);
  put<F, Part>(d_bias, c, db, n);
}

template <Element T, bool Part>
INLINE void write_gradient(const LayerNormBackward& job, const Row& row, int64_t c, int64_t n) {
  constexpr Element F = Element::f32;
  const int64_t at = row.first + c;
  const V weight = get<F, Part>(job.weight, c, n);
  const V x = (get<T, Part>(job.stream, at, n) - row.mean) * row.rstd;
  const V g = rounded(get<T, Part>(job.dy, at, n) * weight);
  V d = (g - row.plain - x * row.normed) * row.rstd;
  if (job.d_stream) d += get<T, Part>(job.d_stream, at, n);
  put<T, Part>(job.dx, at, d, n);
  if (job.y) put<T, Part>(job.y, at, x * weight + get<F, Part>(job.bias, c, n), n);
}

template <Element T, int R>
void backward_rows(const LayerNormBackward& of, int64_t first, float* d_weight, float* d_bias) {
  const LayerNormBackward job = of;
  const int64_t width = job.width, even = width / LANES * LANES, rest = width - even;
  Row rows[R];
#pragma GCC unroll 4
  for (int k = 0; k < R; ++k) rows[k] = {(first + k) * width, job.mean[first + k], job.rstd[first + k], 0, 0};
  V plain[R] = {}, normed[R] = {};
  for (int64_t c = 0; c < even; c += LANES)
    add_sums<T, R, false>(job, rows, c, LANES, d_weight, d_bias, plain, normed);
  if (rest) add_sums<T, R, true>(job, rows, even, rest, d_weight, d_bias, plain, normed);
#pragma GCC unroll 4
  for (int k = 0; k < R; ++k) {
    Row row = rows[k];
    row.plain = sum_of(plain[k]) / static_cast<float>(width);
    row.normed = sum_of(normed[k]) / static_cast<float>(width);
    for (int64_t c = 0; c < even; c += LANES) write_gradient<T, false>(job, row, c, LANES);
    if (rest) write_gradient<T, true>(job, row, even, rest);
  }
}

template <Element T>
void layernorm_backward_band(const LayerNormBackwardPass& pass, int64_t band, int) {
  const int64_t end = std::min(pass.job.rows, (band + 1) * pass.band_rows);
  float* d_weight = pass.sums + band * 2 * pass.job.width;
  float* d_bias = d_weight + pass.job.width;
  std::fill(d_weight, d_bias + pass.job.width, 0.f);
  int64_t r = band * pass.band_rows;
  for (; r + kRowsAtOnce <= end; r += kRowsAtOnce) backward_rows<T, kRowsAtOnce>(pass.job, r, d_weight, d_bias);
  for (; r < end; ++r) backward_rows<T, 1>(pass.job, r, d_weight, d_bias);
}

template <Element T>
Kernels kernels() {
  return {layernorm_band<T>, layernorm_backward_band<T>};
}
