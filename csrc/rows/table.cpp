// A table in many mapped files: the shard of a row, gathering across shards, and advice to the page cache.
//
//   gather(rows):  probes whether 4 to 64 of the rows are in memory (mincore). If one is not, it asks the kernel to
//                  read all of them in order of address (madvise), and gathers them in that order. MADV_RANDOM makes a
//                  page fault read one page, not the 128 KB around it, of which a row is a fraction. For a file that
//                  the process may not write, mincore reports every page as in memory.
#include "table.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>

#include "mapping.h"

namespace lift_fast {
namespace {

constexpr int64_t kMostProbes = 64, kLeastProbes = 4;
constexpr int64_t kMostBytes = int64_t{1} << 56;  // larger than any address space
constexpr int64_t kBytesPerProbe = 1 << 20;  // a probe takes 1 us, gathering this much 60 us

const auto kPageSize = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));

struct Pages {
  uintptr_t from, to;
};

Pages pages_of(const uint8_t* at, int64_t bytes) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(at), mask = kPageSize - 1;
  return {from & ~mask, (from + bytes + mask) & ~mask};
}

void advise_pages(Pages pages, int advice) {
  madvise(reinterpret_cast<void*>(pages.from), pages.to - pages.from, advice);  // advice: a refusal does no harm
}

}  // namespace

Starts::Starts(std::vector<int64_t> starts) : starts_(std::move(starts)) {
  if (starts_.empty() || starts_[0] != 0) throw std::invalid_argument("starts must begin with 0");
  for (size_t k = 1; k < starts_.size(); ++k)
    if (starts_[k] < starts_[k - 1])
      throw std::invalid_argument("starts must ascend: starts[" + std::to_string(k) + "] is " +
                                  std::to_string(starts_[k]) + " after " + std::to_string(starts_[k - 1]));
  while ((rows() >> shift_) > 2 * shards()) ++shift_;
  int64_t shard = 0;
  for (int64_t bucket = 0; bucket <= (rows() >> shift_); ++bucket) {
    while (shard + 1 < shards() && starts_[shard + 1] <= bucket << shift_) ++shard;
    first_.push_back(shard);
  }
  first_.push_back(std::max<int64_t>(shards() - 1, 0));
}

RowNumbers Starts::numbers(const int64_t* rows, int64_t m) const {
  if (!rows && m != 0 && m != this->rows())
    throw std::invalid_argument("without rows m is the table's " + std::to_string(this->rows()) + " rows, not " +
                                std::to_string(m));
  return RowNumbers(rows, m, this->rows());
}

Table::Table(Codec codec, int64_t dim, Starts starts)
    : codec_(codec), dim_(dim), row_bytes_(row_bytes(codec, dim)), starts_(std::move(starts)),
      shards_(starts_.shards()), missing_(0),
      touched_(new std::atomic<bool>[starts_.shards()]()) {
  if (starts_.rows() > kMostBytes / row_bytes_)
    throw std::invalid_argument("no machine maps " + std::to_string(starts_.rows()) + " rows of " +
                                std::to_string(row_bytes_) + " bytes");
  for (int64_t k = 0; k < starts_.shards(); ++k) missing_ += starts_.rows(k) > 0;
}

void Table::map(int64_t shard, const void* codes, const void* scales) {
  const int64_t rows = starts_.rows(shard);
  Shard& mapped = shards_[shard];
  {
    const std::lock_guard<std::mutex> lock(fork_mutex());
    missing_ += rows > 0 ? (mapped.codes && !codes) - (!mapped.codes && codes) : 0;
    mapped = {static_cast<const uint8_t*>(codes), static_cast<const uint8_t*>(scales)};
  }
  if (!rows) return;
  if (mapped.codes) advise_pages(pages_of(mapped.codes, rows * row_bytes_), MADV_RANDOM);
  if (mapped.scales) advise_pages(pages_of(mapped.scales, rows * 4), MADV_RANDOM);
}

std::vector<int64_t> Table::unmapped(const int64_t* rows, int64_t m) const {
  return unmapped(starts_.numbers(rows, m));
}

