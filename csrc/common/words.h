// What the loops over words share, pairs_kernels.h and attention_kernels.h; see isas.h.
//
// A "word" is 32 bits: one float, or two bf16 neighbours along the summed dimension. Then one micro-tile does both:
//   C[6, VECTORS LANES] += sum_k A[6, k] B[k, VECTORS LANES]
// with its sums in registers.

typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef float Vu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE V load(const float* p) { return *reinterpret_cast<const Vu*>(p); }
INLINE void store(float* p, V v) { *reinterpret_cast<Vu*>(p) = v; }
INLINE V splat(float x) { return x - V{}; }
INLINE V larger(V a, V b) { return a > b ? a : b; }

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

template <bool Bf16>
INLINE V multiply_add(float a, V b, V c) {
#if BF16
  if constexpr (Bf16) return (V)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
#endif
  return a * b + c;
}

// to[k, c] = from[c, k] for LANES rows c and `count` <= LANES words k.
INLINE void turn(const float* from, int64_t stride, float* to, int64_t to_stride, int64_t count) {
#if LANES == 16
  // Four times rows i and i + 8 are interleaved into rows 2 i and 2 i + 1.
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
