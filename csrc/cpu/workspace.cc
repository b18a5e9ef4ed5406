// Scratch sizes of the kernels that need scratch, the same at every ISA level.
#include "cpu/kernels.h"

namespace pyllm::cpu {

int64_t workspace_bytes(const MatmulArgs&, int) { return 0; }
int64_t workspace_bytes(const AttentionArgs&, int) { return 0; }
int64_t workspace_bytes(const SampleArgs& a, int threads) { return threads * sample_floats(a.vocab) * int64_t(sizeof(float)); }

}  // namespace pyllm::cpu
