// Packs weights into the panels of the matmul (core/types.h), converting their dtype.
#include "cpu/kernels/kernel.h"

namespace pyllm::PYLLM_ISA {
namespace {

using simd::F;

constexpr int64_t kDepth = 128;  // inner elements that go through the tile at once

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// kDepth inner elements by 64 columns as float32, on their way into a panel.
struct Tile {
  alignas(64) float values[kDepth][kPanel];
};

// Elements [0, count) from src, adjacent and of any alignment, as float32.
void load_row(float* out, const unsigned char* src, DType dtype, int64_t count) {
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

// tile[k][column + j] = lines[j][k], four by four.
void transpose(Tile& tile, const float (*lines)[kDepth], int64_t column, int64_t depth) {
  typedef float Four __attribute__((vector_size(16)));
  typedef int32_t Index __attribute__((vector_size(16)));
  for (int64_t k = 0; k < depth; k += 4) {
    Four r[4];
    for (int j = 0; j < 4; ++j) std::memcpy(&r[j], lines[j] + k, sizeof r[j]);
    const Four low01 = __builtin_shuffle(r[0], r[1], Index{0, 4, 1, 5}),
               low23 = __builtin_shuffle(r[2], r[3], Index{0, 4, 1, 5});
    const Four high01 = __builtin_shuffle(r[0], r[1], Index{2, 6, 3, 7}),
               high23 = __builtin_shuffle(r[2], r[3], Index{2, 6, 3, 7});
    const Four out[4] = {
        __builtin_shuffle(low01, low23, Index{0, 1, 4, 5}), __builtin_shuffle(low01, low23, Index{2, 3, 6, 7}),
        __builtin_shuffle(high01, high23, Index{0, 1, 4, 5}), __builtin_shuffle(high01, high23, Index{2, 3, 6, 7})};
    for (int j = 0; j < 4; ++j) std::memcpy(tile.values[k + j] + column, &out[j], sizeof out[j]);
  }
}

// tile[k][c] for `depth` inner elements and `columns` rows of src from (row, k) on.
void fill(Tile& tile, const PackArgs& a, int64_t row, int64_t columns, int64_t k, int64_t depth) {
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
    if (c % 4 == 3 || c + 1 == columns) transpose(tile, lines, c / 4 * 4, depth);
  }
}

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
  if (a.rows == 0) return;
  const int64_t first = a.row / kPanel, last = (a.row + a.rows - 1) / kPanel;
  auto* data = static_cast<unsigned char*>(const_cast<void*>(a.dst.data));
  parallel_for(pool, last - first + 1, [&](int64_t chunk, int) {
    const int64_t panel = first + chunk;
    const int64_t begin = a.row > panel * kPanel ? a.row : panel * kPanel;
    const int64_t end = least(a.row + a.rows, (panel + 1) * kPanel);
    unsigned char* out = data + (panel * a.dst.parts + a.part) * a.dst.panel_bytes();
    Tile tile;
    for (int64_t k = 0; k < a.dst.k; k += kDepth) {
      const int64_t depth = least(kDepth, a.dst.k - k);
      fill(tile, a, begin - a.row, end - begin, k, depth);
      emit(tile, a, out, begin - panel * kPanel, end - begin, k, depth);
    }
  });
}

}  // namespace pyllm::PYLLM_ISA
