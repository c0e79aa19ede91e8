// Gathering rows on the CPU: what dequant.cpp (one table) and table.cpp (a table in shards) share.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "codec.h"
#include "common/element.h"
#include "common/integers.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace lift_fast {

inline int64_t out_row_bytes(Codec codec, Element type, int64_t dim) {
  return type == Element::codes ? row_bytes(codec, dim) : dim * bytes_of(type);
}

// Inputs may be unaligned: a mapped file's tensors start anywhere.
template <typename T>
inline T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// A caller's row numbers, copied and then checked: another thread may write to the caller's at any time.
class RowNumbers {
 public:
  // numbers: [m], may be unaligned; null: 0 .. m - 1. Throws std::out_of_range naming the first one outside [0, rows).
  RowNumbers(const int64_t* numbers, int64_t m, int64_t rows) : m_(m) {
    if (!numbers || m == 0) return;
    numbers_.reset(new int64_t[m]);
    std::memcpy(numbers_.get(), numbers, m * sizeof *numbers);
    std::atomic_signal_fence(std::memory_order_seq_cst);  // the compiler may not read the caller's again
    for (int64_t i = 0; i < m; ++i)
      if (numbers_[i] < 0 || numbers_[i] >= rows)
        throw std::out_of_range("rows[" + std::to_string(i) + "] is " + std::to_string(numbers_[i]) +
                                ", outside a table of " + std::to_string(rows) + " rows");
  }
  int64_t size() const { return m_; }
  bool all() const { return !numbers_; }
  int64_t operator[](int64_t i) const { return numbers_ ? numbers_[i] : i; }

 private:
  int64_t m_;
  std::unique_ptr<int64_t[]> numbers_;
};

// Decodes one row into `out`, and meanwhile prefetches the lines of `ahead`, the row of a later call. size: dim, or the
// bytes of a row that is only copied.
using RowKernel = void (*)(const uint8_t* codes, float scale, void* out, int64_t size, const uint8_t* ahead);

struct Plan {
  RowKernel kernel;
  int64_t size, bytes, out_bytes;  // of a row
};
// How to decode m rows of this kind, one after another, to `out`.
Plan plan(Codec codec, Element type, bool normalize, int64_t dim, const void* out, int64_t m, Isa isa);

struct Place {
  const uint8_t* codes;
  const float* scale;  // null: 1
};

struct Gather {
  int64_t m;
  void* out;             // m rows of plan.out_bytes
  float* out_scales;     // [m] or null
  const int64_t* order;  // the m positions in the order in which to read them; null: ascending
  Plan plan;
};

namespace detail {

constexpr int64_t kBytesPerThread = 1 << 19;  // of output: with less, a thread costs more to start than it saves
constexpr int64_t kBandBytes = 1 << 17;       // of output: what a thread takes at a time
constexpr int64_t kRing = 64;                 // a power of two
constexpr int64_t kNearBytes = 8 << 10;       // a row's lines are prefetched this many bytes before they are used,
constexpr int64_t kNearRows = 2;              // and at least this many rows

template <typename Locate>
struct Pass {
  const Gather& job;
  const Locate& locate;
  std::atomic<int64_t>& next;
  int64_t band_rows;
};

// Takes bands of rows until none is left.
template <typename Locate>
void gather_bands(const Pass<Locate>& pass, int64_t, int) {
  struct Ahead {
    int64_t to;  // -1: there are no more rows
    Place place;
  };
  const Gather& job = pass.job;
  Ahead ring[kRing];
  const int64_t near = std::clamp<int64_t>(kNearBytes / std::max<int64_t>(job.plan.bytes, 1), kNearRows, kRing / 4);
  const int64_t far = 2 * near;  // at this distance a row's scale and its first and last line are prefetched
  int64_t at = 0, end = 0;
  const auto pull = [&](Ahead& ahead) {
    if (at == end) {
      at = pass.next.fetch_add(pass.band_rows, std::memory_order_relaxed);
      end = std::min(at + pass.band_rows, job.m);
      if (at >= job.m) {
        at = end = job.m;
        ahead.to = -1;
        return;
      }
    }
    ahead.to = job.order ? job.order[at] : at;
    ++at;
    ahead.place = pass.locate(ahead.to);
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
  __builtin_ia32_sfence();  // stores that bypass the cache are not ordered before the signal that this thread is done
#endif
}

}  // namespace detail

// locate(i): where the row that becomes row i of the output lies.
template <typename Locate>
void gather(const Gather& job, const Locate& locate, int threads) {
  if (job.m == 0 || job.plan.out_bytes == 0) return;
  const int64_t band_rows = std::max<int64_t>(detail::kBandBytes / job.plan.out_bytes, 1);
  const int64_t useful = job.m * job.plan.out_bytes / detail::kBytesPerThread;
  const int64_t bands = ceil_div(job.m, band_rows);
  const auto workers = std::clamp<int64_t>(std::min(useful, bands), 1, std::max(threads, 1));
  std::atomic<int64_t> next{0};
  parallel(workers, static_cast<int>(workers), detail::Pass<Locate>{job, locate, next, band_rows},
           detail::gather_bands<Locate>);
}

}  // namespace lift_fast
