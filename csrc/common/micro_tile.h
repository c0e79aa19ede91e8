// The constants of the loops over words (words.h), which are the same for every instruction set.
#pragma once
#include <cstdint>

namespace lift_fast {

constexpr int kMicroRows = 6;    // rows of a micro-tile
constexpr int64_t kWords = 256;  // words of the summed dimension in one pass of a micro-tile
alignas(64) constexpr float kIota[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

}  // namespace lift_fast
