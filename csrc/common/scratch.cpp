// The pool of scratch memory: fresh pages cost 0.3 ms a megabyte, as much as the work of the pair losses at dim 512.
#include "scratch.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <vector>

#include "fork.h"
#include "integers.h"

namespace lift_fast {
namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kHeldBytes = 256 << 20;
constexpr size_t kMostHeld = 64;  // allocations

struct Allocation {
  void* data;
  int64_t bytes;
};

// Allocations that are free to be used again, oldest first.
class Pool {
 public:
  Pool() { held_.reserve(kMostHeld); }  // so that give() never allocates under the lock

  Allocation take(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(fork_mutex());
    auto best = held_.end();
    for (auto i = held_.begin(); i != held_.end(); ++i)
      if (i->bytes >= bytes && i->bytes <= 2 * bytes && (best == held_.end() || i->bytes < best->bytes)) best = i;
    if (best == held_.end()) return {nullptr, 0};
    const Allocation found = *best;
    held_.erase(best);
    bytes_ -= found.bytes;
    return found;
  }

  void give(Allocation allocation) {
    std::vector<Allocation> dropped;
    dropped.reserve(kMostHeld + 1);
    {
      const std::lock_guard<std::mutex> lock(fork_mutex());
      if (held_.size() == kMostHeld) drop_oldest(dropped);
      held_.push_back(allocation);
      bytes_ += allocation.bytes;
      while (bytes_ > kHeldBytes) drop_oldest(dropped);
    }
    for (const Allocation& old : dropped) std::free(old.data);
  }

  void release() {
    std::vector<Allocation> dropped;
    dropped.reserve(kMostHeld);
    {
      const std::lock_guard<std::mutex> lock(fork_mutex());
      while (!held_.empty()) drop_oldest(dropped);
    }
    for (const Allocation& old : dropped) std::free(old.data);
  }

 private:
  void drop_oldest(std::vector<Allocation>& dropped) {  // freed by the caller, after it has unlocked
    dropped.push_back(held_.front());
    bytes_ -= held_.front().bytes;
    held_.erase(held_.begin());
  }

  std::vector<Allocation> held_;  // guarded by fork_mutex()
  int64_t bytes_ = 0;
};

auto* const pool = new Pool;  // never destroyed: threads may outlive static objects

}  // namespace

Scratch::Scratch(int64_t bytes) : bytes_(rounded_up(std::max<int64_t>(bytes, 1), kPage)) {
  const Allocation allocation = pool->take(bytes_);
  if (allocation.data) {
    data_ = allocation.data;
    bytes_ = allocation.bytes;
  } else {
    data_ = std::aligned_alloc(kPage, bytes_);
    if (!data_) throw std::bad_alloc();
  }
}

Scratch::~Scratch() {
  if (data_) pool->give({data_, bytes_});
}

void release_scratch() { pool->release(); }

}  // namespace lift_fast
