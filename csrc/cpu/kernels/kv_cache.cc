#include "cpu/kernels/kernel.h"

namespace pyllm::PYLLM_ISA {

void kv_write(const KvWriteArgs&, Parallel&) {}

}  // namespace pyllm::PYLLM_ISA
