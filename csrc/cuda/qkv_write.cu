#include "cuda/launch.h"
#include "cuda/qkv_write.h"
#include "cuda/rows.cuh"

namespace pyllm::cuda {
namespace {

__device__ __forceinline__ void store(void* to, DType dtype, int64_t at, float v) {
  if (dtype == DType::f32) {
    store_element(static_cast<float*>(to) + at, v);
  } else {
    store_element(static_cast<bf16*>(to) + at, v);
  }
}

// A thread takes one channel of a head at a time; those past the head's are zeros in the cache.
__global__ void __launch_bounds__(kRowThreads) qkv_write_kernel(const __grid_constant__ QkvWriteArgs a) {
  wait_for_earlier_kernels();
  let_later_kernels_start();
  const int64_t row = blockIdx.x, slot = a.slots[row];
  const int size = int(a.cache.head_size), pitch = int(a.cache.padded_head()), half = int(a.half);
  const int heads = int(a.heads), kv_heads = int(a.cache.kv_heads);
  const bool written = slot >= 0 && slot / kBlockTokens < a.cache.blocks;
  const int64_t place = written ? slot / kBlockTokens * a.cache.block_elements() + slot % kBlockTokens * pitch : 0;
  for_columns(int64_t(heads + 2 * kv_heads) * pitch, [&](int64_t i) {
    const int head = int(i) / pitch, c = int(i) % pitch;
    float v = 0.0f;
    if (c < size) {
      const float* x = a.qkv + row * a.qkv_stride + head * size;
      v = x[c];
      if (head < heads + kv_heads && c < 2 * half) {
        const int j = c < half ? c : c - half;
        const float cos = a.cos[row * half + j], sin = a.sin[row * half + j];
        v = c < half ? x[2 * j] * cos - x[2 * j + 1] * sin : x[2 * j + 1] * cos + x[2 * j] * sin;
      }
    }
    if (head < heads) {
      if (c < size) store(a.q, a.q_dtype, row * a.q_stride + head * size + c, v);
      return;
    }
    const int other = head - heads, values = other >= kv_heads;
    if (!written) return;
    store(a.cache.data, a.cache.dtype,
          place + (other - values * kv_heads) * a.cache.head_elements() + values * a.cache.half_elements() + c, v);
  });
}

}  // namespace

cudaError_t qkv_write(const QkvWriteArgs& args, cudaStream_t stream) {
  QkvWriteArgs a = args;
  if (!a.cos) a.half = 0;
  const int64_t width = (a.heads + 2 * a.cache.kv_heads) * a.cache.padded_head();
  if (a.rows == 0 || width == 0) return cudaSuccess;
  if ((a.cache.dtype != DType::f32 && a.cache.dtype != DType::bf16) || width > kMaxRowWidth)
    return cudaErrorInvalidValue;
  return launch(qkv_write_kernel, a, row_grid(a.rows, width), kRowThreads, 0, true, stream);
}

}  // namespace pyllm::cuda
