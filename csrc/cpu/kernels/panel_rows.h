// Packed weights as float32.
#pragma once
#include "cpu/kernels/kernel.h"

namespace pyllm::PYLLM_ISA {

// Inner elements [k, k + count) of a packed panel of floats as rows [count][kPanel]: where they stand, or widened into
// `widened` [kWidenRows][kPanel]. k is even, count at most kWidenRows.
constexpr int64_t kWidenRows = 64;
static inline const float* rows_of_panel(const PackedView& w, int64_t panel, int64_t k, int64_t count, float* widened) {
  const char* data = static_cast<const char*>(w.data) + panel * w.panel_bytes() + w.values_bytes(k);
  if (w.dtype == DType::f32) return reinterpret_cast<const float*>(data);
  const auto* narrow = reinterpret_cast<const uint16_t*>(data);
  if (w.dtype == DType::f16) {
    for (int64_t i = 0; i < count * kPanel; i += simd::F::N) simd::store(widened + i, simd::load_f16(narrow + i));
    return widened;
  }
  for (int64_t i = 0; i < count; i += 2) {
    for (int64_t c = 0; c < kPanel; c += simd::F::N) {
      simd::F even, odd;
      simd::load_bf16_pairs(narrow + i * kPanel + 2 * c, even, odd);
      simd::store(widened + i * kPanel + c, even);
      simd::store(widened + (i + 1) * kPanel + c, odd);
    }
  }
  return widened;
}

}  // namespace pyllm::PYLLM_ISA
