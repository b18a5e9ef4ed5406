// The matrix product of prompts and training, by mma.sync: any chip from sm_80 on.
//
// A block makes a tile of 128 (or 64, where there are few rows) by 128 outputs; K goes through shared memory 64 at a time, three stages
// deep.
#include "cuda/launch.h"
#include "cuda/mma_tile.cuh"

namespace pyllm::cuda {
namespace {

constexpr int kStages = 3;
constexpr int64_t kGroup = 8;  // row tiles that are taken before the next column tile, so that both stay in the L2

template <int kRows>
__global__ void __launch_bounds__(kMmaThreads, 1) mma_matmul_kernel(const __grid_constant__ MatmulArgs a) {
  bf16* stages = reinterpret_cast<bf16*>(shared_memory());

  // Tiles in groups of kGroup rows of tiles, within a group down the rows first.
  const int64_t row_tiles = (a.rows + kRows - 1) / kRows, column_tiles = (a.n + kMmaColumns - 1) / kMmaColumns;
  const int64_t group = blockIdx.x / (kGroup * column_tiles), place = blockIdx.x % (kGroup * column_tiles);
  const int64_t height = row_tiles - group * kGroup < kGroup ? row_tiles - group * kGroup : kGroup;
  const int64_t row0 = (group * kGroup + place % height) * kRows, column0 = place / height * kMmaColumns;

  const auto fetch = [&](int64_t step) {
    if (step * kMmaDepth < a.k) {
      bf16* stage = stages + step % kStages * kMmaStage<kRows>;
      const int64_t k = step * kMmaDepth;
      fetch_tile<kRows>(stage, static_cast<const bf16*>(a.x), a.x_stride, row0, a.rows, k, a.k);
      fetch_tile<kMmaColumns>(stage + kRows * kMmaDepth, static_cast<const bf16*>(a.w), a.k, column0, a.n, k, a.k);
    }
    commit_copies();
  };

  wait_for_earlier_kernels();
  let_later_kernels_start();
  for (int i = 0; i < kStages - 1; ++i) fetch(i);
  MmaSums<kRows> sums = {};
  for (int64_t step = 0; step * kMmaDepth < a.k; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();
    fetch(step + kStages - 1);  // into the stage that was read last
    multiply_stage<kRows>(sums, stages + step % kStages * kMmaStage<kRows>);
  }
  finish_tile<kRows>(a, sums, row0, column0);
}

template <int kRows>
cudaError_t launch_rows(const MatmulArgs& a, cudaStream_t stream) {
  const int64_t blocks = (a.rows + kRows - 1) / kRows * ((a.n + kMmaColumns - 1) / kMmaColumns);
  return launch(mma_matmul_kernel<kRows>, a, dim3(unsigned(blocks)), kMmaThreads,
                int64_t(kStages) * kMmaStage<kRows> * 2, stream);
}

}  // namespace

cudaError_t mma_matmul(const MatmulArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.n == 0) return cudaSuccess;
  if (args.norm_weight || args.k % 8 || args.x_stride % 8) return cudaErrorInvalidValue;
  return args.rows <= 64 ? launch_rows<64>(args, stream) : launch_rows<128>(args, stream);
}

}  // namespace pyllm::cuda
