// Runs an op's tasks on threads of the CPU.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace lift_fast {

// Calls fn(data, member, members) on up to `threads` members of torch's OpenMP team, all at once. Returns false, having
// called nothing, where there is no such team. See parallel.cpp.
bool on_team(void (*fn)(void*, int, int), void* data, int threads);

// Calls task(pass, index, worker) for every index below `tasks`, on torch's OpenMP threads: after each of torch's ops
// they wait busily for a while, and threads of our own would compete with them. Where there is no team (no torch,
// another OpenMP, a forked process, which does not inherit it) this starts threads that live for one call. With
// in_turn, worker w takes tasks w, w + workers, ..., so that what a worker adds up is added in the same order every
// time; otherwise a worker takes the next task as soon as it is free.
template <class Pass>
void parallel(int64_t tasks, int threads, const Pass& pass, void (*task)(const Pass&, int64_t, int),
              bool in_turn = false) {
  const int workers = static_cast<int>(std::min<int64_t>(std::max(threads, 1), tasks));
  std::atomic<int64_t> next{0};
  auto work = [&](int worker) {
    if (in_turn)
      for (int64_t i = worker; i < tasks; i += workers) task(pass, i, worker);
    else
      for (int64_t i; (i = next.fetch_add(1)) < tasks;) task(pass, i, worker);
  };
  if (workers <= 1) {
    if (workers) work(0);
    return;
  }
  struct Job {
    decltype(work)* run;
    int workers;
  } job{&work, workers};
  const auto share = [](void* data, int member, int members) {
    const Job& job = *static_cast<Job*>(data);
    for (int worker = member; worker < job.workers; worker += members) (*job.run)(worker);
  };
  if (on_team(share, &job, workers)) return;
  std::vector<std::thread> started;
  started.reserve(workers);
  int worker = 1;
  for (; worker < workers; ++worker) {
    try {
      started.emplace_back(work, worker);
    } catch (const std::system_error&) {
      break;  // no more threads: this one takes the remaining shares
    }
  }
  work(0);
  for (; worker < workers; ++worker) work(worker);
  for (auto& thread : started) thread.join();
}

}  // namespace lift_fast
