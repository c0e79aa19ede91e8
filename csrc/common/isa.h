// The instruction sets that loops on the CPU are compiled for, slowest first; isas.h compiles them.
#pragma once

namespace lift_fast {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };
inline constexpr const char* kIsaNames[] = {"scalar", "avx2", "avx512", "avx512_bf16"};

// The fastest that this CPU has.
Isa best_isa();

}  // namespace lift_fast
