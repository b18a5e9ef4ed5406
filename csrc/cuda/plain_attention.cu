// Attention in float32 by multiply-adds: any head size, any number of queries. A warp takes one query and head and walks its keys
// in rising order, its lanes sharing the channels, so a row's result depends on its keys alone.
#include "cuda/attention.h"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/warp.cuh"

namespace pyllm::cuda {
namespace {

constexpr int kWarps = 4, kChannels = int(kMaxHead) / 32;  // of a lane

__global__ void __launch_bounds__(kWarps * 32) plain_attention_kernel(const __grid_constant__ AttentionArgs a) {
  wait_for_earlier_kernels();
  let_later_kernels_start();
  const int64_t item = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, query = item / a.heads, head = item % a.heads;
  const int64_t sequence = blockIdx.z, start = a.starts[sequence], queries = a.starts[sequence + 1] - start;
  if (query >= queries) return;
  const int lane = threadIdx.x % 32;
  const int64_t size = a.cache.head_size, pitch = (size + kHeadPad - 1) / kHeadPad * kHeadPad;
  const int64_t half = kBlockTokens * pitch, kv_head = head / (a.heads / a.cache.kv_heads);
  const float* q = static_cast<const float*>(a.q) + (start + query) * a.q_stride + head * size;
  const int64_t position = a.lengths[sequence] - queries + query;

  float x[kChannels], sums[kChannels] = {}, most = -INFINITY, total = 0.0f;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) x[c] = c * 32 + lane < size ? q[c * 32 + lane] * a.scale : 0.0f;
  for (int64_t j = a.window > 0 && position >= a.window ? position - a.window + 1 : 0; j <= position; ++j) {
    const int64_t block = a.tables[sequence * a.table_width + j / kBlockTokens];
    const float* key = static_cast<const float*>(a.cache.data) + (block * a.cache.kv_heads + kv_head) * 2 * half +
                       j % kBlockTokens * pitch;
    float score = 0.0f;
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      if (c * 32 + lane < size) score = fmaf(x[c], key[c * 32 + lane], score);
    score = warp_sum(score);
    const float higher = fmaxf(most, score), keep = expf(most - higher), weight = expf(score - higher);
    most = higher;
    total = fmaf(total, keep, weight);
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      if (c * 32 + lane < size) sums[c] = fmaf(sums[c], keep, weight * key[half + c * 32 + lane]);
  }
  float* out = static_cast<float*>(a.out) + (start + query) * a.out_stride + head * size;
#pragma unroll
  for (int c = 0; c < kChannels; ++c)
    if (c * 32 + lane < size) out[c * 32 + lane] = sums[c] / total;
}

}  // namespace

cudaError_t plain_attention(const AttentionArgs& args, cudaStream_t stream) {
  if (args.sequences == 0 || args.most_queries == 0) return cudaSuccess;
  if (args.cache.dtype != DType::f32 || args.cache.head_size > kMaxHead || args.heads % args.cache.kv_heads)
    return cudaErrorInvalidValue;
  const dim3 grid(unsigned((args.most_queries * args.heads + kWarps - 1) / kWarps), 1, unsigned(args.sequences));
  return launch(plain_attention_kernel, args, grid, kWarps * 32, 0, true, stream);
}

}  // namespace pyllm::cuda
