// Attention in float32 by multiply-adds: any head size, any number of queries. A warp takes one query and head and walks its keys
// in rising order, its lanes sharing the channels, so a row's result depends on its keys alone.
#include "cuda/attention.cuh"
#include "cuda/launch.h"
#include "cuda/warp.cuh"

namespace pyllm::cuda {
namespace {

constexpr int kWarps = 4, kChannels = int(kMaxHead) / 32;  // of a lane

__global__ void __launch_bounds__(kWarps * 32) plain_attention_kernel(const __grid_constant__ AttentionArgs a) {
  wait_for_earlier_kernels();
  let_later_kernels_start();
  const int64_t item = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, query = item / a.heads;
  const int head = int(item % a.heads), group_size = int(a.heads / a.cache.kv_heads), lane = threadIdx.x % 32;
  const Group group = find_group(a, blockIdx.z, head / group_size);
  const int64_t row = query * group_size + head % group_size;
  if (row >= group.rows) return;
  const int64_t size = a.cache.head_size, pitch = a.cache.padded_head(), half = a.cache.half_elements();
  const float* q = static_cast<const float*>(a.q) + (group.start + query) * a.q_stride + head * size;
  const int position = group.offset + int(query);
  const Seen seen = seen_from(group, position);

  float x[kChannels], sums[kChannels] = {}, most = -INFINITY, total = 0.0f;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) x[c] = c * 32 + lane < size ? q[c * 32 + lane] : 0.0f;
  for (int j = seen.sinks > 0 ? 0 : seen.low; j < seen.high || j < seen.sinks; ++j) {
    if (!seen(j)) continue;
    const int64_t block = a.tables[group.sequence * a.table_width + j / kPage];
    const float* key = static_cast<const float*>(a.cache.data) + block * a.cache.block_elements() +
                       group.kv_head * 2 * half + j % kPage * pitch;
    float score = 0.0f;
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      if (c * 32 + lane < size) score = fmaf(x[c], key[c * 32 + lane], score);
    score = changed_score(a, warp_sum(score), head, j - position);
    const float higher = fmaxf(most, score), keep = expf(most - higher), weight = expf(score - higher);
    most = higher;
    total = fmaf(total, keep, weight);
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      if (c * 32 + lane < size) sums[c] = fmaf(sums[c], keep, weight * key[half + c * 32 + lane]);
  }
  float* out = static_cast<float*>(a.out) + out_place(a, group, int(row));
#pragma unroll
  for (int c = 0; c < kChannels; ++c)
    if (c * 32 + lane < size) out[c * 32 + lane] = total > 0.0f ? sums[c] / total : 0.0f;
  if (lane == 0) store_lse(a, group, int(row), most, 1.0f, total);
}

}  // namespace

cudaError_t plain_attention(const AttentionArgs& args, cudaStream_t stream) {
  if (args.sequences == 0 || args.most_queries == 0) return cudaSuccess;
  if (args.cache.dtype != DType::f32 || args.q_dtype != DType::f32 || args.out_dtype != DType::f32 ||
      args.cache.head_size > kMaxHead || args.heads % args.cache.kv_heads)
    return cudaErrorInvalidValue;
  const dim3 grid(unsigned((args.most_queries * args.heads + kWarps - 1) / kWarps), 1, unsigned(args.sequences));
  return launch(plain_attention_kernel, args, grid, kWarps * 32, 0, stream);
}

}  // namespace pyllm::cuda
