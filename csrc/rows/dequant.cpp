// Gathers rows of codes and dequantizes them, on the CPU:
//
//   out[i, c] = round(value(codes[rows[i], c]) * scales[rows[i]])
//
//   each thread takes bands of rows (gather.h):
//     for i in band:                         one row: dim * bits / 8 bytes in, 4, 2 or 1 x dim bytes out
//       prefetch: the scale and the first and last line of a row 4 or more rows ahead; line by line, the codes of one
//       half as far: a random row is a cache and a TLB miss that the hardware does not foresee
//       for c in 0, 32, 64, ...:             int8: 32 codes -> float32 -> x scale -> round -> store
//                                            int4r, int2r: the row's 16 or 4 outputs, once; one shuffle for 32 codes
//
// One multiplication an element: memory is the bound. Where the output would not fit in the cache anyway, stores bypass
// it, so that no line is read before it is written: 12 KB of traffic a row of int8 instead of 20 for dim 4096 and bf16.
// All instruction sets give the same bits: the value of a code is exact in float32, and the product is rounded once to
// float32 and once to the output, to nearest even; bf16 writes every NaN as 0x7fc0.
#include "dequant.h"

#include <cmath>
#include <type_traits>

#include "common/floats.h"
#include "gather.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lift_fast {
namespace {

// With this much output, more than a core's own cache holds, stores bypass the cache.
constexpr int64_t kStreamBytes = 2 << 20;
constexpr uint32_t kNan = 0x7fc00000;

template <Codec C>
constexpr int kBits = code_bits(C);
template <Codec C>
constexpr bool kInteger = is_integer(C);
template <Codec C>
constexpr bool kScaled = kInteger<C> || C == Codec::fp8;

// The code books of lift_fast/ops/rows/codecs.py, repeated over the width of a vector.
#define LEVELS4 -104, -79, -62, -48, -36, -25, -15, -5, 5, 15, 25, 36, 48, 62, 79, 104
#define LEVELS2 -110, -33, 33, 110
alignas(64) constexpr int8_t kLevels4[32] = {LEVELS4, LEVELS4};
alignas(64) constexpr int8_t kLevels2[32] = {LEVELS2, LEVELS2, LEVELS2, LEVELS2, LEVELS2, LEVELS2, LEVELS2, LEVELS2};
#undef LEVELS4
#undef LEVELS2

// Non-temporally: a row is read once, so it should not stay in the outer caches.
inline void prefetch_row(const void* at) { __builtin_prefetch(at, 0, 0); }

template <Codec C>
constexpr const int8_t* kLevels = C == Codec::int4r ? kLevels4 : kLevels2;

template <Element T>
using Stored = std::conditional_t<T == Element::f32, float, uint16_t>;

inline float from_fp8(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80) << 24, magnitude = code & 0x7f;
  if (magnitude == 0x7f) return float_of(kNan);
  if (magnitude < 8) return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-9f));
  return float_of(sign | ((magnitude << 20) + (120u << 23)));
}

template <Codec C>
inline int level_at(const uint8_t* row, int64_t c) {
  if constexpr (C == Codec::int8) return static_cast<int8_t>(row[c]);
  if constexpr (C == Codec::int4r) return kLevels4[row[c / 2] >> (c % 2 * 4) & 15];
  if constexpr (C == Codec::int2r) return kLevels2[row[c / 4] >> (c % 4 * 2) & 3];
}

template <Codec C>
inline float value_at(const uint8_t* row, int64_t c) {
  if constexpr (C == Codec::f32) return load<float>(row + 4 * c);
  if constexpr (C == Codec::bf16) return float_of(static_cast<uint32_t>(load<uint16_t>(row + 2 * c)) << 16);
  if constexpr (C == Codec::fp8) return from_fp8(row[c]);
  if constexpr (kInteger<C>) return static_cast<float>(level_at<C>(row, c));
}

