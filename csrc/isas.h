// Includes KERNELS, a file of loops over vectors.h, once for every instruction set: namespaces scalar, avx2, avx512,
// avx512_bf16.
// The includer stands inside a namespace, has included <immintrin.h> on x86-64, floats.h and blocks.h, and has a struct
// Kernels, of functions, which KERNELS fills: template <Element T> Kernels kernels().

#define INLINE static inline __attribute__((always_inline))

template <Element T>
using Raw = std::conditional_t<T == Element::f32, float, uint16_t>;

#define BF16 0
namespace scalar {
#define LANES 4
#include "vectors.h"
#include KERNELS
#undef LANES
}  // namespace scalar

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#define LANES 8
#include "vectors.h"
#include KERNELS
#undef LANES
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,prefer-vector-width=512")
namespace avx512 {
#define LANES 16
#include "vectors.h"
#include KERNELS
#undef LANES
}  // namespace avx512
#pragma GCC pop_options
#undef BF16

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c,prefer-vector-width=512")
namespace avx512_bf16 {
#define LANES 16
#define BF16 1
#include "vectors.h"
#include KERNELS
#undef LANES
}  // namespace avx512_bf16
#pragma GCC pop_options
#endif
#undef BF16

template <Element T>
Kernels kernels_on(PairsIsa isa) {
#if defined(__x86_64__)
  isa = std::min(isa, best_pairs_isa());
  if (T == Element::bf16 && isa == PairsIsa::avx512_bf16) return avx512_bf16::kernels<Element::bf16>();
  if (isa >= PairsIsa::avx512) return avx512::kernels<T>();
  if (isa == PairsIsa::avx2) return avx2::kernels<T>();
#endif
  return scalar::kernels<T>();
}

Kernels kernels_for(Element type, PairsIsa isa) {
  if (type == Element::f32) return kernels_on<Element::f32>(isa);
  return type == Element::bf16 ? kernels_on<Element::bf16>(isa) : kernels_on<Element::f16>(isa);
}
