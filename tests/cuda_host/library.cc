// The launchers by plain names, for ctypes.
#include "cuda/attention.h"
#include "cuda/matmul.h"

using namespace pyllm::cuda;

extern "C" {
int host_skinny_matmul(const MatmulArgs* args, int64_t multiprocessors) {
  return skinny_matmul(*args, multiprocessors, true, nullptr);
}
int host_mma_matmul(const MatmulArgs* args) { return mma_matmul(*args, nullptr); }
int host_plain_matmul(const MatmulArgs* args) { return plain_matmul(*args, nullptr); }
int host_prompt_attention(const AttentionArgs* args) { return prompt_attention(*args, nullptr); }
int host_plain_attention(const AttentionArgs* args) { return plain_attention(*args, nullptr); }
int host_split_attention(const AttentionArgs* args) { return split_attention(*args, nullptr); }
void host_skinny_plan(int64_t rows, int64_t n, int64_t k, int64_t multiprocessors, SkinnyPlan* plan) {
  *plan = skinny_plan(rows, n, k, multiprocessors);
}
}
