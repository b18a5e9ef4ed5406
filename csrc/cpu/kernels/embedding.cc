// Row lookups and their gradients: embeddings of tokens, positions and types, and the gather of the rows that need logits.
#include "cpu/kernels/rows.h"

namespace pyllm::PYLLM_ISA {
namespace {

using namespace simd;

constexpr int64_t kColumns = 64;  // of a gradient that one thread adds at a time

// Column `lane` of a panel of integers: (value - zero) * scale.
inline void integer_row(float* y, const PackedView& w, const uint8_t* panel, int64_t lane) {
  const bool nibbles = w.dtype == DType::i4;
  const int64_t group = w.group ? w.group : w.padded_k();
  for (int64_t k = 0; k < w.k; k += group) {
    const int64_t count = w.k - k < group ? w.k - k : group;
    const uint8_t* scales = panel + w.values_bytes(round_up(count, kIntegerPad));
    const uint8_t zero = w.has_zeros ? scales[kPanel * dtype_bytes(w.scale_dtype) + lane] : nibbles ? 8 : 128;
    alignas(64) float scale[F::N] = {};
    const auto* half = reinterpret_cast<const uint16_t*>(scales) + lane;
    if (w.scale_dtype == DType::f32)
      scale[0] = reinterpret_cast<const float*>(scales)[lane];
    else
      store(scale, w.scale_dtype == DType::f16 ? load_f16_n(half, 1) : load_bf16_n(half, 1));
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t* quad = panel + (i / (nibbles ? 8 : 4)) * 4 * kPanel + 4 * lane;
      const int value = nibbles ? quad[i % 4] >> i % 8 / 4 * 4 & 15 : quad[i % 4];
      y[k + i] = float(value - zero) * scale[0];
    }
    panel = scales + w.scales_bytes();
  }
}

// Output n of a packed matrix, all k: one element, or pair of elements, from each line of its panel.
inline void packed_row(float* y, const PackedView& w, int64_t n) {
  const int64_t panel = n / kPanel, lane = n % kPanel;
  const char* base = static_cast<const char*>(w.data) + panel * w.parts * w.panel_bytes();
  if (w.integers()) return integer_row(y, w, reinterpret_cast<const uint8_t*>(base), lane);
  if (w.dtype == DType::f32) {
    const float* p = reinterpret_cast<const float*>(base) + lane;
    for (int64_t k = 0; k < w.k; ++k) y[k] = p[k * kPanel];
    return;
  }
  const uint16_t* p = reinterpret_cast<const uint16_t*>(base) + (w.dtype == DType::bf16 ? 2 * lane : lane);
  for (int64_t k = 0; k < w.k; k += F::N) {
    const int count = int(w.k - k < F::N ? w.k - k : F::N);
    uint16_t halves[F::N] = {};
    if (w.dtype == DType::bf16) {
      for (int i = 0; i < count; ++i) halves[i] = p[((k + i) / 2) * 2 * kPanel + (k + i) % 2];
      store_n(y + k, load_bf16(halves), count);
    } else {
      for (int i = 0; i < count; ++i) halves[i] = p[(k + i) * kPanel];
      store_n(y + k, load_f16(halves), count);
    }
  }
}

// Row n of a plain table, whose elements may lie at any address.
inline void plain_row(float* y, const void* table, DType dtype, int64_t stride, int64_t n, int64_t dim) {
  if (dtype == DType::f32) {
    std::memcpy(y, static_cast<const char*>(table) + n * stride * int64_t(sizeof(float)), size_t(dim) * sizeof(float));
    return;
  }
  const char* row = static_cast<const char*>(table) + n * stride * int64_t(sizeof(uint16_t));
  for (int64_t k = 0; k < dim; k += F::N) {
    const int count = int(dim - k < F::N ? dim - k : F::N);
    uint16_t halves[F::N] = {};
    std::memcpy(halves, row + k * int64_t(sizeof(uint16_t)), size_t(count) * sizeof(uint16_t));
    store_n(y + k, dtype == DType::bf16 ? load_bf16(halves) : load_f16(halves), count);
  }
}

}  // namespace

void embedding(const EmbeddingArgs& a, Parallel& pool) {
  for_rows(pool, a.rows, a.dim, [&](int64_t t) {
    float* y = a.y + t * a.y_stride;
    if (a.packed.data)
      packed_row(y, a.packed, a.tokens[t]);
    else
      plain_row(y, a.table, a.table_dtype, a.table_stride, a.tokens[t], a.dim);
    if (a.positions) add_row(y, a.position_table + a.positions[t] * a.position_stride, a.dim);
    if (a.types) add_row(y, a.type_table + a.types[t] * a.type_stride, a.dim);
  });
}

// By ranges of columns, each of which takes all tokens in order.
void embedding_backward(const EmbeddingBackwardArgs& a, Parallel& pool) {
  parallel_for(pool, (a.dim + kColumns - 1) / kColumns, [&](int64_t chunk, int) {
    const int64_t begin = chunk * kColumns, n = a.dim - begin < kColumns ? a.dim - begin : kColumns;
    for (int64_t t = 0; t < a.rows; ++t) {
      const float* dy = a.dy + t * a.dy_stride + begin;
      const int64_t token = a.tokens[t];
      if (a.packed.data) {
        float* p = static_cast<float*>(const_cast<void*>(a.packed.data)) +
                   (token / kPanel * a.packed.k + begin) * kPanel + token % kPanel;
        for (int64_t i = 0; i < n; ++i) p[i * kPanel] += dy[i];
      } else {
        add_row(a.dtable + token * a.table_stride + begin, dy, n);
      }
      if (a.dposition_table) add_row(a.dposition_table + a.positions[t] * a.position_stride + begin, dy, n);
      if (a.d_type_table) add_row(a.d_type_table + a.types[t] * a.type_stride + begin, dy, n);
    }
  });
}

void gather(const GatherArgs& a, Parallel& pool) {
  for_rows(pool, a.rows, a.dim, [&](int64_t r) {
    std::memcpy(a.y + r * a.y_stride, a.x + a.index[r] * a.x_stride, size_t(a.dim) * sizeof(float));
  });
}

void gather_backward(const GatherBackwardArgs& a, Parallel& pool) {
  parallel_for(pool, (a.dim + kColumns - 1) / kColumns, [&](int64_t chunk, int) {
    const int64_t begin = chunk * kColumns, n = a.dim - begin < kColumns ? a.dim - begin : kColumns;
    for (int64_t t = 0; t < a.x_rows; ++t) std::memset(a.dx + t * a.dx_stride + begin, 0, size_t(n) * sizeof(float));
    for (int64_t r = 0; r < a.rows; ++r)
      add_row(a.dx + a.index[r] * a.dx_stride + begin, a.dy + r * a.dy_stride + begin, n);
  });
}

void gather_columns(const GatherColumnsArgs& a, Parallel& pool) {
  for_rows(pool, a.rows, a.columns, [&](int64_t r) {
    float* y = a.y + r * a.y_stride;
    const float* x = a.x + r * a.x_stride;
    for (int64_t i = 0; i < a.columns; ++i) y[i] = x[a.index[i]];
  });
}

void gather_columns_backward(const GatherColumnsBackwardArgs& a, Parallel& pool) {
  for_rows(pool, a.rows, a.columns, [&](int64_t r) {
    float* dx = a.dx + r * a.dx_stride;
    const float* dy = a.dy + r * a.dy_stride;
    for (int64_t i = 0; i < a.columns; ++i) dx[a.index[i]] += dy[i];
  });
}

}  // namespace pyllm::PYLLM_ISA
