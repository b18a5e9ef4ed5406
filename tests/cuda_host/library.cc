// The launchers by plain names, for ctypes.
#include "cuda/attention.h"
#include "cuda/layers.h"
#include "cuda/matmul.h"
#include "cuda/qkv_write.h"
#include "cuda/sampling.h"

using namespace pyllm::cuda;
namespace cuda = pyllm::cuda;

extern "C" {
int host_skinny_matmul(const MatmulArgs* args, int64_t multiprocessors) {
  return skinny_matmul(*args, multiprocessors, nullptr);
}
int host_skinny_qkv(const QkvArgs* args, int64_t multiprocessors) {
  return skinny_qkv(*args, multiprocessors, nullptr);
}
int host_skinny_argmax(const ArgmaxArgs* args, int64_t multiprocessors) {
  return skinny_argmax(*args, multiprocessors, nullptr);
}
int host_split_matmul(const SplitMatmulArgs* args) { return split_matmul(*args, nullptr); }
int host_wgmma_matmul(const MatmulArgs* args, int64_t multiprocessors) {
  return wgmma_matmul(*args, multiprocessors, nullptr);
}
void host_wgmma_plan(int64_t rows, int64_t n, int64_t k, int64_t multiprocessors, WgmmaPlan* plan) {
  *plan = wgmma_plan(rows, n, k, multiprocessors);
}
int host_mma_matmul(const MatmulArgs* args) { return mma_matmul(*args, nullptr); }
int host_plain_matmul(const MatmulArgs* args) { return plain_matmul(*args, nullptr); }
int host_prompt_attention(const AttentionArgs* args) { return prompt_attention(*args, nullptr); }
int host_wgmma_attention(const AttentionArgs* args) { return wgmma_attention(*args, nullptr); }
int host_plain_attention(const AttentionArgs* args) { return plain_attention(*args, nullptr); }
int host_split_attention(const AttentionArgs* args) { return split_attention(*args, nullptr); }
int host_norm(const cuda::NormArgs* args) { return norm(*args, nullptr); }
int host_activation(const cuda::ActivationArgs* args) { return activation(*args, nullptr); }
int host_axpby(const pyllm::AxpbyArgs* args) { return axpby(*args, nullptr); }
int host_gather_columns(const pyllm::GatherColumnsArgs* args) { return gather_columns(*args, nullptr); }
int host_embedding(const cuda::EmbeddingArgs* args) { return embedding(*args, nullptr); }
int host_rope_angles(const pyllm::RopeAnglesArgs* args) { return rope_angles(*args, nullptr); }
int host_rope(const pyllm::RopeArgs* args) { return rope(*args, nullptr); }
int host_kv_write(const pyllm::KvWriteArgs* args) { return kv_write(*args, nullptr); }
int host_qkv_write(const QkvWriteArgs* args) { return qkv_write(*args, nullptr); }
int host_sample(const pyllm::SampleArgs* args) { return sample(*args, nullptr); }
int host_logprobs(const pyllm::LogprobsArgs* args) { return logprobs(*args, nullptr); }
void host_split_plan(int64_t n, int64_t k, SplitPlan* plan) { *plan = split_plan(n, k); }
void host_skinny_plan(int64_t rows, int64_t n, int64_t k, bool whole, int64_t multiprocessors, int64_t shared_limit,
                      SkinnyPlan* plan) {
  *plan = skinny_plan(rows, n, k, whole, multiprocessors, shared_limit);
}
}
