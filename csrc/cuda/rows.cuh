// Kernels that take a matrix element by element: block (r, j) takes piece j of row r.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/layers.h"
#include "cuda/store.cuh"

namespace pyllm::cuda {

constexpr int kRowThreads = 256;
constexpr int64_t kRowPiece = 4 * kRowThreads;
static_assert(kMaxRowWidth == 65535 * kRowPiece, "blocks in a grid's second dimension");

inline dim3 row_grid(int64_t rows, int64_t width) {
  return dim3(unsigned(rows), unsigned((width + kRowPiece - 1) / kRowPiece));
}

// Calls fn(i) for the elements [0, width) of row blockIdx.x that are this thread's.
template <class Fn>
__device__ __forceinline__ void for_columns(int64_t width, Fn fn) {
  const int64_t from = int64_t(blockIdx.y) * kRowPiece, end = from + kRowPiece < width ? from + kRowPiece : width;
  for (int64_t i = from + threadIdx.x; i < end; i += kRowThreads) fn(i);
}

}  // namespace pyllm::cuda
