// Rotary position embedding: the angles of a step, once for all layers; the rotation of heads in place, and of keys on their way into
// the cache.
#include "cuda/launch.h"
#include "cuda/layers.h"
#include "cuda/rows.cuh"

namespace pyllm::cuda {
namespace {

// Angles are products in float32, as in the published models. Cosine and sine are taken of half turns in float64: it needs no
// local memory at any size of angle, and is exact to half a unit of float32.
__global__ void __launch_bounds__(kRowThreads) rope_angles_kernel(const __grid_constant__ RopeAnglesArgs a) {
  wait_for_earlier_kernels();
  let_later_kernels_start();
  const int64_t row = blockIdx.x;
  const float* inv_freq = a.inv_freq + (a.table ? a.table[row] : 0) * a.half;
  const float position = float(a.positions[row]);
  for_columns(a.half, [&](int64_t i) {
    const double half_turns = double(position * inv_freq[i]) * 0.31830988618379067154;
    a.cos[row * a.half + i] = float(cospi(half_turns)) * a.scaling;
    a.sin[row * a.half + i] = float(sinpi(half_turns)) * a.scaling;
  });
}

__global__ void __launch_bounds__(kRowThreads) rope_kernel(const __grid_constant__ RopeArgs a) {
  wait_for_earlier_kernels();
  let_later_kernels_start();
  const int64_t row = blockIdx.x;
  for_columns(a.heads * a.half, [&](int64_t i) {
    const int head = int(i) / int(a.half), channel = int(i) % int(a.half);
    float* x = a.x + row * a.x_stride + head * a.head_size + channel;
    const float cos = a.cos[row * a.half + channel], sin = a.sin[row * a.half + channel] * (a.inverse ? -1.0f : 1.0f);
    const float first = x[0], second = x[a.half];
    x[0] = first * cos - second * sin;
    x[a.half] = second * cos + first * sin;
  });
}

template <class T>
__global__ void __launch_bounds__(kRowThreads) kv_write_kernel(const __grid_constant__ KvWriteArgs a) {
  wait_for_earlier_kernels();
  let_later_kernels_start();
  const int64_t row = blockIdx.x, slot = a.slots[row];
  if (slot < 0 || slot / kBlockTokens >= a.cache.blocks) return;
  const int64_t size = a.cache.head_size, half = a.cache.half_elements();
  const int pitch = int(a.cache.padded_head());
  T* block =
      static_cast<T*>(a.cache.data) + slot / kBlockTokens * a.cache.block_elements() + slot % kBlockTokens * pitch;
  for_columns(a.cache.kv_heads * pitch, [&](int64_t i) {
    const int head = int(i) / pitch, c = int(i) % pitch;
    T* to = block + head * 2 * half + c;
    float key = 0.0f, value = 0.0f;  // of channels past the head's
    if (c < size) {
      const float* k = a.k + row * a.k_stride + head * size;
      key = k[c];
      value = a.v[row * a.v_stride + head * size + c];
      if (a.cos && c < 2 * a.half) {
        const int64_t j = row * a.half + (c < a.half ? c : c - a.half);
        key = c < a.half ? key * a.cos[j] - k[c + a.half] * a.sin[j] : key * a.cos[j] + k[c - a.half] * a.sin[j];
      }
    }
    store(to, key);
    store(to + half, value);
  });
}

}  // namespace

cudaError_t rope_angles(const RopeAnglesArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.half == 0) return cudaSuccess;
  if (args.half > kMaxRowWidth) return cudaErrorInvalidValue;
  return launch(rope_angles_kernel, args, row_grid(args.rows, args.half), kRowThreads, 0, stream);
}

cudaError_t rope(const RopeArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.heads * args.half == 0) return cudaSuccess;
  if (args.heads * args.half > kMaxRowWidth) return cudaErrorInvalidValue;
  return launch(rope_kernel, args, row_grid(args.rows, args.heads * args.half), kRowThreads, 0, stream);
}

cudaError_t kv_write(const KvWriteArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.cache.kv_heads == 0) return cudaSuccess;
  const int64_t width = args.cache.kv_heads * args.cache.padded_head();
  if ((args.cache.dtype != DType::f32 && args.cache.dtype != DType::bf16) || width > kMaxRowWidth)
    return cudaErrorInvalidValue;
  return launch(args.cache.dtype == DType::f32 ? kv_write_kernel<float> : kv_write_kernel<bf16>, args,
                row_grid(args.rows, width), kRowThreads, 0, stream);
}

}  // namespace pyllm::cuda
