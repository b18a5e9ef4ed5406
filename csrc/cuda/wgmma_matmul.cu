// The matrix product of prompts and training on Hopper: wgmma, fed by TMA.
//
// Of a block's three warpgroups the first brings tiles of 64 k into a ring of stages, and the two others multiply 64 rows of x each by all
// columns of the tile. A stage is full when its bytes have landed, and empty again when the warpgroups of all blocks that it is sent to
// have read it. Each block of a cluster brings its own rows of x and its share of W, which it sends to all. Blocks stay for many
// tiles, so that the next one's first stages are on their way while the last one is stored.
//
// In shared memory, from a multiple of 1,024 bytes on: stages [stages][128 rows of x, then the rows of W][64], 16-byte piece c of row r
// at c ^ (r % 8) | barriers full [stages], empty [stages] | of each multiplying warp 16 rows by 32 columns [16][pitch], which turn its
// fragments into whole rows before they are stored.
#include "cuda/epilogue.cuh"
#include "cuda/hopper.cuh"
#include "cuda/launch.h"
#include "cuda/matmul.h"
#include "cuda/tensor_map.h"

namespace pyllm::cuda {
namespace {

constexpr int kGroupThreads = 128, kMultiplying = 2, kThreads = (1 + kMultiplying) * kGroupThreads;
constexpr int kRows = kMultiplying * 64, kDepth = 64;
constexpr int kStoredColumns = 32, kPitch = kStoredColumns + 8;  // two rows of four lie in different banks
constexpr int kUnits = 8;  // row units that are taken before the next column tile, so that both stay in the L2
template <int kColumns>
constexpr int kStages = kColumns == 256 ? 4 : 6;
template <int kColumns>
constexpr int kStage = (kRows + kColumns) * kDepth;  // elements
template <int kColumns>
constexpr int kSharedBytes =
    1024 + kStages<kColumns> * (kStage<kColumns> * 2 + 2 * int(sizeof(Barrier))) + kMultiplying * 4 * 16 * kPitch * 4;

struct Wgmma {
  CUtensorMap x, w;  // boxes of [128, 64] and [columns / cluster, 64]
  MatmulArgs a;
  int row_units, column_tiles;
};

// The place of a stage in the ring, and how often it has come round.
struct Turn {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void advance(int stages) {
    if (++stage < stages) return;
    stage = 0;
    parity ^= 1;
  }
};

// The row unit and column tile of the index-th tile: in groups of kUnits units, within a group down the units first.
struct Tile {
  int unit, column;
};
__device__ __forceinline__ Tile tile_of(int index, int row_units, int column_tiles) {
  const int group = index / (kUnits * column_tiles), place = index % (kUnits * column_tiles);
  const int height = row_units - group * kUnits < kUnits ? row_units - group * kUnits : kUnits;
  return {group * kUnits + place % height, place / height};
}

template <int kColumns, int kCluster>
struct Block {
  const Wgmma& s;
  bf16* stages;
  Barrier *full, *empty;
  float* stored;
  int rank, steps;

  // Calls fn(first row, first column) for each of this block's tiles.
  template <class Fn>
  __device__ __forceinline__ void for_tiles(Fn fn) const {
    const int tiles = s.row_units * s.column_tiles, clusters = int(gridDim.x) / kCluster;
    for (int i = int(blockIdx.x) / kCluster; i < tiles; i += clusters) {
      const Tile tile = tile_of(i, s.row_units, s.column_tiles);
      fn((tile.unit * kCluster + rank) * kRows, tile.column * kColumns);
    }
  }

