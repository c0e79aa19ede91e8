// Finds torch's OpenMP team in the process that has loaded it: this module links to no OpenMP itself.
#include "parallel.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <string>

#include "fork.h"
#endif

namespace lift_fast {

#if defined(__linux__)
namespace {

// The function of libgomp that compilers call for `#pragma omp parallel`; unchanged since GCC 4.9.
using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

struct Gomp {
  Parallel parallel = nullptr;
  int (*member)() = nullptr;
  int (*members)() = nullptr;
  int (*level)() = nullptr;
};

Gomp find() {
  std::string path;
  // torch's wheels bring their own libgomp; another package's would be a different team.
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* found) {
        const char* name = info->dlpi_name;
        auto& path = *static_cast<std::string*>(found);
        if (name && std::strstr(name, "libgomp") && (std::strstr(name, "torch") || path.empty())) path = name;
        return 0;
      },
      &path);
  Gomp gomp;
  void* library = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (!library) return gomp;
  gomp.parallel = reinterpret_cast<Parallel>(dlsym(library, "GOMP_parallel"));
  gomp.member = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_thread_num"));
  gomp.members = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_num_threads"));
  gomp.level = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_level"));
  if (!gomp.member || !gomp.members || !gomp.level) gomp.parallel = nullptr;
  return gomp;
}

const Gomp& gomp() {
  static const Gomp found = find();
  return found;
}

}  // namespace

bool on_team(void (*fn)(void*, int, int), void* data, int threads) {
  // A forked process has none of the team's threads; another one may have been in find() at the time.
  if (forks() != 0) return false;
  const Gomp& team = gomp();
  if (!team.parallel || team.level() > 0) return false;
  struct Call {
    void (*fn)(void*, int, int);
    void* data;
  } call{fn, data};
  team.parallel(
      [](void* passed) {
        const Call& call = *static_cast<Call*>(passed);
        call.fn(call.data, gomp().member(), gomp().members());
      },
      &call, static_cast<unsigned>(threads), 0);
  return true;
}
#else
bool on_team(void (*)(void*, int, int), void*, int) { return false; }
#endif

}  // namespace lift_fast
