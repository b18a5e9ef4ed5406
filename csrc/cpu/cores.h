// What is known of a maker's cores, as measured.
#pragma once

namespace pyllm::cpu {

// Whether vectors' bf16 dot products outrun float32 multiply-adds of the same numbers, where there are any. Intel's cores
// start one every other cycle and two multiply-adds, each on half as many numbers, in each (Emerald Rapids: 172 and 350
// GFLOP/s); AMD's since Zen 4 as many of one as of the other.
static inline bool vectors_dot_bf16_fast() { return !__builtin_cpu_is("intel"); }

}  // namespace pyllm::cpu
