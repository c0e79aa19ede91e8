// The handler of SIGBUS, after wl_shm_buffer_begin_access of libwayland: it finds the mapping that the address lies in,
// notes that it is lost, and maps zeros over it; then the instruction that failed runs again. A SIGBUS of another
// address goes to the handlers that were there before.
#include "mapping.h"

#include <signal.h>
#include <sys/mman.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <mutex>
#include <new>
#include <system_error>
#include <vector>

#include "common/fork.h"

namespace lift_fast {

// Read by the handler, so that all of it is atomic. from == 0: free.
struct MappedRange {
  std::atomic<uintptr_t> from{0}, to{0};
  std::atomic<bool> lost{false};
};

namespace {

constexpr int kPerBlock = 1024;

struct Block {
  MappedRange ranges[kPerBlock];
  std::atomic<Block*> next{nullptr};
};

// All ranges: in blocks that are never freed, as the handler may read them at any time.
Block first_block;
std::atomic<int64_t> lost_count{0};
auto* const free_ranges = new std::vector<MappedRange*>;  // guarded by fork_mutex()

// The handlers that were there before, in the order in which this module found them. A later one may call an earlier
// one, which is why a signal that comes back, raised by the handler that it was passed to, goes to the one before.
constexpr int kMostHandlers = 4;
struct sigaction previous[kMostHandlers];
std::atomic<int> handlers{0}, passed{0};

MappedRange* range_of(uintptr_t address) {
  for (Block* block = &first_block; block; block = block->next.load(std::memory_order_acquire))
    for (MappedRange& range : block->ranges) {
      const uintptr_t from = range.from.load(std::memory_order_acquire);
      if (from && from <= address && address < range.to.load(std::memory_order_relaxed)) return &range;
    }
  return nullptr;
}

constexpr int kAccess = PROT_READ | PROT_WRITE, kFlags = MAP_PRIVATE | MAP_NORESERVE;

// Zeros in the place of what is mapped there. Called by the handler.
bool map_zeros(uintptr_t from, size_t bytes) {
  constexpr int flags = kFlags | MAP_FIXED | MAP_ANONYMOUS;
#if defined(SYS_mmap)
  // Not by the function, which sanitizers and profilers wrap in what no handler may do.
  return syscall(SYS_mmap, from, bytes, kAccess, flags, -1, 0) != -1;
#else
  return mmap(reinterpret_cast<void*>(from), bytes, kAccess, flags, -1, 0) != MAP_FAILED;
#endif
}

void end_by(int signal) {
  struct sigaction ending = {};
  ending.sa_handler = SIG_DFL;
  sigaction(signal, &ending, nullptr);
  raise(signal);
}

void pass_on(int signal, siginfo_t* info, void* context) {
  const int before = handlers.load() - 1 - passed.fetch_add(1);
  const struct sigaction action = before < 0 ? (struct sigaction){} : previous[before];
  const bool raised = info->si_code > 0;  // by an instruction, not by kill()
  if (before >= 0 && (action.sa_flags & SA_SIGINFO))
    action.sa_sigaction(signal, info, context);
  else if (action.sa_handler == SIG_DFL || (action.sa_handler == SIG_IGN && raised))
    end_by(signal);
  else if (action.sa_handler != SIG_IGN)
    action.sa_handler(signal);
  passed.fetch_sub(1);
}

void on_bus_error(int signal, siginfo_t* info, void* context) {
  const int error = errno;
  MappedRange* range = info->si_code > 0 ? range_of(reinterpret_cast<uintptr_t>(info->si_addr)) : nullptr;
  if (range) {
    const uintptr_t from = range->from.load(), to = range->to.load();
    range->lost.store(true);  // before the zeros are there, so that a reader of them finds it set
    lost_count.fetch_add(1);
    if (!map_zeros(from, to - from)) range = nullptr;
  }
  if (!range) pass_on(signal, info, context);
  errno = error;
}

bool is_ours(const struct sigaction& action) {
  return (action.sa_flags & SA_SIGINFO) && action.sa_sigaction == on_bus_error;
}

bool same(const struct sigaction& a, const struct sigaction& b) {
  return (a.sa_flags & SA_SIGINFO) == (b.sa_flags & SA_SIGINFO) && a.sa_handler == b.sa_handler;
}

MappedRange* added(uintptr_t from, size_t bytes) {
  const std::lock_guard<std::mutex> lock(fork_mutex());
  if (free_ranges->empty()) {
    static Block* last = nullptr;
    Block* block = &first_block;
    if (last) {
      block = new Block;
      last->next.store(block, std::memory_order_release);
    }
    last = block;
    free_ranges->reserve(free_ranges->capacity() + kPerBlock);
    for (int k = kPerBlock - 1; k >= 0; --k) free_ranges->push_back(&block->ranges[k]);
  }
  MappedRange* range = free_ranges->back();
  free_ranges->pop_back();
  range->lost.store(false);
  range->to.store(from + bytes);
  range->from.store(from, std::memory_order_release);
  return range;
}

}  // namespace

Mapping::Mapping(int file, int64_t bytes) : bytes_(bytes) {
  data_ = mmap(nullptr, static_cast<size_t>(bytes), kAccess, kFlags, file, 0);
  if (data_ == MAP_FAILED) throw std::system_error(errno, std::generic_category());
  try {
    range_ = added(reinterpret_cast<uintptr_t>(data_), bytes_);
  } catch (...) {
    munmap(data_, bytes_);
    throw;
  }
  handle_bus_errors();
}

Mapping::~Mapping() {
  {
    // Not while it is unmapped: the address may be another mapping's then.
    const std::lock_guard<std::mutex> lock(fork_mutex());
    range_->from.store(0);
    free_ranges->push_back(range_);
  }
  munmap(data_, bytes_);
}

bool Mapping::lost() const { return range_->lost.load(); }

int64_t lost_mappings() { return lost_count.load(); }

void handle_bus_errors() {
  struct sigaction found = {};
  if (sigaction(SIGBUS, nullptr, &found) != 0 || is_ours(found)) return;
  const std::lock_guard<std::mutex> lock(fork_mutex());
  if (sigaction(SIGBUS, nullptr, &found) != 0 || is_ours(found)) return;
  const int count = handlers.load();
  if (count == 0 || !same(previous[count - 1], found)) {
    const int place = count < kMostHandlers ? count : kMostHandlers - 1;
    previous[place] = found;
    handlers.store(place + 1);
  }
  struct sigaction ours = {};
  ours.sa_sigaction = on_bus_error;
  // NODEFER: memory of another mapping may be read, and a handler that it is passed to may raise it again.
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGBUS, &ours, nullptr);
}

}  // namespace lift_fast
