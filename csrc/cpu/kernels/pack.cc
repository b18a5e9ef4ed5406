#include "cpu/kernels/kernel.h"

namespace pyllm::PYLLM_ISA {

void pack(const PackArgs&, Parallel&) {}

}  // namespace pyllm::PYLLM_ISA
