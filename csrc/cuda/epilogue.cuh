// What happens to two neighbouring sums of a matrix product before they are stored.
#pragma once
#include "cuda/activate.cuh"
#include "cuda/matmul.h"
#include "cuda/store.cuh"

namespace pyllm::cuda {

// Sums of columns `column` (even) and the next; those past N are left out.
__device__ __forceinline__ void finish_pair(const MatmulArgs& a, int64_t row, int64_t column, float v0, float v1) {
  if (row >= a.rows || column >= a.n) return;
  const bool both = column + 1 < a.n;
  if (a.bias) {
    v0 += a.bias[column];
    if (both) v1 += a.bias[column + 1];
  }
  v0 = activate(v0, a.activation);
  if (a.gated) {
    v0 *= v1;
    column /= 2;
  }
  const float* residual = a.residual ? a.residual + row * a.residual_stride + column : nullptr;
  if (residual) v0 += residual[0];
  const int64_t place = row * a.y_stride + column;
  if (a.gated || !both) {
    store(a.y, a.y_dtype, place, v0);
    return;
  }
  v1 = activate(v1, a.activation);
  if (residual) v1 += residual[1];
  store_pair(a.y, a.y_dtype, place, v0, v1);
}

}  // namespace pyllm::cuda