template <Element T>
inline void store(void* out, int64_t c, float x) {
  Stored<T> element;
  if constexpr (T == Element::f32) element = x;
  if constexpr (T == Element::bf16) element = to_bf16(x);
  if constexpr (T == Element::f16) element = to_f16(x);
  std::memcpy(static_cast<uint8_t*>(out) + c * sizeof element, &element, sizeof element);
}

// The product of two NaNs is either of them, as the compiler likes; one NaN for all makes the bits the same.
template <Codec C>
inline float one_nan(float scale) {
  return C == Codec::fp8 && scale != scale ? float_of(kNan) : scale;
}

template <Codec C, Element T>
inline void tail(const uint8_t* codes, float scale, void* out, int64_t from, int64_t to) {
  for (int64_t c = from; c < to; ++c) {
    const float value = value_at<C>(codes, c);
    store<T>(out, c, kScaled<C> ? value * scale : value);
  }
}

template <Element T>
inline void fill_nan(void* out, int64_t dim) {
  for (int64_t c = 0; c < dim; ++c) store<T>(out, c, float_of(kNan));
}

// One over a row's length. For integer codecs the sum of squares is exact, and the factor takes the scale's place.
inline float unit_factor(int64_t squares) {
  return squares ? 1.f / std::sqrt(static_cast<float>(squares)) : 0.f;
}

template <Codec C>
inline int64_t sum_of_squares_tail(const uint8_t* codes, int64_t from, int64_t to) {
  int64_t sum = 0;
  for (int64_t c = from; c < to; ++c) sum += level_at<C>(codes, c) * level_at<C>(codes, c);
  return sum;
}

// The other codecs: in float64, where no square of a float32 overflows or is rounded, and in 16 sums whatever the
// instruction set.
inline double unit_factor_double(double squares) { return squares > 0 ? 1 / std::sqrt(squares) : 0; }

template <Codec C>
inline double finish_squares(double* lanes, const uint8_t* codes, int64_t from, int64_t to) {
  for (int64_t c = from; c < to; ++c) {
    const double value = value_at<C>(codes, c);
    lanes[c % 16] += value * value;
  }
  for (int half = 8; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  return lanes[0];
}

template <Codec C, Element T>
inline void unit_tail(const uint8_t* codes, double factor, void* out, int64_t from, int64_t to) {
  for (int64_t c = from; c < to; ++c) store<T>(out, c, static_cast<float>(value_at<C>(codes, c) * factor));
}

namespace scalar {

template <Codec C, Element T>
void row(const uint8_t* codes, float scale, void* out, int64_t dim, const uint8_t*) {
  tail<C, T>(codes, one_nan<C>(scale), out, 0, dim);
}

template <Codec C, Element T>
void unit_row(const uint8_t* codes, float, void* out, int64_t dim, const uint8_t*) {
  if constexpr (kInteger<C>) {
    tail<C, T>(codes, unit_factor(sum_of_squares_tail<C>(codes, 0, dim)), out, 0, dim);
  } else {
    double lanes[16] = {};
    const double squares = finish_squares<C>(lanes, codes, 0, dim);
    if (squares != squares) return fill_nan<T>(out, dim);
    unit_tail<C, T>(codes, unit_factor_double(squares), out, 0, dim);
  }
}

template <Codec C>
void level_row(const uint8_t* codes, float, void* out, int64_t dim, const uint8_t*) {
  for (int64_t c = 0; c < dim; ++c) static_cast<int8_t*>(out)[c] = static_cast<int8_t>(level_at<C>(codes, c));
}

void copy_row(const uint8_t* codes, float, void* out, int64_t bytes, const uint8_t*) {
  std::memcpy(out, codes, bytes);
}

template <Codec C>
RowKernel pick(Element type, bool normalize) {
  if (type == Element::f32) return normalize ? unit_row<C, Element::f32> : row<C, Element::f32>;
  if (type == Element::bf16) return normalize ? unit_row<C, Element::bf16> : row<C, Element::bf16>;
  return normalize ? unit_row<C, Element::f16> : row<C, Element::f16>;
}

RowKernel pick(Codec codec, Element type, bool normalize) {
  return with_codec(codec, [&](auto c) { return pick<c()>(type, normalize); });
}

}  // namespace scalar

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
namespace avx2 {

struct Floats {
  __m256 part[4];
};

template <bool Stream>
inline void store256(void* to, __m256i value) {
  if constexpr (Stream)
    _mm256_stream_si256(static_cast<__m256i*>(to), value);
  else
    _mm256_storeu_si256(static_cast<__m256i*>(to), value);
}

inline __m128i load128(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
inline __m128i load64(const uint8_t* from) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)); }

