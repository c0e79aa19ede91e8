// Hashes of sample keys, and the row of a hash.
//
//   find:  slot = mixed hash * capacity / 2^64. While the slot's tag is not 0: if the tag agrees and the key of the
//          slot's row is the hash, that is the row; else try the next slot. One cache miss for the tag, one for the row
//          number, one for the key, which stays in its mapped file; the misses of 16 look-ups overlap.
#include <algorithm>
#include <cstring>
#include <mutex>
#include <random>

#include "mapping.h"
#include "table.h"

namespace lift_fast {
namespace {

constexpr uint64_t kInitial[8] = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
                                  0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};
constexpr uint8_t kSigma[10][16] = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
                                    {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
                                    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4},
                                    {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
                                    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13},
                                    {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
                                    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11},
                                    {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
                                    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5},
                                    {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};
constexpr size_t kHashBlock = 128;  // BLAKE2b's block, bytes

template <int Bits>
inline uint64_t rotated(uint64_t x) {
  return x >> Bits | x << (64 - Bits);
}

inline void mix(uint64_t& a, uint64_t& b, uint64_t& c, uint64_t& d, uint64_t x, uint64_t y) {
  a += b + x;
  d = rotated<32>(d ^ a);
  c += d;
  b = rotated<24>(b ^ c);
  a += b + y;
  d = rotated<16>(d ^ a);
  c += d;
  b = rotated<63>(b ^ c);
}

void compress(uint64_t* h, const uint8_t* block, uint64_t bytes_so_far, bool last) {
  uint64_t m[16], v[16];
  for (int i = 0; i < 16; ++i) {  // little-endian on any CPU
    m[i] = 0;
    for (int k = 0; k < 8; ++k) m[i] |= static_cast<uint64_t>(block[8 * i + k]) << 8 * k;
  }
  for (int i = 0; i < 8; ++i) {
    v[i] = h[i];
    v[i + 8] = kInitial[i];
  }
  v[12] ^= bytes_so_far;
  if (last) v[14] = ~v[14];
#pragma GCC unroll 12
  for (int round = 0; round < 12; ++round) {
    const uint8_t* s = kSigma[round % 10];
    mix(v[0], v[4], v[8], v[12], m[s[0]], m[s[1]]);
    mix(v[1], v[5], v[9], v[13], m[s[2]], m[s[3]]);
    mix(v[2], v[6], v[10], v[14], m[s[4]], m[s[5]]);
    mix(v[3], v[7], v[11], v[15], m[s[6]], m[s[7]]);
    mix(v[0], v[5], v[10], v[15], m[s[8]], m[s[9]]);
    mix(v[1], v[6], v[11], v[12], m[s[10]], m[s[11]]);
    mix(v[2], v[7], v[8], v[13], m[s[12]], m[s[13]]);
    mix(v[3], v[4], v[9], v[14], m[s[14]], m[s[15]]);
  }
  for (int i = 0; i < 8; ++i) h[i] ^= v[i] ^ v[i + 8];
}

constexpr int64_t kBatch = 16;
constexpr double kRowsPerSlot = 0.625;  // 8 bytes a row; 9.6 beyond 2^32 rows

}  // namespace

int64_t key_hash(const void* data, size_t bytes) {
  uint64_t h[8];
  std::copy(kInitial, kInitial + 8, h);
  h[0] ^= 0x01010000 ^ 8;  // no key, one lane, a digest of 8 bytes
  const auto* at = static_cast<const uint8_t*>(data);
  uint64_t done = 0;
  for (; bytes - done > kHashBlock; at += kHashBlock) compress(h, at, done += kHashBlock, false);
  uint8_t block[kHashBlock] = {};
  if (bytes > done) std::memcpy(block, at, bytes - done);
  compress(h, block, bytes, true);
  return static_cast<int64_t>(h[0]);
}

KeyTable::KeyTable(Starts starts) : starts_(std::move(starts)), shards_(starts_.shards()) {
  std::random_device random;
  seed_ = static_cast<uint64_t>(random()) << 32 | random();
}

void KeyTable::map(int64_t shard, const void* keys) {
  const std::lock_guard<std::mutex> lock(fork_mutex());
  shards_[shard] = static_cast<const uint8_t*>(keys);
  slots_ = {};
  built_ = false;
}

uint64_t KeyTable::mixed(int64_t hash) const {
  uint64_t x = (static_cast<uint64_t>(hash) ^ seed_) * 0xff51afd7ed558ccdu;
  x = (x ^ x >> 32) * 0xc4ceb9fe1a85ec53u;
  return x ^ x >> 32;
}

inline int64_t KeyTable::slot_of(uint64_t mixed) const {
  return static_cast<int64_t>(static_cast<unsigned __int128>(mixed) * static_cast<uint64_t>(capacity_) >> 64);
}

