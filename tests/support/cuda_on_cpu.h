// Enough of CUDA to run this project's kernels unchanged on a CPU, for tests. Each thread of a block is a fiber, which
// runs until it has to wait for other threads at a shuffle or a barrier. Blocks run one after another. This is slow.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define __restrict__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulated {

struct Barrier {
  int arrived = 0;
  long generation = 0;
};
struct Fiber {
  ucontext_t context;  // where it starts
  jmp_buf place;       // where it continues: unlike swapcontext, a jump is no system call
  dim3 index;
  int warp, lane, shuffles;
  bool started, done;
};
constexpr int kStack = 1 << 16;

inline Fiber* now;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline Barrier barriers[33];  // one for each warp, and the last for the block
inline std::uint64_t slots[32][2][32];
inline dim3 block_index, block_size;
inline bool progress;  // whether any fiber made progress in this round

[[gnu::noinline]] inline void run(Fiber& fiber) {
  now = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

[[gnu::noinline]] inline void pause() {
  if (!_setjmp(now->place)) _longjmp(scheduler, 1);
}

inline void wait(Barrier& barrier, int count) {
  const long generation = barrier.generation;
  progress = true;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    while (barrier.generation == generation) pause();
    progress = true;
  }
}

// There are two sets of slots, so that a lane at the next shuffle does not overwrite a value that another still reads.
template <typename T>
T shuffle(T value, int from) {
  std::uint64_t(&all)[32] = slots[now->warp][now->shuffles++ % 2];
  std::memcpy(&all[now->lane], &value, sizeof value);
  wait(barriers[now->warp], 32);
  std::memcpy(&value, &all[from & 31], sizeof value);
  return value;
}

inline void start() {
  body();
  now->done = progress = true;
  _longjmp(scheduler, 1);
}

// Replaces `launch` in tests that count calls and do not run the kernels.
template <typename F>
void skip(dim3, dim3, std::size_t, void*, F) {}

template <typename F>
void launch(dim3 grid, dim3 block, std::size_t, void*, F kernel) {
  const int threads = block.x * block.y * block.z;
  std::vector<Fiber> fibers(threads);
  std::unique_ptr<char[]> stacks(new char[static_cast<std::size_t>(threads) * kStack]);
  body = kernel;
  block_size = block;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      block_index = dim3(x, y);
      for (Barrier& barrier : barriers) barrier = Barrier();
      for (int i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.index = dim3(i % block.x, i / block.x);
        fiber.warp = i / 32, fiber.lane = i % 32, fiber.shuffles = 0;
        fiber.started = fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks.get() + static_cast<std::size_t>(i) * kStack;
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, start, 0);
      }
      for (int left = threads; left;) {
        progress = false;
        for (Fiber& fiber : fibers) {
          if (fiber.done) continue;
          run(fiber);
          left -= fiber.done;
        }
        if (!progress) {
          std::fprintf(stderr, "deadlock: threads wait for others that have returned or wait elsewhere\n");
          std::abort();
        }
      }
    }
}

}  // namespace emulated

#define threadIdx (emulated::now->index)
#define blockIdx (emulated::block_index)
#define blockDim (emulated::block_size)

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulated::shuffle(value, emulated::now->lane ^ mask);
}
template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return emulated::shuffle(value, from);
}
template <typename T>
T __ldg(const T* from) {
  return *from;
}
inline void __syncthreads() {
  emulated::wait(emulated::barriers[32], emulated::block_size.x * emulated::block_size.y * emulated::block_size.z);
}
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const std::uint64_t bytes = static_cast<std::uint64_t>(y) << 32 | x;
  unsigned picked = 0;
  for (int k = 0; k < 4; ++k) picked |= (bytes >> 8 * (selector >> 4 * k & 7) & 0xff) << 8 * k;
  return picked;
}
inline int __dp4a(int a, int b, int sum) {
  for (int k = 0; k < 32; k += 8) sum += static_cast<std::int8_t>(a >> k) * static_cast<std::int8_t>(b >> k);
  return sum;
}
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct __nv_bfloat16 {
  std::uint16_t bits;
};
struct __half {
  std::uint16_t bits;
};
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  std::uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  if (x != x) return {0x7fff};
  return {static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
inline __half __float2half_rn(float x) {
  const std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (x != x) return {0x7fff};
  if (std::fabs(x) >= 65520.f) return {static_cast<std::uint16_t>(sign | 0x7c00)};
  const int exponent = x == 0.f || std::ilogb(x) < -14 ? -14 : std::ilogb(x);
  const long units = std::lrint(std::ldexp(static_cast<double>(std::fabs(x)), 10 - exponent));
  return {static_cast<std::uint16_t>(sign | (units + ((exponent + 14) << 10)))};
}
inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                                    : std::ldexp(static_cast<float>(fraction + (exponent ? 1024 : 0)),
                                                 (exponent ? exponent : 1) - 25);
  return x.bits & 0x8000 ? -size : size;
}
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct __half2 {
  __half x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float __low2float(__half2 two) { return __half2float(two.x); }
inline float __high2float(__half2 two) { return __half2float(two.y); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 0, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
