// Storing results, as float32 or rounded to bf16.
#pragma once
#include "core/types.h"
#include "cuda/ptx.cuh"

namespace pyllm::cuda {

__device__ __forceinline__ void store(float* to, float v) { *to = v; }
__device__ __forceinline__ void store(bf16* to, float v) { *to = bf16(pack_bf16(v, 0.0f)); }

// Two neighbours, as one piece where they lie at a multiple of its size.
__device__ __forceinline__ void store_pair(float* to, float v0, float v1) {
  if (reinterpret_cast<uintptr_t>(to) % 8 == 0) {
    *reinterpret_cast<float2*>(to) = float2{v0, v1};
  } else {
    to[0] = v0;
    to[1] = v1;
  }
}
__device__ __forceinline__ void store_pair(bf16* to, float v0, float v1) {
  const uint32_t pair = pack_bf16(v0, v1);
  if (reinterpret_cast<uintptr_t>(to) % 4 == 0) {
    *reinterpret_cast<uint32_t*>(to) = pair;
  } else {
    to[0] = bf16(pair);
    to[1] = bf16(pair >> 16);
  }
}

// The same at to[place], and the next, of an array of `dtype`.
__device__ __forceinline__ void store(void* to, DType dtype, int64_t place, float v) {
  if (dtype == DType::f32) {
    store(static_cast<float*>(to) + place, v);
  } else {
    store(static_cast<bf16*>(to) + place, v);
  }
}
__device__ __forceinline__ void store_pair(void* to, DType dtype, int64_t place, float v0, float v1) {
  if (dtype == DType::f32) {
    store_pair(static_cast<float*>(to) + place, v0, v1);
  } else {
    store_pair(static_cast<bf16*>(to) + place, v0, v1);
  }
}

}  // namespace pyllm::cuda
