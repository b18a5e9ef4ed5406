// What happens to neighbouring sums of a matrix product before they are stored.
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

// The same for four, whose first column is a multiple of 4: in one piece where the row has them all and nothing is misaligned. Loops that
// are not unrolled keep the code short.
__device__ __forceinline__ void finish_quad(const MatmulArgs& a, int64_t row, int64_t column, float4 v) {
  const int64_t out = a.gated ? column / 2 : column, place = row * a.y_stride + out;
  const float* bias = a.bias ? a.bias + column : nullptr;
  const float* residual = a.residual ? a.residual + row * a.residual_stride + out : nullptr;
  const auto misplaced = [](const void* p, int64_t by) { return reinterpret_cast<uintptr_t>(p) % uintptr_t(by) != 0; };
  const int64_t size = a.y_dtype == DType::f32 ? 4 : 2;
  const void* y = static_cast<const char*>(a.y) + place * size;
  if (row >= a.rows || column + 3 >= a.n || misplaced(bias, 16) ||
      (!a.gated && (misplaced(residual, 16) || misplaced(y, 4 * size)))) {
#pragma unroll 1
    for (int i = 0; i < 4; i += 2) {
      finish_pair(a, row, column + i, v.x, v.y);
      v = float4{v.z, v.w, v.x, v.y};
    }
    return;
  }
  if (bias) {
    const float4 b = *reinterpret_cast<const float4*>(bias);
    v = float4{v.x + b.x, v.y + b.y, v.z + b.z, v.w + b.w};
  }
  if (a.gated) {
#pragma unroll 1
    for (int i = 0; i < 2; ++i) v = float4{v.z, v.w, activate(v.x, a.activation) * v.y, v.z};
    if (residual) v = float4{v.x + residual[0], v.y, v.z + residual[1], v.w};
    store_pair(a.y, a.y_dtype, place, v.x, v.z);
    return;
  }
  if (a.activation != Activation::none) {
#pragma unroll 1
    for (int i = 0; i < 4; ++i) v = float4{v.y, v.z, v.w, activate(v.x, a.activation)};
  }
  if (residual) {
    const float4 r = *reinterpret_cast<const float4*>(residual);
    v = float4{v.x + r.x, v.y + r.y, v.z + r.z, v.w + r.w};
  }
  if (a.y_dtype == DType::f32) {
    *reinterpret_cast<float4*>(static_cast<float*>(a.y) + place) = v;
  } else {
    *reinterpret_cast<uint2*>(static_cast<bf16*>(a.y) + place) = uint2{pack_bf16(v.x, v.y), pack_bf16(v.z, v.w)};
  }
}

}  // namespace pyllm::cuda
