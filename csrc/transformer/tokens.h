// Tokens read and written as vectors of LANES floats, for the loops of layernorm and mlp; see isas.h.
#include "common/vectors.h"

// v, which is a product, rounded: the compiler may not fuse it into a multiply-add. So in rows of one element g equals
// its mean exactly.
INLINE V rounded(V v) {
#if defined(__x86_64__)
  __asm__("" : "+x"(v));
#endif
  return v;
}

INLINE I iota() {
  I v;
  for (int k = 0; k < LANES; ++k) v[k] = k;
  return v;
}

INLINE float sum_of(V v) {
#if LANES == 16
  return _mm512_reduce_add_ps((__m512)v);
#else
  V high = v;
  for (int half = LANES / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) high[k] = v[half + k];
    v += high;
  }
  return v[0];
#endif
}

// LANES elements as floats.
template <Element T>
INLINE V widen(const Raw<T>* p) {
  if constexpr (T == Element::f32) {
    return *reinterpret_cast<const Vu*>(p);
  } else {
#if LANES == 16
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (T == Element::f16) return (V)_mm512_cvtph_ps(raw);
    return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
#elif LANES == 8
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (T == Element::f16) return (V)_mm256_cvtph_ps(raw);
    return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
#else
    V v;
    for (int k = 0; k < LANES; ++k) v[k] = T == Element::f16 ? from_f16(p[k]) : float_of(uint32_t{p[k]} << 16);
    return v;
#endif
  }
}

// LANES floats rounded to nearest even.
template <Element T>
INLINE void narrow(Raw<T>* p, V v) {
  if constexpr (T == Element::f32) {
    *reinterpret_cast<Vu*>(p) = v;
  } else {
#if LANES > 4 && !BF16
    // Every NaN becomes the same NaN.
    const U u = (U)v;
    const U rounded = v == v ? u + 0x7fffu + (u >> 16 & 1u) : 0x7fc00000u - U{};
#endif
#if LANES == 16
    auto* to = reinterpret_cast<__m256i*>(p);
    if constexpr (T == Element::f16)
      _mm256_storeu_si256(to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    else
#if BF16
      _mm256_storeu_si256(to, (__m256i)_mm512_cvtneps_pbh((__m512)v));  // turns subnormals into zeros
#else
      _mm256_storeu_si256(to, _mm512_cvtepi32_epi16((__m512i)(rounded >> 16)));
#endif
#elif LANES == 8
    auto* to = reinterpret_cast<__m128i*>(p);
    if constexpr (T == Element::f16) {
      _mm_storeu_si128(to, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    } else {
      const __m256i high = (__m256i)(rounded >> 16);
      _mm_storeu_si128(to, _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
    }
#else
    for (int k = 0; k < LANES; ++k) p[k] = T == Element::f16 ? to_f16(v[k]) : to_bf16(v[k]);
#endif
  }
}

// Elements [i, i + LANES); with Part the first n of them, then zeros.
template <Element T, bool Part>
INLINE V get(const void* from, int64_t i, int64_t n) {
  const Raw<T>* at = static_cast<const Raw<T>*>(from) + i;
  if constexpr (!Part) return widen<T>(at);
  Raw<T> part[LANES] = {};
  std::memcpy(part, at, n * sizeof *part);
  return widen<T>(part);
}

// Elements [i, i + LANES); with Part only the first n.
template <Element T, bool Part>
INLINE void put(void* to, int64_t i, V v, int64_t n) {
  Raw<T>* at = static_cast<Raw<T>*>(to) + i;
  if constexpr (!Part) return narrow<T>(at, v);
  Raw<T> part[LANES];
  narrow<T>(part, v);
  std::memcpy(at, part, n * sizeof *part);
}
