#include "cpu/kernels/kernel.h"

namespace pyllm::PYLLM_ISA {

void matmul(const MatmulArgs&, Parallel&) {}

}  // namespace pyllm::PYLLM_ISA
