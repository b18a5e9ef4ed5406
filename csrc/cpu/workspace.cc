// Scratch sizes of the kernels that need scratch, the same at every ISA level.
#include "cpu/attention_workspace.h"
#include "cpu/kernels.h"

namespace pyllm::cpu {

int64_t workspace_bytes(const MatmulArgs&, int) { return 0; }
int64_t workspace_bytes(const AttentionArgs& args, int threads) { return attention_workspace(args, threads).bytes; }
int64_t workspace_bytes(const SampleArgs&, int) { return 0; }

}  // namespace pyllm::cpu
