// A table of encoded rows in many mapped files, and the table that finds the row of a key.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/fork.h"
#include "gather.h"

namespace lift_fast {

// Row r is in shard k with starts[k] <= r < starts[k + 1].
class Starts {
 public:
  // Throws std::invalid_argument unless starts begin with 0 and ascend. Shards may be empty.
  explicit Starts(std::vector<int64_t> starts);

  int64_t shards() const { return static_cast<int64_t>(starts_.size()) - 1; }
  int64_t rows() const { return starts_.back(); }
  int64_t rows(int64_t shard) const { return starts_[shard + 1] - starts_[shard]; }
  int64_t start(int64_t shard) const { return starts_[shard]; }
  // The shard of a row of the table: one look-up where shards are about equally long.
  int64_t shard_of(int64_t row) const {
    const int64_t bucket = row >> shift_;
    int64_t low = first_[bucket], high = first_[bucket + 1];  // the shard is one of low .. high
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (starts_[middle] <= row)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }
  // The caller's row numbers; null: all rows. Throws std::out_of_range naming the first one that is in no shard.
  RowNumbers numbers(const int64_t* rows, int64_t m) const;

 private:
  std::vector<int64_t> starts_;
  std::vector<int64_t> first_;  // the shard of the first row of each 2^shift_ rows, and the last shard
  int shift_ = 0;
};

class Table {
 public:
  Table(Codec codec, int64_t dim, Starts starts);

  // Sets where a shard lies; codes null: it is no longer mapped. The caller holds the lock as a writer.
  void map(int64_t shard, const void* codes, const void* scales);
  // The shards, ascending, that hold some of these rows and are not mapped.
  std::vector<int64_t> unmapped(const int64_t* rows, int64_t m) const;
  // rows null: all of them. out_scales null: no scales are written. Throws std::runtime_error if a shard is not mapped.
  void gather(const int64_t* rows, int64_t m, void* out, float* out_scales, Element type, bool normalize, int threads,
              Isa isa) const;
  // Asks the kernel to read those pages of these rows that are not in memory.
  void advise(const int64_t* rows, int64_t m) const;
  // The shards, ascending, that rows were gathered from since the last call.
  std::vector<int64_t> touched();

  const Starts& starts() const { return starts_; }
  Codec codec() const { return codec_; }
  ForkLock& lock() { return lock_; }

 private:
  struct Shard {
    const uint8_t* codes = nullptr;
    const uint8_t* scales = nullptr;
  };
  std::vector<int64_t> unmapped(const RowNumbers& rows) const;
  Place locate(int64_t row) const;
  // Whether one of `probes` rows, spread over all, is not in memory.
  bool cold(const RowNumbers& rows, int64_t probes) const;
  std::vector<int64_t> by_address(const RowNumbers& rows) const;
  void will_need(const RowNumbers& rows, const std::vector<int64_t>& order) const;

  Codec codec_;
  int64_t dim_, row_bytes_;
  Starts starts_;
  std::vector<Shard> shards_;
  int64_t missing_;  // shards with rows that are not mapped
  std::unique_ptr<std::atomic<bool>[]> touched_;  // by shard
  ForkLock lock_;
};

// The first 64 bits of BLAKE2b(digest_size=8), RFC 7693, little-endian.
int64_t key_hash(const void* data, size_t bytes);

// Finds a hash among the keys of all rows: open addressing, at most 10 bytes a row.
class KeyTable {
 public:
  explicit KeyTable(Starts starts);

  // keys: int64 [rows of the shard]; null: no longer mapped. Drops what was built.
  void map(int64_t shard, const void* keys);
  // One pass over the keys, if not done yet. Throws std::runtime_error if a shard with rows is not mapped.
  void build();
  bool built() const { return built_; }
  // out[i]: the first row whose key is hashes[i], or -1. Call build() first.
  void find(const int64_t* hashes, int64_t m, int64_t* out) const;
  int64_t bytes() const;

  const Starts& starts() const { return starts_; }
  ForkLock& lock() { return lock_; }

 private:
  struct Slots {
    std::vector<uint8_t> tags;   // 0: empty; else some bits of the hash
    std::vector<uint32_t> low;   // of the row
    std::vector<uint8_t> high;   // empty while 32 bits hold every row
  };
  uint64_t mixed(int64_t hash) const;
  int64_t slot_of(uint64_t mixed) const;
  int64_t key_of(int64_t row) const;
  int64_t row_in(const Slots& slots, int64_t slot) const;

  Starts starts_;
  std::vector<const uint8_t*> shards_;
  uint64_t seed_;  // random, so that nobody can choose keys that all fall into one slot
  Slots slots_;
  int64_t capacity_ = 0;
  std::atomic<bool> built_{false};
  ForkLock lock_;
};

}  // namespace lift_fast
