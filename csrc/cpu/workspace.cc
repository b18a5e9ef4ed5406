// Scratch sizes of the kernels that need scratch, the same at every ISA level.
#include "cpu/kernels.h"

namespace pyllm::cpu {

int64_t workspace_bytes(const MatmulArgs&, int) { return 0; }
int64_t workspace_bytes(const AttentionArgs&, int) { return 0; }
int64_t workspace_bytes(const SampleArgs&, int) { return 0; }

}  // namespace pyllm::cpu
