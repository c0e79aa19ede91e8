// How rows are encoded.
#pragma once
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define LF_HOST_DEVICE __host__ __device__
#else
#define LF_HOST_DEVICE
#endif

namespace lift_fast {

// lift_fast/ops/rows/codecs.py defines each.
enum class Codec : int { f32 = 0, bf16 = 1, int8 = 2, fp8 = 3, int4r = 4, int2r = 5 };

// Bits per code.
LF_HOST_DEVICE constexpr int code_bits(Codec codec) {
  constexpr int bits[] = {32, 16, 8, 8, 4, 2};
  return bits[static_cast<int>(codec)];
}

// Whether a code is, or selects from a table, an int8 that is multiplied by the row's scale.
LF_HOST_DEVICE constexpr bool is_integer(Codec codec) {
  return codec == Codec::int8 || codec == Codec::int4r || codec == Codec::int2r;
}

inline int64_t row_bytes(Codec codec, int64_t dim) { return (dim * code_bits(codec) + 7) / 8; }

// f(codec) with the codec as a compile-time constant.
template <typename F>
auto with_codec(Codec codec, F f) {
  switch (codec) {
    case Codec::f32: return f(std::integral_constant<Codec, Codec::f32>());
    case Codec::bf16: return f(std::integral_constant<Codec, Codec::bf16>());
    case Codec::int8: return f(std::integral_constant<Codec, Codec::int8>());
    case Codec::fp8: return f(std::integral_constant<Codec, Codec::fp8>());
    case Codec::int4r: return f(std::integral_constant<Codec, Codec::int4r>());
    default: return f(std::integral_constant<Codec, Codec::int2r>());
  }
}

}  // namespace lift_fast