// 16 codes of e4m3 as float16 / 256, which represents every value, subnormals too; NaN is set where the encodings
// differ.
inline __m256i half_of_fp8(__m128i codes) {
  const __m256i word = _mm256_cvtepu8_epi16(codes), magnitude = _mm256_and_si256(word, _mm256_set1_epi16(0x7f));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(word, _mm256_set1_epi16(0x80)), 8);
  const __m256i nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f));
  const __m256i half = _mm256_or_si256(_mm256_slli_epi16(magnitude, 7), sign);
  return _mm256_blendv_epi8(half, _mm256_set1_epi16(0x7e00), nan);
}

template <Codec C>
inline Floats floats(const uint8_t* codes) {
  Floats x;
  for (int k = 0; k < 4; ++k) {
    if constexpr (C == Codec::f32) {
      x.part[k] = _mm256_loadu_ps(reinterpret_cast<const float*>(codes + 32 * k));
    } else if constexpr (C == Codec::bf16) {
      x.part[k] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(codes + 16 * k)), 16));
    } else if constexpr (C == Codec::int8) {
      x.part[k] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load64(codes + 8 * k)));
    } else {
      const __m128i half = _mm256_castsi256_si128(half_of_fp8(load64(codes + 8 * k)));
      x.part[k] = _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256));
    }
  }
  return x;
}

template <Codec C>
inline Floats levels() {
  return floats<Codec::int8>(reinterpret_cast<const uint8_t*>(kLevels<C>));
}

inline Floats times(Floats x, float scale) {
  for (__m256& part : x.part) part = _mm256_mul_ps(part, _mm256_set1_ps(scale));
  return x;
}

inline __m256d low_double(__m256 x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
inline __m256d high_double(__m256 x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }

inline Floats times_double(Floats x, double factor) {
  const __m256d by = _mm256_set1_pd(factor);
  for (__m256& part : x.part)
    part = _mm256_set_m128(_mm256_cvtpd_ps(_mm256_mul_pd(high_double(part), by)),
                           _mm256_cvtpd_ps(_mm256_mul_pd(low_double(part), by)));
  return x;
}

struct Squares {
  __m256d sum[4];
  void get(double* lanes) const {
    for (int k = 0; k < 4; ++k) _mm256_store_pd(lanes + 4 * k, sum[k]);
  }
};

inline void add_squares(Squares& squares, const Floats& x) {
  for (int k = 0; k < 4; ++k) {
    const __m256d low = low_double(x.part[k]), high = high_double(x.part[k]);
    __m256d* sum = squares.sum + k % 2 * 2;
    sum[0] = _mm256_add_pd(sum[0], _mm256_mul_pd(low, low));
    sum[1] = _mm256_add_pd(sum[1], _mm256_mul_pd(high, high));
  }
}

// bf16 in the low half of each 32-bit lane.
inline __m256i bf16_lanes(__m256 x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
}

template <Element T, bool Stream>
inline void put(void* to, const Floats& x) {
  auto* out = static_cast<uint8_t*>(to);
  if constexpr (T == Element::f32) {
    for (int k = 0; k < 4; ++k) store256<Stream>(out + 32 * k, _mm256_castps_si256(x.part[k]));
  } else {
    for (int k = 0; k < 2; ++k) {
      const __m256 low = x.part[2 * k], high = x.part[2 * k + 1];
      if constexpr (T == Element::bf16) {
        const __m256i packed = _mm256_packus_epi32(bf16_lanes(low), bf16_lanes(high));
        store256<Stream>(out + 32 * k, _mm256_permute4x64_epi64(packed, 0xd8));
      } else {
        store256<Stream>(out + 32 * k, _mm256_set_m128i(_mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT),
                                                        _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT)));
      }
    }
  }
}

