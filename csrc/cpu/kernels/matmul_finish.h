// The matmul's epilogue, over a finished panel of sums.
#pragma once
#include "cpu/kernels/math.h"

namespace pyllm::PYLLM_ISA {

// act(sums + bias) + residual of a whole panel, which most are; column is its first.
static inline void finish_whole(const MatmulArgs& a, int64_t row, int64_t rows, int64_t column, const float* sums) {
  const float* bias = a.bias ? a.bias + column : nullptr;
  with_activation(a.activation, [&](auto tag) {
    for (int64_t r = 0; r < rows; ++r) {
      float* y = a.y + (row + r) * a.y_stride + column;
      const float* residual = a.residual ? a.residual + (row + r) * a.residual_stride + column : nullptr;
      for (int64_t c = 0; c < kPanel; c += F::N) {
        F v = simd::load(sums + r * kPanel + c);
        if (bias) v = v + simd::load(bias + c);
        v = apply<decltype(tag)::value>(v);
        if (residual) v = v + simd::load(residual + c);
        simd::store(y + c, v);
      }
    }
  });
}

// Bias, activation, gate and residual, and what the activation is applied to: one panel of rows [row, row + rows) of y from its sums [rows][kPanel], and where
// gated from those of the same panel of the other part. Sums are multiplied by the scales [kPanel] of their columns first
// where these are not null.
static inline void finish_panel(const MatmulArgs& a, int64_t row, int64_t rows, int64_t panel, const float* sums,
                                const float* up_sums, const float* scales = nullptr, const float* up_scales = nullptr) {
  const bool gated = a.w.parts == 2;
  const int64_t column = panel * kPanel, columns = a.w.n - column < kPanel ? a.w.n - column : kPanel;
  if (columns == kPanel && !gated && !scales && !a.pre) return finish_whole(a, row, rows, column, sums);
  for (int64_t r = 0; r < rows; ++r) {
    const float* sum = sums + r * kPanel;
    const float* up = up_sums + r * kPanel;
    float* y = a.y + (row + r) * a.y_stride + column;
    const float* residual = a.residual ? a.residual + (row + r) * a.residual_stride + column : nullptr;
    float* pre = a.pre ? a.pre + (row + r) * a.pre_stride + column : nullptr;
    for (int64_t c = 0; c < columns; c += F::N) {
      const int n = int(columns - c < F::N ? columns - c : F::N);
      F v = simd::load(sum + c);
      if (scales) v = v * simd::load(scales + c);
      if (a.bias) v = v + load_up_to(a.bias + column + c, n);
      if (pre) store_up_to(pre + c, v, n);
      if (a.activation != Activation::none) v = apply(a.activation, v);
      if (gated) {
        F u = simd::load(up + c);
        if (up_scales) u = u * simd::load(up_scales + c);
        if (a.bias_up) u = u + load_up_to(a.bias_up + column + c, n);
        if (pre) store_up_to(pre + a.w.n + c, u, n);
        v = v * u;
      }
      if (residual) v = v + load_up_to(residual + c, n);
      store_up_to(y + c, v, n);
    }
  }
}

}  // namespace pyllm::PYLLM_ISA
