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

// Of 16 rows by 32 columns of sums a lane has four neighbouring columns of four rows: row lane / 8 and each fourth one from there on.
using Quads = float4[4];
__device__ __forceinline__ int quad_row() { return threadIdx.x % 32 / 8; }
__device__ __forceinline__ int quad_column() { return threadIdx.x % 8 * 4; }

// Fragments become quads through shared memory: all lanes of a warp leave sums of 8 columns, which they have as of mma_bf16, in rows `pitch`
// floats apart. With a pitch of 8 more than a multiple of 32 rows lie in different banks.
constexpr int kQuadColumns = 32, kQuadPitch = kQuadColumns + 8;
template <int pitch>
__device__ __forceinline__ void leave_sums(const float (&d)[4], float* to) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  *reinterpret_cast<float2*>(to + g * pitch + 2 * t) = float2{d[0], d[1]};
  *reinterpret_cast<float2*>(to + (g + 8) * pitch + 2 * t) = float2{d[2], d[3]};
}
__device__ __forceinline__ void take_quads(Quads& v, const float* from) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    v[i] = *reinterpret_cast<const float4*>(from + (quad_row() + i * 4) * kQuadPitch + quad_column());
}

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
__device__ __forceinline__ bool lies_in_pieces(const MatmulArgs& a) {
  const int outputs = a.gated ? 2 : 4, item = a.y_dtype == DType::f32 ? 4 : 2;
  const auto lies = [&](const void* p, int64_t stride, int size) {
    return (reinterpret_cast<uintptr_t>(p) & uintptr_t(outputs * size - 1)) == 0 && (stride & (outputs - 1)) == 0;
  };
  return lies(a.y, a.y_stride, item) && (reinterpret_cast<uintptr_t>(a.bias) & 15) == 0 &&
         (!a.residual || lies(a.residual, a.residual_stride, 4));
}

}  // namespace pyllm::cuda
