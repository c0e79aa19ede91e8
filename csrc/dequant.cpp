// Gather rows of int8 codes and widen them, on the CPU: out[i, c] = round(codes[rows[i], c] * scales[rows[i]]).
//
//   for each thread's share of the rows:
//     for i in share:                        one row: dim bytes in, 4 or 2 x dim bytes out
//       for c in 0, 32, 64, ...:             32 codes -> int32 -> float32 -> x scale -> round -> store
//         prefetch codes[rows[i + 2], c]     a random row is a cache miss that hardware does not foresee
//
// One multiplication an element: memory is the bound. Stores that go around the cache (when the output would
// not fit in it anyway) save reading each line before it is written: 12 KB of traffic a row instead of 20 for
// dim 4096 and bf16. All instruction sets give the same bits: int8 -> float32 is exact, the product is rounded
// once to float32 and once to the output, to nearest even; bf16 writes every NaN as 0x7fc0.
#include <algorithm>
#include <cstring>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#include "floats.h"
#include "ops.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lift_fast {
namespace {

// Below this much output a second thread costs more to start (about 20 us) than it saves.
constexpr int64_t kBytesPerThread = 1 << 19;
// Above this much output (a core's share of a last-level cache) the stores go around the cache.
constexpr int64_t kStreamBytes = 8 << 20;
constexpr int64_t kAhead = 2;  // rows

template <Out T>
using Element = std::conditional_t<T == Out::f32, float, uint16_t>;

template <Out T>
inline Element<T> widen(int8_t code, float scale) {
  const float x = static_cast<float>(code) * scale;
  if constexpr (T == Out::f32) return x;
  if constexpr (T == Out::bf16) return to_bf16(x);
  if constexpr (T == Out::f16) return to_f16(x);
}

template <Out T>
inline void tail(const int8_t* code, float scale, Element<T>* out, int64_t from, int64_t to) {
  for (int64_t c = from; c < to; ++c) out[c] = widen<T>(code[c], scale);
}

struct Row {
  const int8_t* code;
  const int8_t* ahead;  // the row to prefetch, or this one
  float scale;
};

inline Row row_at(const Dequant& job, int64_t i, int64_t last) {
  const int64_t row = job.rows ? job.rows[i] : i;
  const int64_t next = std::min(i + kAhead, last - 1);
  const int64_t ahead = job.rows ? job.rows[next] : next;
  return {job.codes + row * job.codes_stride, job.codes + ahead * job.codes_stride,
          job.scales ? job.scales[row * job.scales_stride] : 1.f};
}

template <Out T, bool Stream>
void share_scalar(const Dequant& job, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    const Row row = row_at(job, i, last);
    tail<T>(row.code, row.scale, static_cast<Element<T>*>(job.out) + i * job.dim, 0, job.dim);
  }
}

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2,f16c")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx2,f16c")))

template <bool Stream>
AVX2 inline void store256(void* to, __m256i value) {
  if constexpr (Stream)
    _mm256_stream_si256(static_cast<__m256i*>(to), value);
  else
    _mm256_storeu_si256(static_cast<__m256i*>(to), value);
}

AVX2 inline __m256 product256(const int8_t* code, __m256 scale) {
  const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(code));
  return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)), scale);
}

// bf16 in the low half of each 32-bit lane.
AVX2 inline __m256i bf16_lanes256(__m256 x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
}

template <Out T, bool Stream>
AVX2 void share_avx2(const Dequant& job, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    const Row row = row_at(job, i, last);
    const __m256 scale = _mm256_set1_ps(row.scale);
    auto* out = static_cast<Element<T>*>(job.out) + i * job.dim;
    int64_t c = 0;
    for (; c + 32 <= job.dim; c += 32) {
      _mm_prefetch(reinterpret_cast<const char*>(row.ahead + c), _MM_HINT_T0);
      for (int64_t k = c; k < c + 32; k += 16) {
        const __m256 low = product256(row.code + k, scale), high = product256(row.code + k + 8, scale);
        if constexpr (T == Out::f32) {
          store256<Stream>(out + k, _mm256_castps_si256(low));
          store256<Stream>(out + k + 8, _mm256_castps_si256(high));
        } else if constexpr (T == Out::bf16) {
          const __m256i packed = _mm256_packus_epi32(bf16_lanes256(low), bf16_lanes256(high));
          store256<Stream>(out + k, _mm256_permute4x64_epi64(packed, 0xd8));
        } else {
          store256<Stream>(out + k, _mm256_set_m128i(_mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT),
                                                     _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT)));
        }
      }
    }
    tail<T>(row.code, row.scale, out, c, job.dim);
  }
  if constexpr (Stream) _mm_sfence();
}

