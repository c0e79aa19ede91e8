// What the loops of pairs_kernels.h and attention_kernels.h share; see isas.h.
//
// A "word" is 32 bits: one float, or two bfloat16 that are neighbours along the summed dimension. So one micro-tile
// serves both:
//   C[6, VECTORS LANES] += sum_k A[6, k] B[k, VECTORS LANES]
// with its sums in registers. A word of A is broadcast to all lanes.
#include "common/vectors.h"

INLINE V load(const float* p) { return *reinterpret_cast<const Vu*>(p); }
INLINE void store(float* p, V v) { *reinterpret_cast<Vu*>(p) = v; }

INLINE float sum_of(V v) {
  float sum = 0;
  for (int k = 0; k < LANES; ++k) sum += v[k];
  return sum;
}

INLINE float max_of(V v) {
  float most = v[0];
  for (int k = 1; k < LANES; ++k) most = v[k] > most ? v[k] : most;
  return most;
}

// 2^(n + f) for |f| <= 1/2, where n is an integer and `shifted` is n + 1.5 2^23, whose low bits are n.
INLINE V exp2_of(V shifted, V f) {
  V p = f * kExp2[6] + kExp2[5];
  for (int k = 4; k >= 0; --k) p = p * f + kExp2[k];
  return p * (V)(((I)shifted + 127) << 23);
}

template <bool Bf16>
INLINE V multiply_add(float a, V b, V c) {
#if BF16
  if constexpr (Bf16) return (V)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
#endif
  return a * b + c;
}

// A micro-tile's sums: N vectors of each row, from c, or zeros unless `add`.
template <int N>
INLINE void load_sums(V (&sums)[kMicroRows][N], const float* c, int64_t ldc, bool add) {
#pragma GCC unroll 8
  for (int m = 0; m < kMicroRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) sums[m][v] = add ? load(c + m * ldc + v * LANES) : V{};
}

// sums[m] += a[m * row] b for one word of each row of A.
template <bool Bf16, int N>
INLINE void add_word(V (&sums)[kMicroRows][N], const float* a, int64_t row, const float* b) {
  V bs[N];
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) bs[v] = load(b + v * LANES);
#pragma GCC unroll 8
  for (int m = 0; m < kMicroRows; ++m) {
    const float am = a[m * row];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) sums[m][v] = multiply_add<Bf16>(am, bs[v], sums[m][v]);
  }
}

template <int N>
INLINE void store_sums(const V (&sums)[kMicroRows][N], float* c, int64_t ldc) {
#pragma GCC unroll 8
  for (int m = 0; m < kMicroRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) store(c + m * ldc + v * LANES, sums[m][v]);
}

// Transposes: to[k, c] = from[c, k] for LANES rows c and `count` <= LANES words k.
INLINE void transpose(const float* from, int64_t stride, float* to, int64_t to_stride, int64_t count) {
#if LANES == 16
  // Four times, rows i and i + 8 are interleaved into rows 2 i and 2 i + 1.
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  __m512 rows[2][16];
#pragma GCC unroll 16
  for (int c = 0; c < 16; ++c) rows[0][c] = _mm512_loadu_ps(from + c * stride);
#pragma GCC unroll 4
  for (int stage = 0; stage < 4; ++stage)
#pragma GCC unroll 8
    for (int c = 0; c < 8; ++c) {
      const __m512 a = rows[stage % 2][c], b = rows[stage % 2][c + 8];
      rows[1 - stage % 2][2 * c] = _mm512_permutex2var_ps(a, low, b);
      rows[1 - stage % 2][2 * c + 1] = _mm512_permutex2var_ps(a, high, b);
    }
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k)
    if (k < count) _mm512_storeu_ps(to + k * to_stride, rows[0][k]);
#else
  for (int64_t k = 0; k < count; ++k)
    for (int c = 0; c < LANES; ++c) to[k * to_stride + c] = from[c * stride + k];
#endif
}
