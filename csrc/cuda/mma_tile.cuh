// What the matrix products of mma.sync share: a block of 8 warps makes a tile of kRows by 128 outputs, the warps as 2 by 4, from stages of
// 64 k in shared memory.
//
// In a stage the rows of x stand before those of W, 64 k (128 bytes) each; 16-byte piece c of row r stands at c ^ (r % 8), so
// that the 8 rows of a matrix lie in different banks.
#pragma once
#include "cuda/epilogue.cuh"
#include "cuda/matmul.h"

namespace pyllm::cuda {

constexpr int kMmaThreads = 256, kMmaColumns = 128, kMmaDepth = 64;
template <int kRows>
constexpr int kMmaStage = (kRows + kMmaColumns) * kMmaDepth;  // elements
template <int kRows>
constexpr int kMmaRowTiles = kRows / 2 / 16;  // of a warp, by 4 of 8 columns

__device__ __forceinline__ bf16* mma_element(bf16* tile, int row, int piece) {
  return tile + row * kMmaDepth + (piece ^ (row % 8)) * 8;
}

// Copies rows [first, first + kRows) of m[limit, K], 64 k from k0 on, zeros past the ends.
template <int kRows>
__device__ __forceinline__ void fetch_tile(bf16* tile, const bf16* m, int64_t stride, int64_t first, int64_t limit,
                                           int64_t k0, int64_t k_limit) {
#pragma unroll
  for (int i = 0; i < kRows * kMmaDepth / 8 / kMmaThreads; ++i) {
    const int index = i * kMmaThreads + threadIdx.x, r = index / (kMmaDepth / 8), c = index % (kMmaDepth / 8);
    const int64_t row = first + r, k = k0 + c * 8;
    const bool valid = row < limit && k < k_limit;
    copy16_async(mma_element(tile, r, c), valid ? m + row * stride + k : m, valid);
  }
}

template <int kRows>
using MmaSums = float[kMmaRowTiles<kRows>][4][4];

// Adds what a stage holds to a warp's sums.
template <int kRows>
__device__ __forceinline__ void multiply_stage(MmaSums<kRows>& sums, bf16* stage) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp / 4 * (kRows / 2), warp_column = warp % 4 * 32;
  bf16* ws = stage + kRows * kMmaDepth;
#pragma unroll
  for (int k16 = 0; k16 < kMmaDepth / 16; ++k16) {
    uint32_t x[kMmaRowTiles<kRows>][4], w[2][4];
#pragma unroll
    for (int i = 0; i < kMmaRowTiles<kRows>; ++i)  // matrices: rows 0-7, rows 8-15, then the same for the next 8 k
      load_matrices(x[i], mma_element(stage, warp_row + i * 16 + lane % 16, k16 * 2 + lane / 16));
#pragma unroll
    for (int j = 0; j < 2; ++j)  // matrices: k 0-7, k 8-15 of 8 columns, then of the next 8
      load_matrices(w[j], mma_element(ws, warp_column + j * 16 + lane / 16 * 8 + lane % 8, k16 * 2 + lane / 8 % 2));
#pragma unroll
    for (int i = 0; i < kMmaRowTiles<kRows>; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) mma_bf16(sums[i][j], x[i], w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]);
  }
}

// Stores a warp's sums, of a tile whose first output is (row0, column0), by way of shared memory, which no warp reads any more when all have
// come here. Registers are named when a kernel is compiled, so each 16 rows have code of their own that leaves them there; the rest stands once.
template <int kRows>
__device__ __forceinline__ void finish_tile(const MatmulArgs& a, MmaSums<kRows>& sums, int64_t row0, int64_t column0) {
  const int warp = threadIdx.x / 32;
  const int64_t column = column0 + warp % 4 * kQuadColumns;
  const bool pieces = lies_in_pieces(a) && column + kQuadColumns <= a.n;
  float* mine = reinterpret_cast<float*>(shared_memory()) + warp * 16 * kQuadPitch;
  __syncthreads();
#pragma unroll 1
  for (int part = 0; part < kMmaRowTiles<kRows>; ++part) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kMmaRowTiles<kRows>; ++i)
      if (i == part)
#pragma unroll
        for (int j = 0; j < 4; ++j) leave_sums<kQuadPitch>(sums[i][j], mine + j * 8);
    __syncwarp();
    Quads v;
    take_quads(v, mine);
    const int64_t row = row0 + warp / 4 * (kRows / 2) + part * 16 + quad_row();
    if (pieces) {
      finish_quads(a, row, column + quad_column(), v);
    } else {
      finish_any_quads(a, row, column + quad_column(), v);
    }
  }
}

}  // namespace pyllm::cuda