// Unpacks 32 codes, a byte each.
template <Codec C>
inline __m256i unpack(const uint8_t* codes) {
  if constexpr (C == Codec::int4r) {
    const __m256i pair = _mm256_cvtepu8_epi16(load128(codes));
    return _mm256_and_si256(_mm256_or_si256(pair, _mm256_slli_epi16(pair, 4)), _mm256_set1_epi8(15));
  } else {
    __m256i four = _mm256_cvtepu8_epi32(load64(codes));
    four = _mm256_or_si256(four, _mm256_slli_epi32(four, 12));
    return _mm256_and_si256(_mm256_or_si256(four, _mm256_slli_epi32(four, 6)), _mm256_set1_epi8(3));
  }
}

// The integers of 32 elements.
template <Codec C>
inline __m256i integers(const uint8_t* codes) {
  if constexpr (C == Codec::int8)
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  else
    return _mm256_shuffle_epi8(_mm256_load_si256(reinterpret_cast<const __m256i*>(kLevels<C>)), unpack<C>(codes));
}

template <Element T>
struct Lookup {  // of 16-bit outputs: their low and their high bytes
  __m256i low, high;
  explicit Lookup(const uint16_t* table) {
    const __m256i words = _mm256_load_si256(reinterpret_cast<const __m256i*>(table));
    const __m256i lows = _mm256_and_si256(words, _mm256_set1_epi16(0xff)), highs = _mm256_srli_epi16(words, 8);
    // Both 128-bit lanes get the bytes of all 16 words.
    low = _mm256_permute4x64_epi64(_mm256_packus_epi16(lows, lows), 0x88);
    high = _mm256_permute4x64_epi64(_mm256_packus_epi16(highs, highs), 0x88);
  }
  template <Codec C, bool Stream>
  void put(void* to, const uint8_t* codes) const {
    auto* out = static_cast<uint8_t*>(to);
    const __m256i index = unpack<C>(codes);
    const __m256i l = _mm256_shuffle_epi8(low, index), h = _mm256_shuffle_epi8(high, index);
    const __m256i first = _mm256_unpacklo_epi8(l, h), second = _mm256_unpackhi_epi8(l, h);
    store256<Stream>(out, _mm256_permute2x128_si256(first, second, 0x20));
    store256<Stream>(out + 32, _mm256_permute2x128_si256(first, second, 0x31));
  }
};

template <>
struct Lookup<Element::f32> {
  __m256 low, high;
  explicit Lookup(const float* table) : low(_mm256_load_ps(table)), high(_mm256_load_ps(table + 8)) {}
  template <Codec C, bool Stream>
  void put(void* to, const uint8_t* codes) const {
    auto* out = static_cast<uint8_t*>(to);
    for (int k = 0; k < 4; ++k) {
      __m256 x;
      if constexpr (C == Codec::int4r) {
        const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(load<int32_t>(codes + 4 * k)),
                                                _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
        x = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
                             _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
      } else {
        const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(load<uint16_t>(codes + 2 * k)),
                                                _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
        x = _mm256_permutevar8x32_ps(low, index);  // the table's upper four repeat its lower four
      }
      store256<Stream>(out + 32 * k, _mm256_castps_si256(x));
    }
  }
};

