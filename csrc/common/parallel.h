// The threads of an op on the CPU.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace lift_fast {

// fn(data, member, members) by up to `threads` members of torch's own OpenMP team, all at once; false: there is none,
// and nothing was done. parallel.cpp.
bool on_team(void (*fn)(void*, int, int), void* data, int threads);

// task(pass, index, worker) for each index below tasks. By torch's OpenMP threads, which wait busily for a while after
// each of its ops, so that threads of our own would compete with them; where there are none (no torch, another OpenMP,
// a forked process, whose team is gone) by threads that live for one call. in_turn: worker w does w, w + workers, …, so
// that what a worker adds up is added in the same order every time; else whoever is free does the next.
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
  struct Team {
    decltype(work)* run;
    int workers;
  } team{&work, workers};
  const auto member = [](void* data, int at, int members) {
    const Team& of = *static_cast<Team*>(data);
    for (int worker = at; worker < of.workers; worker += members) (*of.run)(worker);
  };
  if (on_team(member, &team, workers)) return;
  std::vector<std::thread> others;
  others.reserve(workers);
  int worker = 1;
  for (; worker < workers; ++worker) {
    try {
      others.emplace_back(work, worker);
    } catch (const std::system_error&) {
      break;  // no thread to be had: this one does the rest
    }
  }
  work(0);
  for (; worker < workers; ++worker) work(worker);
  for (auto& other : others) other.join();
}

}  // namespace lift_fast