template <bool Stream>
AVX512 inline void store512(void* to, __m512i value) {
  if constexpr (Stream)
    _mm512_stream_si512(static_cast<__m512i*>(to), value);
  else
    _mm512_storeu_si512(to, value);
}

AVX512 inline __m512 product512(const int8_t* code, __m512 scale) {
  const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(code));
  return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen)), scale);
}

// By hand: the bf16 instruction of AVX-512 flushes subnormals to zero, the other paths do not.
AVX512 inline __m256i bf16_512(__m512 x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}

AVX512 inline __m512i join512(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

template <Out T, bool Stream>
AVX512 void share_avx512(const Dequant& job, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    const Row row = row_at(job, i, last);
    const __m512 scale = _mm512_set1_ps(row.scale);
    auto* out = static_cast<Element<T>*>(job.out) + i * job.dim;
    int64_t c = 0;
    for (; c + 32 <= job.dim; c += 32) {
      _mm_prefetch(reinterpret_cast<const char*>(row.ahead + c), _MM_HINT_T0);
      const __m512 low = product512(row.code + c, scale), high = product512(row.code + c + 16, scale);
      if constexpr (T == Out::f32) {
        store512<Stream>(out + c, _mm512_castps_si512(low));
        store512<Stream>(out + c + 16, _mm512_castps_si512(high));
      } else if constexpr (T == Out::bf16) {
        store512<Stream>(out + c, join512(bf16_512(low), bf16_512(high)));
      } else {
        store512<Stream>(out + c, join512(_mm512_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT),
                                          _mm512_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT)));
      }
    }
    tail<T>(row.code, row.scale, out, c, job.dim);
  }
  if constexpr (Stream) _mm_sfence();
}
#endif  // __x86_64__

using Share = void (*)(const Dequant&, int64_t, int64_t);

template <Out T, bool Stream>
Share pick(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return share_avx512<T, Stream>;
  if (isa == Isa::avx2) return share_avx2<T, Stream>;
#endif
  return share_scalar<T, Stream>;
}

template <Out T>
void run(const Dequant& job, int threads, Isa isa) {
  const int64_t row_bytes = job.dim * static_cast<int64_t>(sizeof(Element<T>));
  const bool aligned = reinterpret_cast<std::uintptr_t>(job.out) % 64 == 0 && row_bytes % 64 == 0;
  const bool stream = aligned && job.m * row_bytes >= kStreamBytes;
  const Share share = stream ? pick<T, true>(isa) : pick<T, false>(isa);

  const int64_t useful = std::min(job.m, job.m * row_bytes / kBytesPerThread);
  const int64_t parts = std::clamp<int64_t>(useful, 1, std::max(threads, 1));
  std::vector<std::thread> others;
  int64_t first = 0;
  // Threads live for one call: nothing to break in a forked data loader, no second OpenMP beside torch's.
  for (int64_t part = 1; part < parts; ++part) {
    const int64_t last = job.m * part / parts;
    try {
      others.emplace_back(share, std::cref(job), first, last);
      first = last;
    } catch (const std::system_error&) {
      break;  // no thread to be had: this one does the rest
    }
  }
  share(job, first, job.m);
  for (auto& other : others) other.join();
}

}  // namespace

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Every CPU with AVX2 has F16C.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) return Isa::avx512;
  if (__builtin_cpu_supports("avx2")) return Isa::avx2;
#endif
  return Isa::scalar;
}

int64_t first_row_outside(const Dequant& job) {
  if (job.rows)
    for (int64_t i = 0; i < job.m; ++i)
      if (job.rows[i] < 0 || job.rows[i] >= job.n) return i;
  return -1;
}

void dequant_cpu(const Dequant& job, int threads, Isa isa) {
  if (job.m == 0 || job.dim == 0) return;
  isa = std::min(isa, best_isa());
  if (job.type == Out::f32) run<Out::f32>(job, threads, isa);
  if (job.type == Out::bf16) run<Out::bf16>(job, threads, isa);
  if (job.type == Out::f16) run<Out::f16>(job, threads, isa);
}

}  // namespace lift_fast
