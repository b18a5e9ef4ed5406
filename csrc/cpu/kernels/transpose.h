// Transposition of small blocks, four by four.
#pragma once
#include "cpu/kernels/kernel.h"

namespace pyllm::PYLLM_ISA {

// dst[c][r] = src[r][c] for r < rows, c < columns; strides are between the rows of each.
static inline void transpose(float* dst, int64_t dst_stride, const float* src, int64_t src_stride, int64_t rows,
                             int64_t columns) {
  typedef float Four __attribute__((vector_size(16)));
  typedef int32_t Index __attribute__((vector_size(16)));
  const int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  for (int64_t r = 0; r < whole_rows; r += 4) {
    for (int64_t c = 0; c < whole_columns; c += 4) {
      Four in[4];
      for (int j = 0; j < 4; ++j) std::memcpy(&in[j], src + (r + j) * src_stride + c, sizeof in[j]);
      const Four low01 = __builtin_shuffle(in[0], in[1], Index{0, 4, 1, 5}),
                 low23 = __builtin_shuffle(in[2], in[3], Index{0, 4, 1, 5});
      const Four high01 = __builtin_shuffle(in[0], in[1], Index{2, 6, 3, 7}),
                 high23 = __builtin_shuffle(in[2], in[3], Index{2, 6, 3, 7});
      const Four out[4] = {
          __builtin_shuffle(low01, low23, Index{0, 1, 4, 5}), __builtin_shuffle(low01, low23, Index{2, 3, 6, 7}),
          __builtin_shuffle(high01, high23, Index{0, 1, 4, 5}), __builtin_shuffle(high01, high23, Index{2, 3, 6, 7})};
      for (int j = 0; j < 4; ++j) std::memcpy(dst + (c + j) * dst_stride + r, &out[j], sizeof out[j]);
    }
    for (int64_t c = whole_columns; c < columns; ++c)
      for (int64_t j = r; j < r + 4; ++j) dst[c * dst_stride + j] = src[j * src_stride + c];
  }
  for (int64_t r = whole_rows; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) dst[c * dst_stride + r] = src[r * src_stride + c];
}

}  // namespace pyllm::PYLLM_ISA
