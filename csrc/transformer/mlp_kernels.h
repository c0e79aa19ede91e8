// The loops of mlp.cpp over vectors.h; see isas.h.
#include "transformer/tokens.h"

struct Left {
  V value, slope;  // of Phi(z), by which the activation multiplies z, and of the activation's derivative, at z = -t
};

// c0 + c1 x + ... + c5 x^5, in half the steps of Horner's: it is what waits for what that takes time here.
INLINE V polynomial(V x, float c0, float c1, float c2, float c3, float c4, float c5) {
  const V square = x * x;
  return ((x * c5 + c4) * square + (x * c3 + c2)) * square + (x * c1 + c0);
}

// 2^y for -125 <= y <= 0 to 9e-8 of itself: 2^n 2^f with |f| <= 1/2, n added to the exponent.
INLINE V exp2_of(V y) {
  const V shifted = y + 12582912.f;  // 1.5 * 2^23: the nearest integer is in the low bits now
  const V f = y - (shifted - 12582912.f);
  const V p = polynomial(f, 1.f, kExp2[0], kExp2[1], kExp2[2], kExp2[3], kExp2[4]);
  return (V)((I)p + ((I)shifted << 23));
}

template <Activation A>
INLINE Left left_of(V t) {
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

// |z|, but where Phi(-|z|) is nearly 2^-125 that point: beyond it, all is 0 or z in float32. A NaN stays one.
template <Activation A>
INLINE V size_of(V z) {
  return smaller(splat(kMost<A>), (V)((I)z & 0x7fffffff));
}

template <Activation A>
INLINE V value_of(V z, V t, const Left& left) {
  return larger(V{}, z) - t * left.value;
}

template <Element T, Activation A, bool Part>
INLINE void forward_at(const BiasAct& job, int64_t first, int64_t c, int64_t n) {
  const V z = get<T, Part>(job.h, first + c, n) + get<Element::f32, Part>(job.bias, c, n);
  const V t = size_of<A>(z);
  put<T, Part>(job.a, first + c, value_of<A>(z, t, left_of<A>(t)), n);
}

template <Element T, Activation A, bool Again, bool Part>
INLINE void backward_at(const BiasActBackward& job, int64_t first, int64_t c, int64_t n, float* d_bias) {
  constexpr Element F = Element::f32;
  const V z = get<T, Part>(job.h, first + c, n) + get<F, Part>(job.bias, c, n);
  const V t = size_of<A>(z);
  const Left left = left_of<A>(t);
  const V d = get<T, Part>(job.da, first + c, n) * (z < V{} ? left.slope : 1.f - left.slope);
  put<F, Part>(d_bias, c, get<F, Part>(d_bias, c, n) + d, n);
  put<T, Part>(job.dh, first + c, d, n);
  if constexpr (Again) put<T, Part>(job.a, first + c, value_of<A>(z, t, left), n);
}

template <Element T, Activation A>
void forward_block(const BiasActPass& pass, int64_t block, int) {
  const BiasAct job = pass.job;  // a copy: what is written might else be taken for a change of its pointers
  const int64_t width = job.width, even = width / LANES * LANES, rest = width - even;
  const int64_t end = std::min(job.rows, (block + 1) * pass.block_rows);
  for (int64_t r = block * pass.block_rows; r < end; ++r) {
    for (int64_t c = 0; c < even; c += LANES) forward_at<T, A, false>(job, r * width, c, LANES);
    if (rest) forward_at<T, A, true>(job, r * width, even, rest);
  }
}

template <Element T, Activation A, bool Again>
void backward_rows(const BiasActBackward& at, int64_t r, int64_t end, float* d_bias) {
  const BiasActBackward job = at;
  const int64_t width = job.width, even = width / LANES * LANES, rest = width - even;
  for (; r < end; ++r) {
    for (int64_t c = 0; c < even; c += LANES) backward_at<T, A, Again, false>(job, r * width, c, LANES, d_bias);
    if (rest) backward_at<T, A, Again, true>(job, r * width, even, rest, d_bias);
  }
}

template <Element T, Activation A>
void backward_block(const BiasActBackwardPass& pass, int64_t block, int) {
  const int64_t first = block * pass.block_rows, end = std::min(pass.job.rows, first + pass.block_rows);
  float* d_bias = pass.sums + block * pass.job.width;
  std::fill(d_bias, d_bias + pass.job.width, 0.f);
  if (pass.job.a)
    backward_rows<T, A, true>(pass.job, first, end, d_bias);
  else
    backward_rows<T, A, false>(pass.job, first, end, d_bias);
}

template <Element T>
Kernels kernels() {
  return {{forward_block<T, Activation::gelu>, forward_block<T, Activation::gelu_tanh>,
           forward_block<T, Activation::quick_gelu>},
          {backward_block<T, Activation::gelu>, backward_block<T, Activation::gelu_tanh>,
           backward_block<T, Activation::quick_gelu>}};
}
