// The loops of mlp.cpp over vectors (tokens.h), for every instruction set; see isas.h.
#include "transformer/tokens.h"

// At z = -t, the left half: the factor of z in the activation (P at the head of mlp.cpp), and its derivative (S).
struct LeftHalf {
  V value, slope;
};

// c0 + c1 x + ... + c5 x^5, with half as many dependent steps as Horner's scheme: their latency is what takes time.
INLINE V polynomial(V x, float c0, float c1, float c2, float c3, float c4, float c5) {
  const V square = x * x;
  return ((x * c5 + c4) * square + (x * c3 + c2)) * square + (x * c1 + c0);
}

// 2^y for -125 <= y <= 0 to 9e-8 of itself: 2^n 2^f with |f| <= 1/2; n is added to the exponent.
INLINE V exp2_of(V y) {
  const V shifted = y + 12582912.f;  // 1.5 2^23: the low bits are now the nearest integer
  const V f = y - (shifted - 12582912.f);
  const V p = polynomial(f, kExp2Degree5[0], kExp2Degree5[1], kExp2Degree5[2], kExp2Degree5[3], kExp2Degree5[4],
                         kExp2Degree5[5]);
  return (V)((I)p + ((I)shifted << 23));
}

template <Activation A>
INLINE LeftHalf left_of(V t) {
  if constexpr (A == Activation::gelu) {
    const V e = exp2_of(t * t * (-0.5f * kLog2e));
    const V k = 1.f / (t * kMillsAt + 1.f);
    const V r = rounded(k * polynomial(k, kMills[0], kMills[1], kMills[2], kMills[3], kMills[4], kMills[5]));
    return {e * r, e * (r - t * kInvSqrt2Pi)};
  }
  const bool tanh = A == Activation::gelu_tanh;
  const V square = t * t;
  const V u = tanh ? t * (square * kCube + 1.f) * kTwoSqrt2OverPi : t * kQuick;
  const V slope = tanh ? (square * (3 * kCube) + 1.f) * kTwoSqrt2OverPi : splat(kQuick);
  const V e = exp2_of(u * -kLog2e), r = 1.f / (e + 1.f), q = e * r;
  return {q, q * (1.f - t * slope * r)};
}

// t = min(|z|, kMost): beyond it, every result is 0 or z in float32. A NaN stays one.
template <Activation A>
INLINE V clipped(V z) {
  return smaller(splat(kMost<A>), (V)((I)z & 0x7fffffff));
}

template <Activation A>
INLINE V value_of(V z, V t, const LeftHalf& left) {
  return larger(V{}, z) - t * left.value;
}

template <Element T, Activation A, bool Part>
INLINE void forward_at(const BiasAct& job, int64_t first, int64_t c, int64_t n) {
  const V z = get<T, Part>(job.h, first + c, n) + get<Element::f32, Part>(job.bias, c, n);
  const V t = clipped<A>(z);
  put<T, Part>(job.a, first + c, value_of<A>(z, t, left_of<A>(t)), n);
}

template <Element T, Activation A, bool Recompute, bool Part>
INLINE void backward_at(const BiasActBackward& job, int64_t first, int64_t c, int64_t n, float* d_bias) {
  constexpr Element F = Element::f32;
  const V z = get<T, Part>(job.h, first + c, n) + get<F, Part>(job.bias, c, n);
  const V t = clipped<A>(z);
  const LeftHalf left = left_of<A>(t);
  const V d = get<T, Part>(job.da, first + c, n) * (z < V{} ? left.slope : 1.f - left.slope);
  put<F, Part>(d_bias, c, get<F, Part>(d_bias, c, n) + d, n);
  put<T, Part>(job.dh, first + c, d, n);
  if constexpr (Recompute) put<T, Part>(job.a, first + c, value_of<A>(z, t, left), n);
}

template <Element T, Activation A>
void forward_band(const BiasActPass& pass, int64_t band, int) {
  const BiasAct job = pass.job;  // a copy: else the compiler must assume that the stores below change its pointers
  const int64_t width = job.width, even = width / LANES * LANES, rest = width - even;
  const int64_t end = std::min(job.rows, (band + 1) * pass.band_rows);
  for (int64_t r = band * pass.band_rows; r < end; ++r) {
    for (int64_t c = 0; c < even; c += LANES) forward_at<T, A, false>(job, r * width, c, LANES);
    if (rest) forward_at<T, A, true>(job, r * width, even, rest);
  }
}

template <Element T, Activation A, bool Recompute>
void backward_rows(const BiasActBackward& of, int64_t r, int64_t end, float* d_bias) {
  const BiasActBackward job = of;
  const int64_t width = job.width, even = width / LANES * LANES, rest = width - even;
  for (; r < end; ++r) {
    for (int64_t c = 0; c < even; c += LANES) backward_at<T, A, Recompute, false>(job, r * width, c, LANES, d_bias);
    if (rest) backward_at<T, A, Recompute, true>(job, r * width, even, rest, d_bias);
  }
}

template <Element T, Activation A>
void backward_band(const BiasActBackwardPass& pass, int64_t band, int) {
  const int64_t first = band * pass.band_rows, end = std::min(pass.job.rows, first + pass.band_rows);
  float* d_bias = pass.sums + band * pass.job.width;
  std::fill(d_bias, d_bias + pass.job.width, 0.f);
  if (pass.job.a)
    backward_rows<T, A, true>(pass.job, first, end, d_bias);
  else
    backward_rows<T, A, false>(pass.job, first, end, d_bias);
}

template <Element T>
Kernels kernels() {
  return {{forward_band<T, Activation::gelu>, forward_band<T, Activation::gelu_tanh>,
           forward_band<T, Activation::quick_gelu>},
          {backward_band<T, Activation::gelu>, backward_band<T, Activation::gelu_tanh>,
           backward_band<T, Activation::quick_gelu>}};
}
