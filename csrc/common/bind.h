// What the bindings share. Tensors are passed as addresses, integers, 0 for null.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "element.h"
#include "isa.h"

namespace lift_fast {

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Element float_type(int type) {
  if (type < 0 || type > 2) throw std::invalid_argument("type must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  return static_cast<Element>(type);
}

// The names of this CPU's instruction sets, slowest first.
inline pybind11::list isa_names() {
  pybind11::list names;
  for (int i = 0; i <= static_cast<int>(best_isa()); ++i) names.append(kIsaNames[i]);
  return names;
}

// "" is the fastest.
inline Isa isa_named(const std::string& wanted) {
  const int best = static_cast<int>(best_isa());
  if (wanted.empty()) return best_isa();
  for (int i = 0; i <= best; ++i)
    if (wanted == kIsaNames[i]) return static_cast<Isa>(i);
  throw std::invalid_argument("this CPU has no '" + wanted + "'; its best is " + kIsaNames[best]);
}

// Calls launch(), which returns null or an error message, without holding Python's lock. Throws std::runtime_error.
template <typename Launch>
void run_on_gpu(const char* what, Launch launch) {
  const char* error = nullptr;
  {
    pybind11::gil_scoped_release release;
    error = launch();
  }
  if (error) throw std::runtime_error(std::string(what) + " on the GPU: " + error);
}

}  // namespace lift_fast
