// This level's table of kernels, for dispatch.
#include "cpu/kernels/kernel.h"

namespace pyllm::PYLLM_ISA {

const cpu::KernelTable& kernels() {
  static const cpu::KernelTable table = {
#define X(name, Args) name,
      PYLLM_CPU_KERNELS(X)
#undef X
  };
  return table;
}

}  // namespace pyllm::PYLLM_ISA
