// Detects the CPU's instruction set.
#include "isa.h"

namespace lift_fast {

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Every CPU with AVX2 also has F16C.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::scalar;
}

}  // namespace lift_fast
