// Packs weights into the panels of the matmul (core/types.h), converting their dtype.
#include "cpu/kernels/pack_tile.h"
#include "cpu/kernels/panel_rows.h"

namespace pyllm::PYLLM_ISA {
namespace {

// The tile's rows to the panel's columns [column, column + columns), from inner element k on.
void emit(const Tile& tile, const PackArgs& a, unsigned char* panel, int64_t column, int64_t columns, int64_t k,
          int64_t depth) {
  if (a.dst.dtype == DType::bf16) {
    alignas(64) uint16_t even[kPanel], odd[kPanel];
    for (int64_t i = 0; i < depth; i += 2) {
      for (int64_t c = 0; c < kPanel; c += F::N) {
        simd::store_bf16(even + c, simd::load(tile.values[i] + c));
        simd::store_bf16(odd + c, i + 1 < depth ? simd::load(tile.values[i + 1] + c) : simd::zero());
      }
      auto* out = reinterpret_cast<uint32_t*>(panel) + (k + i) / 2 * kPanel + column;
      for (int64_t c = 0; c < columns; ++c) out[c] = uint32_t(odd[c]) << 16 | even[c];
    }
    return;
  }
  for (int64_t i = 0; i < depth; ++i) {
    const int64_t at = (k + i) * kPanel + column;
    for (int64_t c = 0; c < columns; c += F::N) {
      const int n = int(least(F::N, columns - c));
      const F v = simd::load(tile.values[i] + c);
      if (a.dst.dtype == DType::f32)
        simd::store_n(reinterpret_cast<float*>(panel) + at + c, v, n);
      else
        simd::store_f16_n(reinterpret_cast<uint16_t*>(panel) + at + c, v, n);
    }
  }
}

}  // namespace

void pack(const PackArgs& a, Parallel& pool) {
  if (a.dst.integers()) return pack_integers(a, pool);
  for_panels(a, pool, [&](const PanelPart& part) {
    Tile tile;
    for (int64_t k = 0; k < a.dst.k; k += kDepth) {
      const int64_t depth = least(kDepth, a.dst.k - k);
      fill(tile, a, part.row, part.columns, k, depth);
      emit(tile, a, part.panel, part.column, part.columns, k, depth);
    }
  });
}

void unpack(const UnpackArgs& a, Parallel& pool) {
  parallel_for(pool, a.src.panels() * a.src.parts, [&](int64_t panel, int) {
    const int64_t row = panel / a.src.parts * kPanel, rows = least(kPanel, a.src.n - row);
    float* dst = a.dst + (panel % a.src.parts * a.src.n + row) * a.dst_stride;
    alignas(64) float widened[kWidenRows * kPanel];
    for (int64_t k = 0; k < a.src.k; k += kWidenRows) {
      const int64_t depth = least(kWidenRows, a.src.k - k);
      transpose(dst + k, a.dst_stride, rows_of_panel(a.src, panel, k, depth, widened), kPanel, depth, rows);
    }
  });
}

}  // namespace pyllm::PYLLM_ISA
