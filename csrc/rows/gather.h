// Gathering rows on the CPU: what csrc/rows/dequant.cpp (one table) and csrc/rows/table.h (a table in shards) share.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "rows/dequant.h"

namespace lift_fast {

inline int64_t row_bytes(Codec codec, int64_t dim) {
  constexpr int kBits[] = {32, 16, 8, 8, 4, 2};  // of an element, by Codec
  return (dim * kBits[static_cast<int>(codec)] + 7) / 8;
}

inline int64_t out_row_bytes(Codec codec, Out type, int64_t dim) {
  if (type == Out::codes) return row_bytes(codec, dim);
  return dim * (type == Out::f32 ? 4 : type == Out::int8 ? 1 : 2);
}

// Nothing says that what comes in is aligned: a mapped file's tensors start anywhere.
template <typename T>
inline T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// One row into `out`; asks for the lines of `ahead`, the row of a later call, as it goes. size: dim, or for rows that
// are only copied their bytes.
using RowKernel = void (*)(const uint8_t* codes, float scale, void* out, int64_t size, const uint8_t* ahead);

struct Plan {
  RowKernel kernel;
  int64_t size, bytes, out_bytes;  // of a row
};
// The kernel for rows of this kind; out: where the first goes, m: how many follow each other there.
Plan plan(Codec codec, Out type, bool normalize, int64_t dim, const void* out, int64_t m, Isa isa);

struct Place {
  const uint8_t* codes;
  const float* scale;  // null: 1
};

struct Gather {
  int64_t m;
  void* out;           // m rows of plan.out_bytes
  float* out_scales;   // [m] or null
  const int64_t* order;  // the m positions in the order in which they are best read, or null
  Plan plan;
};

namespace detail {

// Below this much output a second thread costs more to start than it saves.
constexpr int64_t kBytesPerThread = 1 << 19;
constexpr int64_t kBlockBytes = 1 << 17;  // of output that a thread takes at a time
constexpr int64_t kRing = 64;             // a power of two
constexpr int64_t kNearBytes = 8 << 10;   // so far before its use a row's lines are asked for,
constexpr int64_t kNearRows = 2;          // and at least so many rows

template <typename Locate>
void share(const Gather& job, const Locate& locate, std::atomic<int64_t>& next, int64_t block) {
  struct Ahead {
    int64_t to;  // -1: there are no more
    Place place;
  };
  Ahead ring[kRing];
  const int64_t near = std::clamp<int64_t>(kNearBytes / std::max<int64_t>(job.plan.bytes, 1), kNearRows, kRing / 4);
  const int64_t far = 2 * near;  // here a row's scale and its pages' addresses are asked for
  int64_t at = 0, end = 0;
  const auto pull = [&](Ahead& ahead) {
    if (at == end) {
      at = next.fetch_add(block, std::memory_order_relaxed);
      end = std::min(at + block, job.m);
      if (at >= job.m) {
        at = end = job.m;
        ahead.to = -1;
        return;
      }
    }
    ahead.to = job.order ? job.order[at] : at;
    ++at;
    ahead.place = locate(ahead.to);
    __builtin_prefetch(ahead.place.codes, 0, 0);
    __builtin_prefetch(ahead.place.codes + job.plan.bytes - 1, 0, 0);
    if (ahead.place.scale) __builtin_prefetch(ahead.place.scale);
  };
  for (int64_t i = 0; i < far; ++i) pull(ring[i]);
  for (int64_t i = 0; ring[i % kRing].to >= 0; ++i) {
    pull(ring[(i + far) % kRing]);
    const Ahead& row = ring[i % kRing];
    const Ahead& later = ring[(i + near) % kRing];
    const float scale = row.place.scale ? load<float>(row.place.scale) : 1.f;
    job.plan.kernel(row.place.codes, scale, static_cast<uint8_t*>(job.out) + row.to * job.plan.out_bytes,
                    job.plan.size, (later.to < 0 ? row : later).place.codes);
    if (job.out_scales) std::memcpy(job.out_scales + row.to, &scale, sizeof scale);
  }
#if defined(__x86_64__)
  __builtin_ia32_sfence();  // stores around the cache are not in order with what tells others that they are done
#endif
}

}  // namespace detail

// locate(i) -> the Place of the row that becomes row i of the output.
template <typename Locate>
void gather(const Gather& job, const Locate& locate, int threads) {
  if (job.m == 0 || job.plan.out_bytes == 0) return;
  const int64_t block = std::max<int64_t>(detail::kBlockBytes / job.plan.out_bytes, 1);
  const int64_t useful = job.m * job.plan.out_bytes / detail::kBytesPerThread;
  const int64_t parts = std::clamp<int64_t>(std::min(useful, (job.m + block - 1) / block), 1, std::max(threads, 1));
  std::atomic<int64_t> next{0};
  std::vector<std::thread> others;
  others.reserve(parts);
  // Threads live for one call: nothing to break in a forked data loader, no second OpenMP beside torch's.
  for (int64_t part = 1; part < parts; ++part) {
    try {
      others.emplace_back([&] { detail::share(job, locate, next, block); });
    } catch (const std::system_error&) {
      break;  // no thread to be had: those that are here do the rest
    }
  }
  detail::share(job, locate, next, block);
  for (auto& other : others) other.join();
}

}  // namespace lift_fast
