// Queries, keys and values of one product to where attention reads them, on an NVIDIA GPU. Letters as in core/args.h.
#pragma once
#include <cuda_runtime.h>

#include "core/types.h"

namespace pyllm::cuda {

// What comes behind the product of queries, keys and values: heads of queries and keys are normed where there are weights, and rotated
// where cos is not null; then queries go to q, keys and values into the cache, in the layout of cuda/attention.h.
//
// In a paired product channels that are rotated together are neighbours, as skinny_qkv (cuda/matmul.h) wants them: (0, half),
// (1, half + 1), ... in heads of queries and keys; those from 2 * half on, and values, in order.
struct QkvWriteArgs {
  void* q;           // [T, H, E] of q_dtype
  const float* qkv;  // [T, H + 2 G, E]
  CacheView cache;   // float32 or bf16
  const float* cos;  // [T, half] or null
  const float* sin;
  const int64_t* slots;                       // [T]: block * kBlockTokens + offset; one outside the cache is skipped
  const float* q_norm;                        // [E], or [H, E] where norm_stride is E, or null: no norm
  const float* k_norm;                        // [E] or [G, E], or null
  int64_t rows, heads, half;                  // T, H
  int64_t q_stride, qkv_stride, norm_stride;  // the last between heads, 0 where they share their weights
  float eps;
  NormKind norm;
  bool paired;
  DType q_dtype;
};
cudaError_t qkv_write(const QkvWriteArgs& args, cudaStream_t stream);

}  // namespace pyllm::cuda
