#include "cpu/kernels/kernel.h"

namespace pyllm::PYLLM_ISA {

void rope_angles(const RopeAnglesArgs&, Parallel&) {}
void rope(const RopeArgs&, Parallel&) {}

}  // namespace pyllm::PYLLM_ISA