inline int64_t sum_lanes(__m256i lanes) {
  alignas(32) int32_t each[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(each), lanes);
  int64_t sum = 0;
  for (const int32_t lane : each) sum += lane;
  return sum;
}

template <Codec C>
int64_t sum_of_squares(const uint8_t* codes, int64_t dim) {
  constexpr int64_t most = 32 * 16384;  // elements whose squares fit in the 32-bit sums
  int64_t sum = 0, c = 0;
  while (c + 32 <= dim) {
    __m256i lanes = _mm256_setzero_si256();
    for (const int64_t end = dim - c > most ? c + most : dim; c + 32 <= end; c += 32) {
      const __m256i x = integers<C>(codes + c * kBits<C> / 8);
      const __m256i low = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(x));
      const __m256i high = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(x, 1));
      lanes = _mm256_add_epi32(lanes, _mm256_add_epi32(_mm256_madd_epi16(low, low), _mm256_madd_epi16(high, high)));
    }
    sum += sum_lanes(lanes);
  }
  return sum + sum_of_squares_tail<C>(codes, c, dim);
}

#include "dequant_kernels.h"

template <Codec C, bool Stream>
void level_row(const uint8_t* codes, float, void* to, int64_t dim, const uint8_t* ahead) {
  auto* out = static_cast<int8_t*>(to);
  int64_t c = groups<C>(codes, dim, ahead, [&](const uint8_t* from, int64_t c) __attribute__((always_inline)) {
    store256<Stream>(out + c, integers<C>(from));
  });
  for (; c < dim; ++c) out[c] = static_cast<int8_t>(level_at<C>(codes, c));
}

RowKernel pick_integers(Codec codec, bool stream) {
  if (codec == Codec::int4r) return stream ? level_row<Codec::int4r, true> : level_row<Codec::int4r, false>;
  if (codec == Codec::int2r) return stream ? level_row<Codec::int2r, true> : level_row<Codec::int2r, false>;
  return stream ? level_row<Codec::int8, true> : level_row<Codec::int8, false>;  // copies bytes
}

}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx2,f16c,prefer-vector-width=512")
namespace avx512 {

using avx2::half_of_fp8;
using avx2::load128;
using avx2::load64;
using avx2::sum_of_squares;

struct Floats {
  __m512 low, high;
};

template <bool Stream>
inline void store512(void* to, __m512i value) {
  if constexpr (Stream)
    _mm512_stream_si512(static_cast<__m512i*>(to), value);
  else
    _mm512_storeu_si512(to, value);
}

template <Codec C>
inline __m512 sixteen(const uint8_t* codes) {
  if constexpr (C == Codec::f32) return _mm512_loadu_ps(codes);
  if constexpr (C == Codec::bf16) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
  }
  if constexpr (C == Codec::int8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load128(codes)));
  if constexpr (C == Codec::fp8)
    return _mm512_mul_ps(_mm512_cvtph_ps(half_of_fp8(load128(codes))), _mm512_set1_ps(256));
}

template <Codec C>
inline Floats floats(const uint8_t* codes) {
  return {sixteen<C>(codes), sixteen<C>(codes + 2 * kBits<C>)};
}

template <Codec C>
inline Floats levels() {
  return floats<Codec::int8>(reinterpret_cast<const uint8_t*>(kLevels<C>));
}

inline Floats times(Floats x, float scale) {
  return {_mm512_mul_ps(x.low, _mm512_set1_ps(scale)), _mm512_mul_ps(x.high, _mm512_set1_ps(scale))};
}

inline __m512d low_double(__m512 x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
inline __m512d high_double(__m512 x) {
  return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm512_extracti64x4_epi64(_mm512_castps_si512(x), 1)));
}