inline int64_t KeyTable::key_of(int64_t row) const {
  const int64_t shard = starts_.shard_of(row);
  return load<int64_t>(shards_[shard] + 8 * (row - starts_.start(shard)));
}

inline int64_t KeyTable::row_in(const Slots& slots, int64_t slot) const {
  return slots.low[slot] | (slots.high.empty() ? 0 : static_cast<int64_t>(slots.high[slot]) << 32);
}

namespace {

// Low bits of the hash, which did not choose the slot; never 0.
inline uint8_t tag_of(uint64_t mixed) { return static_cast<uint8_t>(mixed | 1); }

}  // namespace

void KeyTable::build() {
  if (built_) return;
  for (int64_t k = 0; k < starts_.shards(); ++k)
    if (starts_.rows(k) > 0 && !shards_[k])
      throw std::runtime_error("the keys of shard " + std::to_string(k) + " are not mapped");
  handle_bus_errors();
  if (starts_.rows() >> 40) throw std::invalid_argument("a table of keys holds 2^40 rows at most");
  Slots slots;
  capacity_ = static_cast<int64_t>(starts_.rows() / kRowsPerSlot) + 2;  // never full
  slots.tags.resize(capacity_);
  slots.low.resize(capacity_);
  if (starts_.rows() >> 32) slots.high.resize(capacity_);
  for (int64_t k = 0; k < starts_.shards(); ++k) {
    for (int64_t first = 0; first < starts_.rows(k); first += kBatch) {
      const int64_t count = std::min(kBatch, starts_.rows(k) - first);
      int64_t keys[kBatch];
      uint64_t mixes[kBatch];
      std::memcpy(keys, shards_[k] + 8 * first, 8 * count);
      for (int64_t i = 0; i < count; ++i) {
        mixes[i] = mixed(keys[i]);
        __builtin_prefetch(&slots.tags[slot_of(mixes[i])], 1);
        __builtin_prefetch(&slots.low[slot_of(mixes[i])], 1);
      }
      for (int64_t i = 0; i < count; ++i) {
        const uint8_t tag = tag_of(mixes[i]);
        int64_t slot = slot_of(mixes[i]);
        while (slots.tags[slot] && !(slots.tags[slot] == tag && key_of(row_in(slots, slot)) == keys[i]))
          slot = slot + 1 < capacity_ ? slot + 1 : 0;
        if (slots.tags[slot]) continue;  // an earlier row has this key
        const int64_t row = starts_.start(k) + first + i;
        slots.tags[slot] = tag;
        slots.low[slot] = static_cast<uint32_t>(row);
        if (!slots.high.empty()) slots.high[slot] = static_cast<uint8_t>(row >> 32);
      }
    }
  }
  const std::lock_guard<std::mutex> lock(fork_mutex());
  slots_ = std::move(slots);
  built_ = true;
}

void KeyTable::find(const int64_t* hashes, int64_t m, int64_t* out) const {
  handle_bus_errors();
  for (int64_t first = 0; first < m; first += kBatch) {
    const int64_t count = std::min(kBatch, m - first);
    int64_t keys[kBatch], slots[kBatch];
    uint64_t mixes[kBatch];
    for (int64_t i = 0; i < count; ++i) {
      keys[i] = load<int64_t>(hashes + first + i);
      mixes[i] = mixed(keys[i]);
      slots[i] = slot_of(mixes[i]);
      __builtin_prefetch(&slots_.tags[slots[i]]);
      __builtin_prefetch(&slots_.low[slots[i]]);
    }
    const auto next = [&](int64_t i) {  // advances to a slot with this tag, or to an empty one
      while (slots_.tags[slots[i]] && slots_.tags[slots[i]] != tag_of(mixes[i]))
        slots[i] = slots[i] + 1 < capacity_ ? slots[i] + 1 : 0;
      return slots_.tags[slots[i]] != 0;
    };
    for (int64_t i = 0; i < count; ++i)
      if (next(i)) {
        const int64_t row = row_in(slots_, slots[i]), shard = starts_.shard_of(row);
        __builtin_prefetch(shards_[shard] + 8 * (row - starts_.start(shard)));
      }
    for (int64_t i = 0; i < count; ++i) {
      int64_t row = -1;
      while (next(i)) {
        const int64_t candidate = row_in(slots_, slots[i]);
        if (key_of(candidate) == keys[i]) {
          row = candidate;
          break;
        }
        slots[i] = slots[i] + 1 < capacity_ ? slots[i] + 1 : 0;
      }
      std::memcpy(out + first + i, &row, sizeof row);
    }
  }
}

int64_t KeyTable::bytes() const {
  return static_cast<int64_t>(slots_.tags.size() + 4 * slots_.low.size() + slots_.high.size());
}

}  // namespace lift_fast
