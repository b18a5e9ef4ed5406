#include "cuda/launch.h"
#include "cuda/qkv_write.h"
#include "cuda/rows.cuh"
#include "cuda/warp.cuh"

namespace pyllm::cuda {
namespace {

constexpr int kWarps = kRowThreads / 32;  // of a block; each takes a head

// Norms a head whose channels lie in shared memory, each of which its own lane takes.
__device__ __forceinline__ void norm_head(float* x, int size, const float* weight, NormKind kind, float eps) {
  const int lane = threadIdx.x % 32;
  float mean = 0.0f, sum = 0.0f;
  if (kind == NormKind::layer) {
    for (int c = lane; c < size; c += 32) mean += x[c];
    mean = warp_sum(mean) / float(size);
  }
  for (int c = lane; c < size; c += 32) sum += (x[c] - mean) * (x[c] - mean);
  const float scale = 1.0f / sqrtf(warp_sum(sum) / float(size) + eps);
  for (int c = lane; c < size; c += 32) x[c] = (x[c] - mean) * scale * weight[c];
}

__global__ void __launch_bounds__(kRowThreads) qkv_write_kernel(const __grid_constant__ QkvWriteArgs a) {
  wait_for_earlier_kernels();
  let_later_kernels_start();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, size = int(a.cache.head_size);
  const int heads = int(a.heads), kv_heads = int(a.cache.kv_heads), head = int(blockIdx.y) * kWarps + warp;
  if (head >= heads + 2 * kv_heads) return;
  const bool query = head < heads, value = head >= heads + kv_heads;
  const int half = value ? 0 : int(a.half);
  const int64_t row = blockIdx.x;

  float* x = reinterpret_cast<float*>(shared_memory()) + warp * size;
  const float* from = a.qkv + row * a.qkv_stride + head * size;
  for (int c = lane; c < size; c += 32)
    x[c] = from[!a.paired || c >= 2 * half ? c : c < half ? 2 * c : 2 * (c - half) + 1];
  const float* weight = value ? nullptr : query ? a.q_norm : a.k_norm;
  if (weight) norm_head(x, size, weight + (query ? head : head - heads) * a.norm_stride, a.norm, a.eps);
  __syncwarp();
  const auto rotated = [&](int c) {
    if (c >= 2 * half) return c < size ? x[c] : 0.0f;  // channels past the head's are zeros in the cache
    const int j = c < half ? c : c - half;
    const float cos = a.cos[row * a.half + j], sin = a.sin[row * a.half + j];
    return c < half ? x[c] * cos - x[c + half] * sin : x[c] * cos + x[c - half] * sin;
  };

  if (query) {
    for (int c = lane; c < size; c += 32) store(a.q, a.q_dtype, row * a.q_stride + head * size + c, rotated(c));
    return;
  }
  const int64_t slot = a.slots[row];
  if (slot < 0 || slot / kBlockTokens >= a.cache.blocks) return;
  const int pitch = int(a.cache.padded_head());
  const int64_t place = slot / kBlockTokens * a.cache.block_elements() +
                        (head - heads - (value ? kv_heads : 0)) * a.cache.head_elements() +
                        (value ? a.cache.half_elements() : 0) + slot % kBlockTokens * pitch;
  for (int c = lane; c < pitch; c += 32) store(a.cache.data, a.cache.dtype, place + c, rotated(c));
}

}  // namespace

cudaError_t qkv_write(const QkvWriteArgs& args, cudaStream_t stream) {
  QkvWriteArgs a = args;
  if (!a.cos) a.half = 0;
  const int64_t all_heads = a.heads + 2 * a.cache.kv_heads, blocks = (all_heads + kWarps - 1) / kWarps;
  if (a.rows == 0 || all_heads == 0) return cudaSuccess;
  if ((a.cache.dtype != DType::f32 && a.cache.dtype != DType::bf16) || a.cache.head_size > kMaxHead || blocks > 65535)
    return cudaErrorInvalidValue;
  return launch(qkv_write_kernel, a, dim3(unsigned(a.rows), unsigned(blocks)), kRowThreads,
                kWarps * a.cache.head_size * 4, stream);
}

}  // namespace pyllm::cuda
