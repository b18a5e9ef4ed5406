// What packing is made of: the part of a panel that a call fills, and the tile in which weights become columns.
#pragma once
#include "cpu/kernels/transpose.h"

namespace pyllm::PYLLM_ISA {

using simd::F;

void pack_integers(const PackArgs& args, Parallel& pool);

constexpr int64_t kDepth = 128;  // inner elements that go through the tile at once

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// kDepth inner elements by 64 columns as float32, on their way into a panel.
struct Tile {
  alignas(64) float values[kDepth][kPanel];
};

// Elements [0, count) from src, adjacent and of any alignment, as float32.
inline void load_row(float* out, const unsigned char* src, DType dtype, int64_t count) {
  const auto* half = reinterpret_cast<const uint16_t*>(src);
  const auto* full = reinterpret_cast<const float*>(src);
  for (int64_t i = 0; i < count; i += F::N) {
    const int n = int(least(F::N, count - i));
    F v;
    if (n == F::N)
      v = dtype == DType::f32   ? simd::load(full + i)
          : dtype == DType::f16 ? simd::load_f16(half + i)
                                : simd::load_bf16(half + i);
    else
      v = dtype == DType::f32   ? simd::load_n(full + i, n)
          : dtype == DType::f16 ? simd::load_f16_n(half + i, n)
                                : simd::load_bf16_n(half + i, n);
    if (n == F::N)
      simd::store(out + i, v);
    else
      simd::store_n(out + i, v, n);
  }
}

// tile[k][c] for `depth` inner elements and `columns` rows of src from (row, k) on.
inline void fill(Tile& tile, const PackArgs& a, int64_t row, int64_t columns, int64_t k, int64_t depth) {
  const int64_t size = dtype_bytes(a.src_dtype);
  const auto* src = static_cast<const unsigned char*>(a.src) + (row * a.row_stride + k * a.col_stride) * size;
  if (a.row_stride == 1) {  // a transposed view: adjacent outputs are adjacent in memory
    for (int64_t i = 0; i < depth; ++i) load_row(tile.values[i], src + i * a.col_stride * size, a.src_dtype, columns);
    return;
  }
  alignas(64) float lines[4][kDepth] = {};
  alignas(64) unsigned char gathered[kDepth * 4];
  for (int64_t c = 0; c < columns; ++c) {
    const unsigned char* from = src + c * a.row_stride * size;
    if (a.col_stride != 1) {
      for (int64_t i = 0; i < depth; ++i)
        std::memcpy(gathered + i * size, from + i * a.col_stride * size, size_t(size));
      from = gathered;
    }
    load_row(lines[c % 4], from, a.src_dtype, depth);
    if (c % 4 == 3 || c + 1 == columns)
      transpose(tile.values[0] + c / 4 * 4, kPanel, lines[0], kDepth, 4, round_up(depth, 4));
  }
}

// Columns [column, column + columns) of a panel, which rows [row, row + columns) of the call's arrays go to.
struct PanelPart {
  unsigned char* panel;
  int64_t column, columns, row;
};

// fn(part) for each panel that rows [a.row, a.row + a.rows) have a share in.
template <class Args, class Fn>
inline void for_panels(const Args& a, Parallel& pool, Fn&& fn) {
  if (a.rows == 0) return;
  const int64_t first = a.row / kPanel, last = (a.row + a.rows - 1) / kPanel;
  auto* data = static_cast<unsigned char*>(const_cast<void*>(a.dst.data));
  parallel_for(pool, last - first + 1, [&](int64_t chunk, int) {
    const int64_t panel = first + chunk;
    const int64_t begin = a.row > panel * kPanel ? a.row : panel * kPanel;
    const int64_t end = least(a.row + a.rows, (panel + 1) * kPanel);
    fn(PanelPart{data + (panel * a.dst.parts + a.part) * a.dst.panel_bytes(), begin - panel * kPanel, end - begin,
                 begin - a.row});
  });
}

}  // namespace pyllm::PYLLM_ISA
