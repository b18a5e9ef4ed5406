// The matrix product of decoding for 17 to 64 rows: weights streamed once at the memory's speed.
//
// A block takes a tile of 32 or 64 rows by 128 outputs over one split of K, four stages of 64 k deep; the weights of the first three are
// under way before the wait for earlier kernels. The splits of a tile are added pairwise, as a tree of neighbours: of two the
// block that ends last adds the other's sums to its own and goes on, so the order is fixed and the adding is shared out.
#include "cuda/launch.h"
#include "cuda/mma_tile.cuh"

namespace pyllm::cuda {
namespace {

constexpr int kStages = 4;
constexpr int64_t kLeastSteps = 4;  // of a split

struct Split {
  SplitMatmulArgs args;
  int splits, steps;
};

// Adds to `sums` those of the blocks that have ended before this one; true in the block that has the whole of the tile.
template <int kRows>
__device__ __forceinline__ bool add_splits(MmaSums<kRows>& sums, const Split& s) {
  constexpr int kSums = kMmaRowTiles<kRows> * 16;
  const int split = blockIdx.y;
  float* partial = s.args.partial + int64_t(blockIdx.x) * s.splits * kRows * kMmaColumns + threadIdx.x;
  uint32_t* tickets = s.args.tickets + int64_t(blockIdx.x) * s.splits;
  uint32_t* earlier = reinterpret_cast<uint32_t*>(shared_memory());
  for (int level = 0; 1 << level < s.splits; ++level) {
    // The sums of splits [group << level, (group + 1) << level) are whole here, and lie at the place of the first.
    const int group = split >> level, other = group ^ 1;
    if (other << level >= s.splits) continue;
    float* mine = partial + int64_t(group << level) * kRows * kMmaColumns;
    const float* others = partial + int64_t(other << level) * kRows * kMmaColumns;
#pragma unroll
    for (int i = 0; i < kSums; ++i) mine[i * kMmaThreads] = sums[i / 16][i / 4 % 4][i % 4];
    // Who comes second sees what the first wrote: its fence comes before its ticket.
    __threadfence();
    __syncthreads();
    uint32_t* ticket = tickets + ((group | 1) << level);
    if (threadIdx.x == 0) *earlier = atomicAdd(ticket, 1u);
    __syncthreads();
    if (*earlier == 0) return false;
    __threadfence();
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i / 16][i / 4 % 4][i % 4] += __ldcg(others + i * kMmaThreads);
    if (threadIdx.x == 0) *ticket = 0;
  }
  return true;
}

template <int kRows>
__global__ void __launch_bounds__(kMmaThreads, 2) split_matmul_kernel(const __grid_constant__ Split s) {
  const MatmulArgs& a = s.args.matmul;
  bf16* stages = reinterpret_cast<bf16*>(shared_memory());
  const int64_t column0 = int64_t(blockIdx.x) * kMmaColumns, k0 = int64_t(blockIdx.y) * s.steps * kMmaDepth;
  const int64_t left = (a.k - k0 + kMmaDepth - 1) / kMmaDepth;
  const int steps = left < s.steps ? int(left) : s.steps;

  const auto fetch_weights = [&](int step) {
    if (step < steps)
      fetch_tile<kMmaColumns>(stages + step % kStages * kMmaStage<kRows> + kRows * kMmaDepth,
                              static_cast<const bf16*>(a.w), a.k, column0, a.n, k0 + step * kMmaDepth, a.k);
  };
  const auto fetch_x = [&](int step) {
    if (step < steps)
      fetch_tile<kRows>(stages + step % kStages * kMmaStage<kRows>, static_cast<const bf16*>(a.x), a.x_stride, 0,
                        a.rows, k0 + step * kMmaDepth, a.k);
  };
  for (int i = 0; i < kStages - 1; ++i) fetch_weights(i);
  wait_for_earlier_kernels();
  let_later_kernels_start();
  for (int i = 0; i < kStages - 1; ++i) {
    fetch_x(i);
    commit_copies();
  }
  MmaSums<kRows> sums = {};
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();
    fetch_weights(step + kStages - 1);  // into the stage that was read last
    fetch_x(step + kStages - 1);
    commit_copies();
    multiply_stage<kRows>(sums, stages + step % kStages * kMmaStage<kRows>);
  }
  if (add_splits<kRows>(sums, s)) finish_tile<kRows>(a, sums, 0, column0);
}

template <int kRows>
cudaError_t launch_split(const SplitMatmulArgs& args, cudaStream_t stream) {
  const SplitPlan plan = split_plan(args.matmul.n, args.matmul.k);
  return launch(split_matmul_kernel<kRows>, Split{args, int(plan.splits), int(plan.steps)},
                dim3(unsigned(plan.tiles), unsigned(plan.splits)), kMmaThreads, int64_t(kStages) * kMmaStage<kRows> * 2,
                stream);
}

}  // namespace

SplitPlan split_plan(int64_t n, int64_t k) {
  SplitPlan p{};
  p.tiles = (n + kMmaColumns - 1) / kMmaColumns;
  const int64_t steps = (k + kMmaDepth - 1) / kMmaDepth, room = p.tiles > 0 ? kSplitMatmulBlocks / p.tiles : 1;
  int64_t splits = steps / kLeastSteps < room ? steps / kLeastSteps : room;
  if (splits < 1) splits = 1;
  p.steps = (steps + splits - 1) / splits;
  p.splits = p.steps > 0 ? (steps + p.steps - 1) / p.steps : 1;
  return p;
}

cudaError_t split_matmul(const SplitMatmulArgs& args, cudaStream_t stream) {
  const MatmulArgs& a = args.matmul;
  if (a.rows == 0 || a.n == 0) return cudaSuccess;
  if (a.rows > kSplitMatmulRows || a.norm_weight || a.k <= 0 || a.k % 8 || a.x_stride % 8) return cudaErrorInvalidValue;
  return a.rows <= 32 ? launch_split<32>(args, stream) : launch_split<64>(args, stream);
}

}  // namespace pyllm::cuda
