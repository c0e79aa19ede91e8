// Division and rounding upward, for sizes that are not negative.
#pragma once
#include <cstdint>

namespace lift_fast {

constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
constexpr int64_t rounded_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

}  // namespace lift_fast
