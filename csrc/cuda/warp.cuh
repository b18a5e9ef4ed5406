// Sums over the lanes of a warp.
#pragma once
#include <cuda_runtime.h>

namespace pyllm::cuda {

// The same bits in every lane.
__device__ __forceinline__ float warp_sum(float v) {
  for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

}  // namespace pyllm::cuda
