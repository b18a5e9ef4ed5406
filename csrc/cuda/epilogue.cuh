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

// Sums of four neighbouring columns of each of four rows.
using Quads = float4[4];

template <class Fn>
__device__ __forceinline__ void activate_quads(Quads& v, bool gated, Fn fn) {
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = float4{fn(v[i].x), v[i].y, fn(v[i].z), v[i].w};
  if (gated) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = float4{v[i].x, fn(v[i].y), v[i].z, fn(v[i].w)};
}

// The same as finish_pair for rows `row`, `row` + 4, `row` + 8 and `row` + 12 and the columns from `column`, a multiple of 4, on, which are
// within N and lie in pieces. What is to be done is asked once for all of them, and then loads follow each other, and stores.
__device__ __forceinline__ void finish_quads(const MatmulArgs& a, int64_t row, int64_t column, Quads& v) {
  if (a.bias) {
    const float4 b = *reinterpret_cast<const float4*>(a.bias + column);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = float4{v[i].x + b.x, v[i].y + b.y, v[i].z + b.z, v[i].w + b.w};
  }
  if (a.activation == Activation::silu) {
    activate_quads(v, a.gated, [](float x) { return x * sigmoid(x); });
  } else if (a.activation == Activation::gelu_tanh) {
    activate_quads(v, a.gated, gelu_tanh);
  } else if (a.activation != Activation::none) {
#pragma unroll 1
    for (int i = 0; i < 16; ++i) {
      const float x = a.gated && i % 2 ? v[0].x : activate(v[0].x, a.activation);
      v[0] = float4{v[0].y, v[0].z, v[0].w, v[1].x};
      v[1] = float4{v[1].y, v[1].z, v[1].w, v[2].x};
      v[2] = float4{v[2].y, v[2].z, v[2].w, v[3].x};
      v[3] = float4{v[3].y, v[3].z, v[3].w, x};
    }
  }
  // Calls fn(i, place) for those of the rows that there are.
  const int left = a.rows - row < 16 ? int(a.rows - row) : 16;
  const auto for_rows = [&](int64_t stride, auto fn) {
    int64_t place = row * stride + column;
#pragma unroll
    for (int i = 0; i < 4; ++i, place += 4 * stride)
      if (i * 4 < left) fn(i, place);
  };
  if (a.gated) {
    column /= 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = float4{v[i].x * v[i].y, v[i].z * v[i].w, 0.0f, 0.0f};
    if (a.residual) {
      float2 r[4] = {};
      for_rows(a.residual_stride,
               [&](int i, int64_t place) { r[i] = *reinterpret_cast<const float2*>(a.residual + place); });
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = float4{v[i].x + r[i].x, v[i].y + r[i].y, 0.0f, 0.0f};
    }
    if (a.y_dtype == DType::f32) {
      float* y = static_cast<float*>(a.y);
      for_rows(a.y_stride,
               [&](int i, int64_t place) { *reinterpret_cast<float2*>(y + place) = float2{v[i].x, v[i].y}; });
    } else {
      bf16* y = static_cast<bf16*>(a.y);
      for_rows(a.y_stride,
               [&](int i, int64_t place) { *reinterpret_cast<uint32_t*>(y + place) = pack_bf16(v[i].x, v[i].y); });
    }
    return;
  }
  if (a.residual) {
    float4 r[4] = {};
    for_rows(a.residual_stride,
             [&](int i, int64_t place) { r[i] = *reinterpret_cast<const float4*>(a.residual + place); });
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = float4{v[i].x + r[i].x, v[i].y + r[i].y, v[i].z + r[i].z, v[i].w + r[i].w};
  }
  if (a.y_dtype == DType::f32) {
    float* y = static_cast<float*>(a.y);
    for_rows(a.y_stride, [&](int i, int64_t place) { *reinterpret_cast<float4*>(y + place) = v[i]; });
  } else {
    bf16* y = static_cast<bf16*>(a.y);
    for_rows(a.y_stride, [&](int i, int64_t place) {
      *reinterpret_cast<uint2*>(y + place) = uint2{pack_bf16(v[i].x, v[i].y), pack_bf16(v[i].z, v[i].w)};
    });
  }
}

// The same where columns may be past N, and anything may lie anywhere.
__device__ __forceinline__ void finish_any_quads(const MatmulArgs& a, int64_t row, int64_t column, Quads& v) {
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    finish_pair(a, row + i / 2 * 4, column + i % 2 * 2, v[0].x, v[0].y);
    v[0] = float4{v[0].z, v[0].w, v[1].x, v[1].y};
    v[1] = float4{v[1].z, v[1].w, v[2].x, v[2].y};
    v[2] = float4{v[2].z, v[2].w, v[3].x, v[3].y};
    v[3] = float4{v[3].z, v[3].w, 0.0f, 0.0f};
  }
}

// Whether four sums' outputs, residuals and biases lie in pieces of their size.
inline bool lies_in_pieces(const MatmulArgs& a) {
  const int64_t count = a.gated ? 2 : 4, size = a.y_dtype == DType::f32 ? 4 : 2;
  const auto lies = [](const void* p, int64_t stride, int64_t bytes, int64_t item) {
    return reinterpret_cast<uintptr_t>(p) % uintptr_t(bytes) == 0 && stride * item % bytes == 0;
  };
  return lies(a.y, a.y_stride, count * size, size) && lies(a.bias, 0, 16, 4) &&
         (!a.residual || lies(a.residual, a.residual_stride, count * 4, 4));
}

}  // namespace pyllm::cuda
