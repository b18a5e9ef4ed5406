// What every kernel source includes: the vector type of the level being compiled, and the kernels' declarations in its namespace.
#pragma once
#include "cpu/kernels.h"
#include "cpu/simd/simd.h"

namespace pyllm::PYLLM_ISA {

using cpu::Parallel;
using cpu::parallel_for;

#define X(name, Args) void name(const Args& args, Parallel& pool);
PYLLM_CPU_KERNELS(X)
#undef X

}  // namespace pyllm::PYLLM_ISA