  // One thread brings everything.
  __device__ __forceinline__ void bring() const {
    constexpr int kShare = kColumns / kCluster;
    Turn turn;
    for_tiles([&](int row, int column) {
      for (int step = 0; step < steps; ++step) {
        Barrier* landed = full + turn.stage;
        bf16* x = stages + turn.stage * kStage<kColumns>;
        bf16* w = x + kRows * kDepth;
        wait_for_phase(empty + turn.stage, turn.parity ^ 1);
        arrive_expecting(landed, kStage<kColumns> * 2);
        load_box(x, &s.x, step * kDepth, row, landed);
        if (kCluster == 1) {
          load_box(w, &s.w, step * kDepth, column, landed);
        } else {
          load_box(w + rank * kShare * kDepth, &s.w, step * kDepth, column + rank * kShare, landed,
                   (1 << kCluster) - 1);
        }
        turn.advance(kStages<kColumns>);
      }
    });
  }

  // A stage has been read by this warpgroup: said to all blocks that send into it.
  __device__ __forceinline__ void release(int stage) const {
    if (int(threadIdx.x % kGroupThreads) < kCluster) arrive_at(empty + stage, threadIdx.x % kGroupThreads);
  }

  __device__ __forceinline__ void multiply() const {
    const int group = threadIdx.x / kGroupThreads - 1;
    Turn turn;
    float sums[kColumns / 8][4];
    for_tiles([&](int row, int column) {
      int last = 0;
      for (int step = 0; step < steps; ++step) {
        const bf16* x = stages + turn.stage * kStage<kColumns>;
        wait_for_phase(full + turn.stage, turn.parity);
        const uint64_t a = operand(x + group * 64 * kDepth), b = operand(x + kRows * kDepth);
        wgmma_begin();
#pragma unroll
        for (int k16 = 0; k16 < kDepth / 16; ++k16)
          wgmma<kColumns>(sums, a + k16 * 2, b + k16 * 2, step > 0 || k16 > 0);
        wgmma_commit();
        if (step > 0) {
          wgmma_wait<1>();
          release(last);
        }
        last = turn.stage;
        turn.advance(kStages<kColumns>);
      }
      wgmma_wait<0>();
      wgmma_settle(sums);
      release(last);
      finish(sums, row + group * 64, column);
    });
  }

  __device__ __forceinline__ void finish(const float (&sums)[kColumns / 8][4], int row0, int column0) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, column = lane % (kStoredColumns / 4) * 4;
    float* mine = stored + (int(threadIdx.x) - kGroupThreads) / 32 * 16 * kPitch;
    row0 += threadIdx.x / 32 % 4 * 16;
#pragma unroll
    for (int from = 0; from < kColumns; from += kStoredColumns) {
      __syncwarp();
#pragma unroll
      for (int j = 0; j < kStoredColumns / 8; ++j) {
        const float (&d)[4] = sums[from / 8 + j];
        *reinterpret_cast<float2*>(mine + g * kPitch + j * 8 + 2 * t) = float2{d[0], d[1]};
        *reinterpret_cast<float2*>(mine + (g + 8) * kPitch + j * 8 + 2 * t) = float2{d[2], d[3]};
      }
      __syncwarp();
#pragma unroll 1
      for (int r = lane / (kStoredColumns / 4); r < 16; r += 4)
        finish_quad(s.a, row0 + r, column0 + from + column,
                    *reinterpret_cast<const float4*>(mine + r * kPitch + column));
    }
  }
};

template <int kColumns, int kCluster>
__global__ void __launch_bounds__(kThreads, 1) wgmma_matmul_kernel(const __grid_constant__ Wgmma s) {
  unsigned char* base = shared_memory() + (1024 - shared_address(shared_memory()) % 1024) % 1024;
  bf16* stages = reinterpret_cast<bf16*>(base);
  Barrier* full = reinterpret_cast<Barrier*>(stages + kStages<kColumns> * kStage<kColumns>);
  Barrier* empty = full + kStages<kColumns>;
  const Block<kColumns, kCluster> block{s,
                                        stages,
                                        full,
                                        empty,
                                        reinterpret_cast<float*>(empty + kStages<kColumns>),
                                        kCluster > 1 ? rank_in_cluster() : 0,
                                        int((s.a.k + kDepth - 1) / kDepth)};
  if (threadIdx.x == 0) {
    prefetch_map(&s.x);
    prefetch_map(&s.w);
    for (int i = 0; i < kStages<kColumns>; ++i) {
      make_barrier(full + i, 1);
      make_barrier(empty + i, kMultiplying * kCluster);
    }
    publish_barriers();
  }
  if (kCluster > 1) {
    cluster_barrier();
  } else {
    __syncthreads();
  }
  wait_for_earlier_kernels();
  let_later_kernels_start();
  if (threadIdx.x < kGroupThreads) {
    keep_registers<40>();
    if (threadIdx.x == 0) block.bring();
    __syncwarp();
  } else {
    take_registers<232>();
    block.multiply();
  }
  // Until all have ended, blocks of the cluster send to each other's memory.
  if (kCluster > 1) cluster_barrier();
}

template <int kColumns, int kCluster>
cudaError_t launch_tiles(const MatmulArgs& a, const WgmmaPlan& plan, cudaStream_t stream) {
  Wgmma s{};
  s.a = a;
  s.row_units = int(plan.row_units);
  s.column_tiles = int(plan.column_tiles);
  // One row may have any stride, which no box needs.
  cudaError_t error = make_tensor_map(&s.x, a.x, a.rows, a.k, a.rows > 1 ? a.x_stride : a.k, kRows);
  if (error == cudaSuccess) error = make_tensor_map(&s.w, a.w, a.n, a.k, a.k, kColumns / kCluster);
  if (error != cudaSuccess) return error;
  return launch(wgmma_matmul_kernel<kColumns, kCluster>, s, dim3(unsigned(plan.blocks)), kThreads,
                kSharedBytes<kColumns>, stream, true, kCluster);
}

}  // namespace