inline __m512i join(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

inline __m512 times_double(__m512 x, __m512d factor) {
  return _mm512_castsi512_ps(join(_mm256_castps_si256(_mm512_cvtpd_ps(_mm512_mul_pd(low_double(x), factor))),
                                  _mm256_castps_si256(_mm512_cvtpd_ps(_mm512_mul_pd(high_double(x), factor)))));
}

inline Floats times_double(Floats x, double factor) {
  const __m512d by = _mm512_set1_pd(factor);
  return {times_double(x.low, by), times_double(x.high, by)};
}

struct Squares {
  __m512d low, high;
  void get(double* lanes) const {
    _mm512_store_pd(lanes, low);
    _mm512_store_pd(lanes + 8, high);
  }
};

inline void add_squares(Squares& squares, const Floats& x) {
  for (const __m512 part : {x.low, x.high}) {
    const __m512d low = low_double(part), high = high_double(part);
    squares.low = _mm512_add_pd(squares.low, _mm512_mul_pd(low, low));
    squares.high = _mm512_add_pd(squares.high, _mm512_mul_pd(high, high));
  }
}

// bf16 in the high half of each 32-bit lane.
inline __m512i bf16_lanes(__m512 x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(kNan));
}

alignas(64) constexpr uint16_t kOddWords[] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                              33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};

template <Element T, bool Stream>
inline void put(void* to, const Floats& x) {
  auto* out = static_cast<uint8_t*>(to);
  if constexpr (T == Element::f32) {
    store512<Stream>(out, _mm512_castps_si512(x.low));
    store512<Stream>(out + 64, _mm512_castps_si512(x.high));
  } else if constexpr (T == Element::bf16) {
    store512<Stream>(out, _mm512_permutex2var_epi16(bf16_lanes(x.low), _mm512_load_si512(kOddWords),
                                                    bf16_lanes(x.high)));
  } else {
    store512<Stream>(out, join(_mm512_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT),
                               _mm512_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT)));
  }
}

// A shuffle uses the low 5 bits of its indices. What the shifts leave above a code does not matter: the table of 32
// repeats the outputs.
template <Element T>
struct Lookup {
  __m512i table;
  explicit Lookup(const uint16_t* from) : table(_mm512_load_si512(from)) {}
  template <Codec C, bool Stream>
  void put(void* out, const uint8_t* codes) const {
    __m512i index;
    if constexpr (C == Codec::int4r) {
      const __m512i pair = _mm512_cvtepu8_epi32(load128(codes));
      index = _mm512_or_si512(pair, _mm512_slli_epi32(pair, 12));
    } else {
      __m512i four = _mm512_cvtepu8_epi64(load64(codes));
      four = _mm512_or_si512(four, _mm512_slli_epi64(four, 14));
      index = _mm512_or_si512(four, _mm512_slli_epi64(four, 28));
    }
    store512<Stream>(out, _mm512_permutexvar_epi16(index, table));
  }
};

template <>
struct Lookup<Element::f32> {
  __m512 table;
  explicit Lookup(const float* from) : table(_mm512_load_ps(from)) {}
  template <Codec C, bool Stream>
  void put(void* to, const uint8_t* codes) const {
    auto* out = static_cast<uint8_t*>(to);
    for (int k = 0; k < 2; ++k) {
      __m512i index;
      if constexpr (C == Codec::int4r) {
        const __m512i pair = _mm512_cvtepu8_epi64(load64(codes + 8 * k));
        index = _mm512_or_si512(pair, _mm512_slli_epi64(pair, 28));
      } else {
        index = _mm512_srlv_epi32(_mm512_set1_epi32(load<int32_t>(codes + 4 * k)),
                                  _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30));
      }
      store512<Stream>(out + 64 * k, _mm512_castps_si512(_mm512_permutexvar_ps(index, table)));
    }
  }
};

