// A table of encoded rows in many mapped files, and where its rows are by key.
#pragma once
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "gather.h"
#include "rows/dequant.h"

namespace lift_fast {

// Row r is in shard k with starts[k] <= r < starts[k + 1].
class Starts {
 public:
  // Throws std::invalid_argument unless they begin with 0 and ascend; shards may be empty.
  explicit Starts(std::vector<int64_t> starts);

  int64_t shards() const { return static_cast<int64_t>(starts_.size()) - 1; }
  int64_t rows() const { return starts_.back(); }
  int64_t rows(int64_t shard) const { return starts_[shard + 1] - starts_[shard]; }
  int64_t start(int64_t shard) const { return starts_[shard]; }
  // The shard of a row that is in the table: one look-up where shards are about as long as each other.
  int64_t shard_of(int64_t row) const {
    const int64_t bucket = row >> shift_;
    int64_t low = first_[bucket], high = first_[bucket + 1];  // it is one of these, both included
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (starts_[middle] <= row)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }
  // Throws std::out_of_range for the first row that is in no shard.
  void check(const int64_t* rows, int64_t m) const;

 private:
  std::vector<int64_t> starts_;
  std::vector<int64_t> first_;  // the shard of the first row of each 2^shift_ rows, and the last shard
  int shift_ = 0;
};

// Readers beside each other, a writer alone; whoever forks takes no lock of a thread that is not there along.
class ForkLock {
 public:
  std::shared_mutex& get() {  // with Python's lock held: no other thread is in here
    if (owner_ != getpid()) {
      new (&mutex_) std::shared_mutex;
      owner_ = getpid();
    }
    return mutex_;
  }

 private:
  std::shared_mutex mutex_;
  pid_t owner_ = getpid();
};

class Table {
 public:
  Table(Codec codec, int64_t dim, Starts starts);

  // Waits until nobody reads. codes null: forgets the shard.
  void map(int64_t shard, const void* codes, const void* scales);
  // The shards, ascending, that these rows touch and that are not mapped.
  std::vector<int64_t> unmapped(const int64_t* rows, int64_t m) const;
  // rows null: all of them. out_scales null: none. Throws std::runtime_error where a shard is not mapped.
  void gather(const int64_t* rows, int64_t m, void* out, float* out_scales, Out type, bool normalize, int threads,
              Isa isa) const;
  // Asks the kernel for what of these rows' pages is not in memory.
  void advise(const int64_t* rows, int64_t m) const;

  const Starts& starts() const { return starts_; }
  Codec codec() const { return codec_; }
  ForkLock& lock() { return lock_; }

 private:
  struct Shard {
    const uint8_t* codes = nullptr;
    const uint8_t* scales = nullptr;
  };
  Place locate(int64_t row) const;
  bool cold(const int64_t* rows, int64_t m, int64_t probes) const;  // whether one of so many is on the disk only
  std::vector<int64_t> by_address(const int64_t* rows, int64_t m) const;
  void will_need(const int64_t* rows, const std::vector<int64_t>& order) const;

  Codec codec_;
  int64_t dim_, row_bytes_;
  Starts starts_;
  std::vector<Shard> shards_;
  int64_t missing_;  // shards with rows that are not mapped
  ForkLock lock_;
};

// The first 64 bits of BLAKE2b(digest_size=8), RFC 7693, little-endian.
int64_t key_hash(const void* data, size_t bytes);

// Where a hash is among the keys of all rows: open addressing, at most 10 bytes a row.
class KeyTable {
 public:
  explicit KeyTable(Starts starts);

  // int64 [rows of the shard]; null forgets it. What was built is dropped.
  void map(int64_t shard, const void* keys);
  // One pass over the keys, unless that was done. Throws std::runtime_error while a shard with rows is not mapped.
  void build();
  bool built() const { return built_; }
  // The first row whose key is hashes[i], or -1. After build().
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
  uint64_t seed_;  // so that nobody can write keys that all want one slot
  Slots slots_;
  int64_t capacity_ = 0;
  std::atomic<bool> built_{false};
  ForkLock lock_;
};

}  // namespace lift_fast
