// What happens to two neighbouring sums of a matrix product before they are stored.
#pragma once
#include "cuda/activate.cuh"
#include "cuda/matmul.h"

namespace pyllm::cuda {

__device__ __forceinline__ void store(const MatmulArgs& a, int64_t row, int64_t column, float v) {
  if (a.residual) v += a.residual[row * a.residual_stride + column];
  if (a.y_dtype == DType::f32) {
    static_cast<float*>(a.y)[row * a.y_stride + column] = v;
  } else {
    static_cast<bf16*>(a.y)[row * a.y_stride + column] = bf16(pack_bf16(v, 0.0f));
  }
}

// Sums of columns `column` (even) and the next; those past N are left out.
__device__ __forceinline__ void finish_pair(const MatmulArgs& a, int64_t row, int64_t column, float v0, float v1) {
  if (row >= a.rows || column >= a.n) return;
  if (a.bias) {
    v0 += a.bias[column];
    if (column + 1 < a.n) v1 += a.bias[column + 1];
  }
  if (a.gated) {
    store(a, row, column / 2, activate(v0, a.activation) * v1);
    return;
  }
  store(a, row, column, activate(v0, a.activation));
  if (column + 1 < a.n) store(a, row, column + 1, activate(v1, a.activation));
}

}  // namespace pyllm::cuda
