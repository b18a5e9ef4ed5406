// The matrix product of prompts and training, by mma.sync: any chip from sm_80 on.
//
// A block makes a tile of 128 (or 64, where there are few rows) by 128 outputs; K goes through shared memory 64 at a time, three stages
// deep. 8 warps share the tile as 2 by 4. In a stage the rows of x stand before those of W, 64 k (128 bytes) each; 16-byte
// piece c of row r stands at c ^ (r % 8), so that the 8 rows of a matrix lie in different banks.
#include "cuda/epilogue.cuh"
#include "cuda/launch.h"
#include "cuda/matmul.h"

namespace pyllm::cuda {
namespace {

constexpr int kThreads = 256, kColumns = 128, kDepth = 64, kStages = 3;
constexpr int64_t kGroup = 8;  // row tiles that are taken before the next column tile, so that both stay in the L2

__device__ __forceinline__ bf16* element(bf16* tile, int row, int piece) {
  return tile + row * kDepth + (piece ^ (row % 8)) * 8;
}

// Rows [first, first + kRows) of m[limit, K], k from k0, zeros past the ends.
template <int kRows>
__device__ __forceinline__ void fetch_tile(bf16* tile, const bf16* m, int64_t stride, int64_t first, int64_t limit,
                                           int64_t k0, int64_t k_limit) {
#pragma unroll
  for (int i = 0; i < kRows * kDepth / 8 / kThreads; ++i) {
    const int index = i * kThreads + threadIdx.x, r = index / (kDepth / 8), c = index % (kDepth / 8);
    const int64_t row = first + r, k = k0 + c * 8;
    const bool valid = row < limit && k < k_limit;
    copy16_async(element(tile, r, c), valid ? m + row * stride + k : m, valid);
  }
}

template <int kRows>
__global__ void __launch_bounds__(kThreads, 1) mma_matmul_kernel(const __grid_constant__ MatmulArgs a) {
  constexpr int kStage = (kRows + kColumns) * kDepth;
  constexpr int kRowTiles = kRows / 2 / 16;  // of a warp; columns: 4 of 8
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp_row = warp / 4 * (kRows / 2), warp_column = warp % 4 * 32;
  bf16* stages = reinterpret_cast<bf16*>(shared_memory());

  // Tiles in groups of kGroup rows of tiles, within a group down the rows first.
  const int64_t row_tiles = (a.rows + kRows - 1) / kRows, column_tiles = (a.n + kColumns - 1) / kColumns;
  const int64_t group = blockIdx.x / (kGroup * column_tiles), place = blockIdx.x % (kGroup * column_tiles);
  const int64_t height = row_tiles - group * kGroup < kGroup ? row_tiles - group * kGroup : kGroup;
  const int64_t row0 = (group * kGroup + place % height) * kRows, column0 = place / height * kColumns;

  const auto fetch = [&](int64_t step) {
    if (step * kDepth < a.k) {
      bf16* stage = stages + step % kStages * kStage;
      fetch_tile<kRows>(stage, static_cast<const bf16*>(a.x), a.x_stride, row0, a.rows, step * kDepth, a.k);
      fetch_tile<kColumns>(stage + kRows * kDepth, static_cast<const bf16*>(a.w), a.k, column0, a.n, step * kDepth,
                           a.k);
    }
    commit_copies();
  };

  wait_for_earlier_kernels();
  let_later_kernels_start();
  for (int i = 0; i < kStages - 1; ++i) fetch(i);
  float sums[kRowTiles][4][4] = {};
  for (int64_t step = 0; step * kDepth < a.k; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();
    fetch(step + kStages - 1);  // into the stage that was read last
    bf16* xs = stages + step % kStages * kStage;
    bf16* ws = xs + kRows * kDepth;
#pragma unroll
    for (int k16 = 0; k16 < kDepth / 16; ++k16) {
      uint32_t x[kRowTiles][4], w[2][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)  // matrices: rows 0-7, rows 8-15, then the same for the next 8 k
        load_matrices(x[i], element(xs, warp_row + i * 16 + lane % 16, k16 * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < 2; ++j)  // matrices: k 0-7, k 8-15 of 8 columns, then of the next 8
        load_matrices(w[j], element(ws, warp_column + j * 16 + lane / 16 * 8 + lane % 8, k16 * 2 + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_bf16(sums[i][j], x[i], w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]);
    }
  }

#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t row = row0 + warp_row + i * 16 + g, column = column0 + warp_column + j * 8 + 2 * t;
      finish_pair(a, row, column, sums[i][j][0], sums[i][j][1]);
      finish_pair(a, row + 8, column, sums[i][j][2], sums[i][j][3]);
    }
}

template <int kRows>
cudaError_t launch_rows(const MatmulArgs& a, cudaStream_t stream) {
  const int64_t blocks = (a.rows + kRows - 1) / kRows * ((a.n + kColumns - 1) / kColumns);
  return launch(mma_matmul_kernel<kRows>, a, dim3(unsigned(blocks)), kThreads,
                int64_t(kStages) * (kRows + kColumns) * kDepth * 2, stream);
}

}  // namespace

cudaError_t mma_matmul(const MatmulArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.n == 0) return cudaSuccess;
  if (args.norm_weight || args.k % 8 || args.x_stride % 8) return cudaErrorInvalidValue;
  return args.rows <= 64 ? launch_rows<64>(args, stream) : launch_rows<128>(args, stream);
}

}  // namespace pyllm::cuda