WgmmaPlan wgmma_plan(int64_t rows, int64_t n, int64_t multiprocessors) {
  WgmmaPlan p{};
  const int64_t row_tiles = (rows + kRows - 1) / kRows;
  // An odd row tile leaves a block of a pair without work, which many others outweigh.
  p.cluster = multiprocessors >= 2 && (row_tiles % 2 == 0 || row_tiles > 16) ? 2 : 1;
  p.row_units = (row_tiles + p.cluster - 1) / p.cluster;
  const int64_t clusters = multiprocessors / p.cluster;
  // Tiles of 128 columns take half the time of those of 256 and a little more: they are for what would leave many blocks without work.
  const auto rounds = [&](int64_t columns) {
    return (p.row_units * ((n + columns - 1) / columns) + clusters - 1) / clusters;
  };
  p.columns = 11 * rounds(128) < 20 * rounds(256) ? 128 : 256;
  p.column_tiles = (n + p.columns - 1) / p.columns;
  const int64_t tiles = p.row_units * p.column_tiles;
  p.blocks = (tiles < clusters ? tiles : clusters) * p.cluster;
  p.shared_bytes = p.columns == 256 ? kSharedBytes<256> : kSharedBytes<128>;
  return p;
}

cudaError_t wgmma_matmul(const MatmulArgs& args, int64_t multiprocessors, cudaStream_t stream) {
  if (args.rows == 0 || args.n == 0) return cudaSuccess;
  bool yes = false;
  const cudaError_t error = has_wgmma(&yes);
  if (error != cudaSuccess) return error;
  if (!yes) return cudaErrorNotSupported;
  if (args.norm_weight || args.k <= 0 || args.k % 8 || (args.rows > 1 && args.x_stride % 8) || multiprocessors < 1)
    return cudaErrorInvalidValue;
  const WgmmaPlan plan = wgmma_plan(args.rows, args.n, multiprocessors);
  if (plan.columns == 256)
    return plan.cluster == 2 ? launch_tiles<256, 2>(args, plan, stream) : launch_tiles<256, 1>(args, plan, stream);
  return plan.cluster == 2 ? launch_tiles<128, 2>(args, plan, stream) : launch_tiles<128, 1>(args, plan, stream);
}

}  // namespace pyllm::cuda
