// Compiles KERNELS, the loops of layernorm or mlp, for every instruction set, and chooses among them. The file that
// includes this does so inside a namespace, after floats.h and blocks.h, and has defined a struct Kernels of functions,
// which KERNELS returns filled: template <Element T> Kernels kernels().

template <Element T>
using Raw = std::conditional_t<T == Element::f32, float, uint16_t>;

#include "common/isas.h"

template <Element T>
Kernels kernels_on(Isa isa) {
#if defined(__x86_64__)
  isa = std::min(isa, best_isa());
  if (T == Element::bf16 && isa == Isa::avx512_bf16) return avx512_bf16::kernels<Element::bf16>();
  if (isa >= Isa::avx512) return avx512::kernels<T>();
  if (isa == Isa::avx2) return avx2::kernels<T>();
#endif
  return scalar::kernels<T>();
}

Kernels kernels_for(Element type, Isa isa) {
  if (type == Element::f32) return kernels_on<Element::f32>(isa);
  return type == Element::bf16 ? kernels_on<Element::bf16>(isa) : kernels_on<Element::f16>(isa);
}
