// Gathers rows of a quantized table and dequantizes them.
#pragma once
#include <cstdint>

#include "codec.h"
#include "common/element.h"
#include "common/isa.h"

namespace lift_fast {

// out[i, :] = round(value(codes[rows[i], :]) * scales[rows[i]]).
struct Dequant {
  const void* codes;    // [n, dim], packed or not, rows codes_stride bytes apart, each row contiguous
  const float* scales;  // [n], scales_stride elements apart; null: ones (f32 and bf16 have no scales)
  const int64_t* rows;  // [m]; null: row i is row i, and m == n
  void* out;            // [m, dim], contiguous
  int64_t n, m, dim, codes_stride, scales_stride;
  Codec codec;
  Element type;    // of out; int8 (codecs int8, int4r, int2r): the integers, not multiplied by the scale
  bool normalize;  // divide each row by its length, so that its scale cancels; rows of zeros stay zeros
};

// Throws std::out_of_range naming the first rows[i] outside [0, n).
void dequant_cpu(const Dequant& job, int threads, Isa isa);

#if LIFT_FAST_CUDA
// Asynchronous on `stream`. Rows outside [0, n) become NaN, or 0 as int8. Returns null, or the CUDA runtime's error
// message.
const char* dequant_cuda(const Dequant& job, int device, std::uintptr_t stream);
#endif

}  // namespace lift_fast
