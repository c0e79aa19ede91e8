// Gathers rows of a quantized table and dequantizes them, on the GPU:
//
//   out[i, c] = round(value(codes[rows[i], c]) * scales[rows[i]])
//
//   one warp: row i, or up to 1 KB of it           unit  = 4 to 32 bytes of codes, what a lane loads at a time
//     row = rows[i]; scale = scales[row]           chunk = 16 bytes of output, what a lane stores at a time
//     for k in 0 .. UNITS: units 32 k + lane       a lane's loads are in flight together
//     for each chunk 32 j + lane:                  its codes: from the lane's own unit, or shuffled from another lane's
//       codes -> levels: 4 at a time by byte permutes, the code book in two or four registers
//       x scale, round to nearest even, store
//   normalize: one warp, or 2 or 4, a whole row; its units stay in registers while their squares are summed, and are
//     read again only for rows of more than 4096 elements (int4r 8192, int2r 16384). Sums of integers are exact, and
//     square root and division follow IEEE 754: the same bits as on the CPU.
//
// Bytes, dim 4096 to bf16: 4 KB (int8), 2 KB (int4r) or 1 KB (int2r) in and 8 KB out; a few integer instructions and
// one multiplication an element. The bound is HBM: 4096 rows of int8 move 48 MB, 16 us at 3 TB/s. A table in pinned
// host memory is read over the bus, which is then the bound: a warp's load is 128 contiguous bytes or more, whole
// requests, and each byte of a row is requested once. A row outside the table gives NaN (0 as int8): to raise an error
// the host would have to wait for the GPU, and to read there would destroy the process's CUDA context.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "common/device.cuh"
#include "common/integers.h"
#include "rows/dequant.h"

