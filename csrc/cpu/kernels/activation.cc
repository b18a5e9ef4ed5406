#include "cpu/kernels/kernel.h"

namespace pyllm::PYLLM_ISA {

void activation(const ActivationArgs&, Parallel&) {}

}  // namespace pyllm::PYLLM_ISA
