#include "cpu/kernels/kernel.h"

namespace pyllm::PYLLM_ISA {

void sample(const SampleArgs&, Parallel&) {}
void logprobs(const LogprobsArgs&, Parallel&) {}

}  // namespace pyllm::PYLLM_ISA
