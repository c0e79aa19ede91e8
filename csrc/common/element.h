// Types of tensor elements, with the numbers that Python passes for them (DTYPES of lift_fast/ops/backends.py).
#pragma once
#include <cstdint>

namespace lift_fast {

// codes: encoded rows, copied as they are stored. Only a table of rows is gathered as codes.
enum class Element : int { f32 = 0, bf16 = 1, f16 = 2, int8 = 3, codes = 4 };

constexpr int64_t bytes_of(Element type) { return type == Element::f32 ? 4 : type == Element::int8 ? 1 : 2; }

}  // namespace lift_fast
