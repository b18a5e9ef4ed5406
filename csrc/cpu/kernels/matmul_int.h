// The matmul over int8 and int4 weights, which has a driver of its own.
#pragma once
#include "cpu/kernels/kernel.h"

namespace pyllm::PYLLM_ISA {

void matmul_int(const MatmulArgs& args, Parallel& pool);

}  // namespace pyllm::PYLLM_ISA