std::vector<int64_t> Table::unmapped(const RowNumbers& rows) const {
  std::vector<int64_t> missing;
  if (!missing_ || rows.size() == 0) return missing;
  if (rows.all()) {
    for (int64_t k = 0; k < starts_.shards(); ++k)
      if (starts_.rows(k) > 0 && !shards_[k].codes) missing.push_back(k);
    return missing;
  }
  for (int64_t i = 0; i < rows.size(); ++i) {
    const int64_t shard = starts_.shard_of(rows[i]);
    if (!shards_[shard].codes && (missing.empty() || missing.back() != shard)) missing.push_back(shard);
  }
  std::sort(missing.begin(), missing.end());
  missing.erase(std::unique(missing.begin(), missing.end()), missing.end());
  return missing;
}

inline Place Table::locate(int64_t row) const {
  const int64_t k = starts_.shard_of(row), at = row - starts_.start(k);
  const Shard& shard = shards_[k];
  if (!touched_[k].load(std::memory_order_relaxed)) touched_[k].store(true, std::memory_order_relaxed);
  return {shard.codes + at * row_bytes_,
          shard.scales ? reinterpret_cast<const float*>(shard.scales + at * 4) : nullptr};
}

bool Table::cold(const RowNumbers& rows, int64_t probes) const {
  const int64_t m = rows.size();
  probes = std::min(probes, m);
  for (int64_t probe = 0; probe < probes; ++probe) {
    const int64_t i = (2 * probe + 1) * m / (2 * probes);
    const Pages pages = pages_of(locate(rows[i]).codes, 1);
    unsigned char in_memory = 1;
    if (mincore(reinterpret_cast<void*>(pages.from), 1, &in_memory) == 0 && !(in_memory & 1)) return true;
  }
  return false;
}

std::vector<int64_t> Table::by_address(const RowNumbers& rows) const {
  const int64_t m = rows.size();
  std::vector<std::pair<const uint8_t*, int64_t>> places(m);
  for (int64_t i = 0; i < m; ++i) places[i] = {locate(rows[i]).codes, i};
  std::sort(places.begin(), places.end());
  std::vector<int64_t> order(m);
  for (int64_t i = 0; i < m; ++i) order[i] = places[i].second;
  return order;
}

void Table::will_need(const RowNumbers& rows, const std::vector<int64_t>& order) const {
  Pages codes{0, 0}, scales{0, 0};
  const auto need = [](Pages& so_far, Pages more) {
    if (more.from >= so_far.from && more.from <= so_far.to) {
      so_far.to = std::max(so_far.to, more.to);
    } else {
      if (so_far.to) advise_pages(so_far, MADV_WILLNEED);
      so_far = more;
    }
  };
  for (const int64_t i : order) {
    const Place place = locate(rows[i]);
    if (place.scale) need(scales, pages_of(reinterpret_cast<const uint8_t*>(place.scale), 4));
    need(codes, pages_of(place.codes, row_bytes_));
  }
  if (scales.to) advise_pages(scales, MADV_WILLNEED);
  if (codes.to) advise_pages(codes, MADV_WILLNEED);
}

void Table::advise(const int64_t* wanted, int64_t m) const {
  const RowNumbers rows = starts_.numbers(wanted, m);
  if (m > 0 && unmapped(rows).empty() && cold(rows, kMostProbes)) will_need(rows, by_address(rows));
}

std::vector<int64_t> Table::touched() {
  std::vector<int64_t> found;
  for (int64_t k = 0; k < starts_.shards(); ++k)
    if (touched_[k].exchange(false, std::memory_order_relaxed)) found.push_back(k);
  return found;
}

void Table::gather(const int64_t* wanted, int64_t m, void* out, float* out_scales, Element type, bool normalize,
                   int threads, Isa isa) const {
  const RowNumbers rows = starts_.numbers(wanted, m);
  const std::vector<int64_t> missing = unmapped(rows);
  if (!missing.empty())
    throw std::runtime_error("shard " + std::to_string(missing[0]) + " of the table is not mapped (" +
                             std::to_string(missing.size()) + " of those that these rows are in)");
  if (m == 0) return;
  handle_bus_errors();
  std::vector<int64_t> order;
  if (cold(rows, std::clamp(m * row_bytes_ / kBytesPerProbe, kLeastProbes, kMostProbes))) {
    order = by_address(rows);
    will_need(rows, order);
  }
  const auto locate_of = [&](int64_t i) { return locate(rows[i]); };
  lift_fast::gather({m, out, out_scales, order.empty() ? nullptr : order.data(),
                     plan(codec_, type, normalize, dim_, out, m, isa)},
                    locate_of, threads);
}

}  // namespace lift_fast
