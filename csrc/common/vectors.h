// Vectors of LANES floats, for words.h and for the layernorm and mlp loops; see isas.h.

typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef float Vu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE V splat(float x) { return x - V{}; }

// a < b ? a : b, which is b if either is NaN.
INLINE V smaller(V a, V b) {
#if LANES == 16
  return (V)_mm512_min_ps((__m512)a, (__m512)b);
#elif LANES == 8
  return (V)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// a > b ? a : b, which is b if either is NaN.
INLINE V larger(V a, V b) {
#if LANES == 16
  return (V)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
  return (V)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
