// KERNELS, a file of layernorm's or mlp's loops, on every instruction set, and the choice among them. The includer
// stands inside a namespace, has included floats.h and blocks.h, and has a struct Kernels, of functions, which KERNELS
// fills: template <Element T> Kernels kernels().

template <Element T>
using Raw = std::conditional_t<T == Element::f32, float, uint16_t>;

#include "common/isas.h"

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