namespace lift_fast {
namespace {

constexpr int kWarps = 4;  // of a thread block
constexpr unsigned kAll = 0xffffffffu;

// How elements of SIZE bytes are made from codec C.
template <Codec C, int SIZE, bool NORMALIZE>
struct Layout {
  static constexpr int kVec = 16 / SIZE;                            // elements a chunk
  static constexpr int kIn = kVec * code_bits(C) / 8;               // bytes of codes a chunk
  static constexpr int kSplit = kIn < 4 ? 4 / kIn : 1;              // chunks a unit
  static constexpr int kWords = kIn < 4 ? 1 : kIn / 4;              // 32-bit words a unit
  static constexpr int kElements = kVec * kSplit;                   // a unit
  static constexpr int kAlign = kWords < 4 ? 4 * kWords : 16;       // of a unit, in bytes
  // What a lane holds: with normalize, four warps hold a row of 4096 elements or more.
  static constexpr int kHeld = NORMALIZE ? std::max(8, code_bits(C)) : std::max(8, 2 * kWords);  // words
  static constexpr int kUnits = kHeld / kWords;
};

template <int WORDS>
struct Unit {
  uint32_t w[WORDS];
};

template <int WORDS>
__device__ inline Unit<WORDS> load(const unsigned char* from) {
  Unit<WORDS> unit;
  if constexpr (WORDS == 1) {
    unit.w[0] = __ldg(reinterpret_cast<const unsigned*>(from));
  } else if constexpr (WORDS == 2) {
    const uint2 two = __ldg(reinterpret_cast<const uint2*>(from));
    unit.w[0] = two.x, unit.w[1] = two.y;
  } else {
#pragma unroll
    for (int k = 0; k < WORDS; k += 4) {
      const uint4 four = __ldg(reinterpret_cast<const uint4*>(from) + k / 4);
      unit.w[k] = four.x, unit.w[k + 1] = four.y, unit.w[k + 2] = four.z, unit.w[k + 3] = four.w;
    }
  }
  return unit;
}

__host__ __device__ constexpr uint32_t four(int a, int b, int c, int d) {
  return (a & 0xffu) | (b & 0xffu) << 8 | (c & 0xffu) << 16 | (d & 0xffu) << 24;
}

// Four levels, one a byte, for the four int4r codes in the low 16 bits, which is how a byte permute takes its selector.
__device__ inline uint32_t levels4(uint32_t codes) {
  const uint32_t which = codes & 0x7777;
  const uint32_t low = __byte_perm(four(-104, -79, -62, -48), four(-36, -25, -15, -5), which);
  const uint32_t high = __byte_perm(four(5, 15, 25, 36), four(48, 62, 79, 104), which);
  return __byte_perm(low, high, 0x3210 | (codes & 0x8888) >> 1);
}

// Four levels for the four int2r codes in the low 8 bits, which are spread to 4 bits each.
__device__ inline uint32_t levels2(uint32_t codes) {
  codes = (codes | codes << 4) & 0x0f0f;
  codes = (codes | codes << 2) & 0x3333;
  return __byte_perm(four(-110, -33, 33, 110), 0, codes);
}

// The levels 4 j .. 4 j + 3 of an integer codec.
template <Codec C>
__device__ inline uint32_t levels(const uint32_t* w, int j) {
  if constexpr (C == Codec::int8) return w[j];
  if constexpr (C == Codec::int4r) return levels4(w[j / 2] >> 16 * (j % 2));
  if constexpr (C == Codec::int2r) return levels2(w[j / 4] >> 8 * (j % 4) & 0xff);
  return 0;
}

__device__ inline float from_fp8(uint32_t byte) {
  // Its exponent and mantissa, read as a float32's, give a value 2^120 too small; that holds for subnormals too.
  const float x = __int_as_float((byte & 0x80) << 24 | (byte & 0x7f) << 20) * 0x1p120f;
  return (byte & 0x7f) == 0x7f ? __int_as_float(0x7fffffff) : x;
}

// Element k, without its row's scale.
template <Codec C>
__device__ inline float value(const uint32_t* w, int k) {
  if constexpr (C == Codec::f32) return __int_as_float(w[k]);
  if constexpr (C == Codec::bf16) return __int_as_float(k % 2 ? w[k / 2] & 0xffff0000u : w[k / 2] << 16);
  if constexpr (C == Codec::fp8) return from_fp8(w[k / 4] >> 8 * (k % 4) & 0xff);
  return static_cast<float>(static_cast<int8_t>(levels<C>(w, k / 4) >> 8 * (k % 4)));
}

__device__ inline uint32_t rounded(float low, float high, bool half) {
  uint32_t both;
  if (half) {
    const __half2 x = __floats2half2_rn(low, high);
    both = *reinterpret_cast<const uint32_t*>(&x);
  } else {
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    both = *reinterpret_cast<const uint32_t*>(&x);
  }
  return both;
}

template <Codec C>
using Sum = std::conditional_t<is_integer(C), int64_t, double>;

// The sum over the warps that share a row. Every thread of the block must call it, once.
template <typename T>
__device__ inline T over_row(T sum) {
  __shared__ T parts[kWarps];
#pragma unroll
  for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
  if (blockDim.x > 32) {
    const int warps = blockDim.x / 32;
    if (threadIdx.x % 32 == 0) parts[threadIdx.y * warps + threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < warps; ++w) sum += parts[threadIdx.y * warps + w];
  }
  return sum;
}

// What a row's values are multiplied by: first `step`, a power of two that keeps the product a normal number, then
// `rest`.
struct Factor {
  float step, rest;
};

__device__ inline Factor one_over_length(int64_t squares) {
  return {1.f, squares ? __fdiv_rn(1.f, __fsqrt_rn(__ll2float_rn(squares))) : 0.f};
}

__device__ inline Factor one_over_length(double squares) {
  const float step = squares < 0x1p-100 ? 0x1p64f : squares > 0x1p100 ? 0x1p-64f : 1.f;
  return {step, squares == 0 ? 0.f : static_cast<float>(1 / (sqrt(squares) * step))};
}

// This thread's row. Threads beyond the last row, and rows outside the table, read row 0 (the launcher has returned
// early where there is none), the latter times NaN.
struct Row {
  int64_t i;
  bool exists, inside;
  const unsigned char* codes;
  float scale;
};

__device__ inline Row row_of(const Dequant& job) {
  Row row;
  row.i = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  row.exists = row.i < job.m;
  const int64_t r = !row.exists ? 0 : job.rows ? job.rows[row.i] : row.i;
  row.inside = r >= 0 && r < job.n;
  row.codes = static_cast<const unsigned char*>(job.codes) + (row.inside ? r : 0) * job.codes_stride;
  row.scale = !row.inside ? __int_as_float(0x7fffffff) : job.scales ? job.scales[r * job.scales_stride] : 1.f;
  return row;
}

template <Codec C, int SIZE, bool NORMALIZE>
__global__ void __launch_bounds__(32 * kWarps) dequant_kernel(const Dequant job) {
  using P = Layout<C, SIZE, NORMALIZE>;
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const Row row = row_of(job);
  const int units = row.exists ? static_cast<int>(job.dim / P::kElements) : 0;
  auto* to = static_cast<uint4*>(job.out) + row.i * units * P::kSplit;
  const int stride = 32 * warps, batch = P::kUnits * stride;
  const int first = static_cast<int>(threadIdx.x) - lane;  // this warp's first unit of a batch
  Factor factor{1.f, row.scale};
  Unit<P::kWords> unit[P::kUnits];

  const auto read = [&](int from) {
#pragma unroll
    for (int k = 0; k < P::kUnits; ++k) {
      const int u = from + first + k * stride + lane;
      if (u < units) unit[k] = load<P::kWords>(row.codes + static_cast<int64_t>(u) * (4 * P::kWords));
    }
  };
  const auto write = [&](int from) {
#pragma unroll
    for (int k = 0; k < P::kUnits; ++k) {
      const int u = from + first + k * stride;
      if (u >= units) return;
#pragma unroll
      for (int s = 0; s < P::kSplit; ++s) {
        Unit<P::kWords> mine = unit[k];
        if constexpr (P::kSplit > 1)
          mine.w[0] = __shfl_sync(kAll, mine.w[0], (32 * s + lane) / P::kSplit) >> 8 * P::kIn * (lane % P::kSplit);
        const int chunk = u * P::kSplit + 32 * s + lane;
        if (chunk >= units * P::kSplit) continue;
        uint4 wide;
        uint32_t* out = &wide.x;
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          if constexpr (SIZE == 1) {
            out[word] = row.inside ? levels<C>(mine.w, word) : 0;
          } else {
            float x[4 / SIZE];
#pragma unroll
            for (int e = 0; e < 4 / SIZE; ++e) {
              x[e] = value<C>(mine.w, word * (4 / SIZE) + e);
              if constexpr (NORMALIZE && !is_integer(C)) x[e] *= factor.step;
              x[e] *= factor.rest;
            }
            if constexpr (SIZE == 2)
              out[word] = rounded(x[0], x[1], job.type == Element::f16);
            else
              out[word] = __float_as_int(x[0]);
          }
        }
        to[chunk] = wide;
      }
    }
  };

