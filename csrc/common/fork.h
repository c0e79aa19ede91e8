// What a forked child finds: of the parent's threads it has only the one that forked.
#pragma once
#include <mutex>
#include <shared_mutex>

namespace lift_fast {

// Held while a structure that outlives a call is changed, briefly and without taking another lock. A fork waits for it:
// the child finds each such structure whole, and the mutex free.
std::mutex& fork_mutex();

// How many forks lie between the process that loaded this module and this one.
int forks();

// A reader-writer lock, recreated after a fork: in the child no thread is left to release what another one held.
class ForkLock {
 public:
  std::shared_mutex& get();  // called with Python's lock held, so by one thread at a time

 private:
  std::shared_mutex mutex_;
  int forks_ = forks();
};

}  // namespace lift_fast
