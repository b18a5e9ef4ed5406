// Queries, keys and values of one product to where attention reads them, on an NVIDIA GPU. Letters as in core/args.h.
#pragma once
#include <cuda_runtime.h>

#include "core/types.h"

namespace pyllm::cuda {

// What skinny_qkv (cuda/matmul.h) does behind its product, for any number of rows: queries and keys are rotated where cos is not null,
// queries go to q, keys and values into the cache, in the layout of cuda/attention.h. In heads of queries and keys the channels of qkv
// stand in pairs that are rotated together, (0, half), (1, half + 1), ...; those from 2 * half on, and values, in order.
struct QkvWriteArgs {
  void* q;           // [T, H, E] of q_dtype
  const float* qkv;  // [T, H + 2 G, E]
  CacheView cache;   // float32 or bf16
  const float* cos;  // [T, half] or null
  const float* sin;
  const int64_t* slots;       // [T]: block * kBlockTokens + offset; one outside the cache is skipped
  int64_t rows, heads, half;  // T, H
  int64_t q_stride, qkv_stride;
  DType q_dtype;
};
cudaError_t qkv_write(const QkvWriteArgs& args, cudaStream_t stream);

}  // namespace pyllm::cuda