#include "dequant_kernels.h"

}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16,avx2,f16c,prefer-vector-width=512")
namespace avx512_bf16 {

// The bf16 instruction treats subnormals as zeros, so it serves only scales for which no product but 0 is subnormal.
template <bool Stream>
void int8_row(const uint8_t* codes, float scale, void* to, int64_t dim, const uint8_t* ahead) {
  const float size = scale < 0 ? -scale : scale;
  if (!(size >= 0x1p-126f && size <= 0x1.fffffep127f))
    return avx512::row<Codec::int8, Element::bf16, Stream>(codes, scale, to, dim, ahead);
  auto* out = static_cast<uint16_t*>(to);
  const __m512 by = _mm512_set1_ps(scale);
  int64_t c = 0;
  for (; c + 64 <= dim; c += 64) {
    prefetch_row(ahead + c);
    for (int64_t k = c; k < c + 64; k += 32) {
      const __m512 low = _mm512_mul_ps(avx512::sixteen<Codec::int8>(codes + k), by);
      const __m512 high = _mm512_mul_ps(avx512::sixteen<Codec::int8>(codes + k + 16), by);
      avx512::store512<Stream>(out + k, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    }
  }
  tail<Codec::int8, Element::bf16>(codes, scale, to, c, dim);
}

template <bool Stream>
void int8_unit_row(const uint8_t* codes, float, void* out, int64_t dim, const uint8_t* ahead) {
  int8_row<Stream>(codes, unit_factor(avx2::sum_of_squares<Codec::int8>(codes, dim)), out, dim, ahead);
}

RowKernel pick_int8(bool normalize, bool stream) {
  if (normalize) return stream ? int8_unit_row<true> : int8_unit_row<false>;
  return stream ? int8_row<true> : int8_row<false>;
}

}  // namespace avx512_bf16
#pragma GCC pop_options
#endif  // __x86_64__

RowKernel pick(Codec codec, Element type, bool normalize, bool stream, Isa isa) {
  const bool copied = type == Element::codes || (type == Element::int8 && codec == Codec::int8);
#if defined(__x86_64__)
  if (isa != Isa::scalar) {
    if (copied) return avx2::pick_integers(Codec::int8, stream);
    if (type == Element::int8) return avx2::pick_integers(codec, stream);
    if (isa == Isa::avx2) return avx2::pick(codec, type, normalize, stream);
    if (isa == Isa::avx512_bf16 && codec == Codec::int8 && type == Element::bf16)
      return avx512_bf16::pick_int8(normalize, stream);
    return avx512::pick(codec, type, normalize, stream);
  }
#endif
  if (copied) return scalar::copy_row;
  if (type == Element::int8)
    return codec == Codec::int4r ? scalar::level_row<Codec::int4r> : scalar::level_row<Codec::int2r>;
  return scalar::pick(codec, type, normalize);
}

}  // namespace

Plan plan(Codec codec, Element type, bool normalize, int64_t dim, const void* out, int64_t m, Isa isa) {
  const int64_t bytes = row_bytes(codec, dim), out_bytes = out_row_bytes(codec, type, dim);
  const bool aligned = reinterpret_cast<std::uintptr_t>(out) % 64 == 0 && out_bytes % 64 == 0;
  const bool stream = aligned && m >= kStreamBytes / std::max<int64_t>(out_bytes, 1);
  return {pick(codec, type, normalize, stream, std::min(isa, best_isa())), type == Element::codes ? bytes : dim, bytes,
          out_bytes};
}

void dequant_cpu(const Dequant& job, int threads, Isa isa) {
  const auto* codes = static_cast<const uint8_t*>(job.codes);
  const RowNumbers rows(job.rows, job.m, job.n);
  const auto locate = [&](int64_t i) -> Place {
    const int64_t row = rows[i];
    return {codes + row * job.codes_stride, job.scales ? job.scales + row * job.scales_stride : nullptr};
  };
  gather({job.m, job.out, nullptr, nullptr, plan(job.codec, job.type, job.normalize, job.dim, job.out, job.m, isa)},
         locate, threads);
}

}  // namespace lift_fast
