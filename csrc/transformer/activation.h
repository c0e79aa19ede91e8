// The activations of an MLP: gelu x Phi(x), gelu_tanh its approximation by tanh, quick_gelu x sigmoid(1.702 x).
#pragma once
#include <stdexcept>

namespace lift_fast {

enum class Activation : int { gelu = 0, gelu_tanh = 1, quick_gelu = 2 };

inline Activation activation_of(int number) {
  if (number < 0 || number > 2)
    throw std::invalid_argument("activation must be 0 (gelu), 1 (gelu_tanh) or 2 (quick_gelu)");
  return static_cast<Activation>(number);
}

}  // namespace lift_fast