  if constexpr (!NORMALIZE) {
    const int from = static_cast<int>(blockIdx.y) * batch;
    read(from);
    write(from);
  } else {
    Sum<C> squares = 0;
    for (int from = 0; from < units; from += batch) {
      read(from);
#pragma unroll
      for (int k = 0; k < P::kUnits; ++k) {
        if (from + first + k * stride + lane >= units) break;
        if constexpr (is_integer(C)) {
          int sum = 0;
#pragma unroll
          for (int j = 0; j < P::kElements / 4; ++j) {
            const int four = static_cast<int>(levels<C>(unit[k].w, j));
            sum = __dp4a(four, four, sum);
          }
          squares += sum;
        } else {
#pragma unroll
          for (int e = 0; e < P::kElements; ++e) {
            const double x = value<C>(unit[k].w, e);
            squares += x * x;
          }
        }
      }
    }
    factor = one_over_length(over_row(squares));
    if (!row.inside) factor.rest = row.scale;
    for (int from = 0; from < units; from += batch) {
      if (units > batch) read(from);
      write(from);
    }
  }
}

// For rows that are not made of whole aligned units: one element at a time, any codec to any type.
__device__ inline uint32_t element(const unsigned char* codes, Codec codec, int64_t k) {
  switch (codec) {
    case Codec::f32: return __ldg(reinterpret_cast<const unsigned*>(codes) + k);
    case Codec::bf16: return __ldg(reinterpret_cast<const unsigned short*>(codes) + k);
    case Codec::int4r: return __ldg(codes + k / 2) >> 4 * (k % 2) & 0xf;
    case Codec::int2r: return __ldg(codes + k / 4) >> 2 * (k % 4) & 0x3;
    default: return __ldg(codes + k);
  }
}

__device__ inline float value_of(uint32_t code, Codec codec) {
  switch (codec) {
    case Codec::f32: return value<Codec::f32>(&code, 0);
    case Codec::bf16: return value<Codec::bf16>(&code, 0);
    case Codec::int8: return value<Codec::int8>(&code, 0);
    case Codec::fp8: return value<Codec::fp8>(&code, 0);
    case Codec::int4r: return value<Codec::int4r>(&code, 0);
    default: return value<Codec::int2r>(&code, 0);
  }
}

__global__ void __launch_bounds__(32 * kWarps) elements_kernel(const Dequant job) {
  const Row row = row_of(job);
  const int64_t dim = row.exists ? job.dim : 0;
  Factor factor{1.f, row.scale};
  if (job.normalize) {
    double squares = 0;  // exact for integers
    for (int64_t c = threadIdx.x; c < dim; c += blockDim.x) {
      const double x = value_of(element(row.codes, job.codec, c), job.codec);
      squares += x * x;
    }
    squares = over_row(squares);
    factor = is_integer(job.codec) ? one_over_length(static_cast<int64_t>(squares)) : one_over_length(squares);
    if (!row.inside) factor.rest = row.scale;
  }
  for (int64_t c = threadIdx.x; c < dim; c += blockDim.x) {
    const float value = value_of(element(row.codes, job.codec, c), job.codec);
    const float x = value * factor.step * factor.rest;
    const int64_t at = row.i * dim + c;
    if (job.type == Element::f32) static_cast<float*>(job.out)[at] = x;
    if (job.type == Element::bf16) static_cast<__nv_bfloat16*>(job.out)[at] = __float2bfloat16_rn(x);
    if (job.type == Element::f16) static_cast<__half*>(job.out)[at] = __float2half_rn(x);
    if (job.type == Element::int8) static_cast<int8_t*>(job.out)[at] = row.inside ? static_cast<int8_t>(value) : 0;
  }
}

dim3 grid(const Dequant& job, int warps_a_row, int64_t y = 1) {
  const int rows = kWarps / warps_a_row;
  return dim3(static_cast<unsigned>(ceil_div(job.m, rows)), static_cast<unsigned>(y));
}

void launch_elements(const Dequant& job, cudaStream_t stream) {
  const int warps = job.dim > 256 ? kWarps : 1;
  elements_kernel<<<grid(job, warps), dim3(32 * warps, kWarps / warps), 0, stream>>>(job);
}

template <Codec C, int SIZE, bool NORMALIZE>
void launch(const Dequant& job, cudaStream_t stream) {
  using P = Layout<C, SIZE, NORMALIZE>;
  const bool whole = job.dim % P::kElements == 0 && job.codes_stride % P::kAlign == 0 &&
                     reinterpret_cast<std::uintptr_t>(job.codes) % P::kAlign == 0 &&
                     reinterpret_cast<std::uintptr_t>(job.out) % 16 == 0;
  if (!whole) return launch_elements(job, stream);
  const int64_t warps = ceil_div(job.dim / P::kElements, 32 * P::kUnits);  // that hold a row in registers
  const int shared = !NORMALIZE || warps == 1 ? 1 : warps == 2 ? 2 : kWarps;
  const dim3 blocks = grid(job, shared, NORMALIZE ? 1 : warps);
  dequant_kernel<C, SIZE, NORMALIZE><<<blocks, dim3(32 * shared, kWarps / shared), 0, stream>>>(job);
}

template <Codec C>
void launch_codec(const Dequant& job, cudaStream_t stream) {
  const bool two = job.type == Element::bf16 || job.type == Element::f16;
  if constexpr (is_integer(C))
    if (job.type == Element::int8) return launch<C, 1, false>(job, stream);
  if (job.normalize)
    two ? launch<C, 2, true>(job, stream) : launch<C, 4, true>(job, stream);
  else
    two ? launch<C, 2, false>(job, stream) : launch<C, 4, false>(job, stream);
}

}  // namespace

const char* dequant_cuda(const Dequant& job, int device, std::uintptr_t stream_handle) {
  if (job.m == 0 || job.dim == 0) return nullptr;
  return on_device(device, [&] {
    const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
    with_codec(job.codec, [&](auto codec) { launch_codec<codec()>(job, stream); });
  });
}

}  // namespace lift_fast
