// The ops of lift_fast._C: one file each, no torch, no Python. Pointers and streams come in as integers.
#pragma once
#include <cstdint>

namespace lift_fast {

enum class Out : int { f32 = 0, bf16 = 1, f16 = 2, int8 = 3, codes = 4 };
// How a row is kept; lift_fast/codecs.py says what each means.
enum class Codec : int { f32 = 0, bf16 = 1, int8 = 2, fp8 = 3, int4r = 4, int2r = 5 };

// out[i, :] = round(value(codes[rows[i], :]) * scales[rows[i]]); without `rows`, row i is row i.
// Out::int8 (codecs int8, int4r, int2r): the integers alone, without the scale.
// normalize: each row divided by its length; its scale then says nothing. Rows of zeros stay zeros.
struct Dequant {
  const void* codes;     // [n, dim], packed or not, rows codes_stride *bytes* apart, each row contiguous
  const float* scales;   // [n], scales_stride elements apart; null: ones (f32 and bf16 have none)
  const int64_t* rows;   // [m] or null (then m == n)
  void* out;             // [m, dim], contiguous
  int64_t n, m, dim, codes_stride, scales_stride;
  Codec codec;
  Out type;
  bool normalize;
};

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };
Isa best_isa();

// The first i whose rows[i] is outside [0, n), or -1.
int64_t first_row_outside(const Dequant& job);
// Every rows[i] must be inside [0, n).
void dequant_cpu(const Dequant& job, int threads, Isa isa);

#if LIFT_FAST_CUDA
// Null, or the CUDA runtime's words for what went wrong. Asynchronous on `stream`; a row outside [0, n) gives NaN, as int8 0.
const char* dequant_cuda(const Dequant& job, int device, std::uintptr_t stream);
// Devices this runtime can use: 0 without a driver, or with one older than the toolkit.
int cuda_device_count();
#endif

}  // namespace lift_fast
