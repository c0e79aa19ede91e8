#include "fork.h"

#include <pthread.h>

#include <atomic>
#include <new>

namespace lift_fast {
namespace {

std::atomic<int> count{0};
auto* const mutex = new std::mutex;  // never destroyed: threads may outlive static objects
const int watching = pthread_atfork([] { mutex->lock(); }, [] { mutex->unlock(); },
                                    [] {
                                      mutex->unlock();
                                      ++count;
                                    });

}  // namespace

std::mutex& fork_mutex() { return *mutex; }

int forks() { return watching ? -1 : count.load(std::memory_order_relaxed); }

std::shared_mutex& ForkLock::get() {
  if (const int now = forks(); forks_ != now) {
    new (&mutex_) std::shared_mutex;
    forks_ = now;
  }
  return mutex_;
}

}  // namespace lift_fast
