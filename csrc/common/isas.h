// Includes the file KERNELS once for each instruction set, in the namespaces scalar, avx2, avx512 and avx512_bf16.
// KERNELS, a path below csrc/, holds loops over vectors of LANES floats; it has no include guard and includes nothing
// but words.h or tokens.h. The file that includes isas.h does so inside a namespace, after <immintrin.h> on x86-64.
// VECTORS: the vectors of an operand that fit in registers next to the sums of six rows.
// BF16: 1 where the CPU multiplies and converts bfloat16.

#define INLINE static inline __attribute__((always_inline))

#define BF16 0
#define VECTORS 2
namespace scalar {
#define LANES 4
#include KERNELS
#undef LANES
}  // namespace scalar

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#define LANES 8
#include KERNELS
#undef LANES
}  // namespace avx2
#pragma GCC pop_options
#undef VECTORS

#define LANES 16
#define VECTORS 4
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,prefer-vector-width=512")
namespace avx512 {
#include KERNELS
}  // namespace avx512
#pragma GCC pop_options
#undef BF16

#define BF16 1
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c,prefer-vector-width=512")
namespace avx512_bf16 {
#include KERNELS
}  // namespace avx512_bf16
#pragma GCC pop_options
#undef LANES
#endif
#undef VECTORS
#undef BF16
#undef KERNELS
