// What the bindings of the CPU's ops share.
#pragma once
#include <stdexcept>
#include <string>

#include "pairs/pairs.h"

namespace lift_fast {

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline constexpr const char* kIsaNames[] = {"scalar", "avx2", "avx512", "avx512_bf16"};

// "": the best there is.
inline PairsIsa isa_named(const std::string& wanted) {
  const int best = static_cast<int>(best_pairs_isa());
  if (wanted.empty()) return best_pairs_isa();
  for (int i = 0; i <= best; ++i)
    if (wanted == kIsaNames[i]) return static_cast<PairsIsa>(i);
  throw std::invalid_argument("this CPU has no '" + wanted + "'; its best is " + kIsaNames[best]);
}

}  // namespace lift_fast
