#include "cpu/kernels/kernel.h"

namespace pyllm::PYLLM_ISA {

void attention(const AttentionArgs&, Parallel&) {}

}  // namespace pyllm::PYLLM_ISA
