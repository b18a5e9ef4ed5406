// The matrix product of prompts and training on Hopper: wgmma, fed by TMA.
//
// Of a block's three warpgroups the first brings tiles of 64 k into a ring of stages, and the two others multiply 64 rows of x each by all
// columns of the tile. A stage is full when its bytes have landed, and empty again when the warpgroups of all blocks that it is sent to
// have read it. Blocks stay for many tiles, so that the next one's first stages are on their way while the last one is stored.
//
// Blocks form clusters in one of two ways. Of a pair each takes its own rows of x and brings half of W's tile, which it sends to both. Or,
// where there are few tiles, a tile's K is cut into splits, one for each block of a cluster: all leave their sums in their shared
// memory, and each adds those of its part of the rows, in the order of the splits.
//
// In shared memory, from a multiple of 1,024 bytes on: stages [stages][128 rows of x, then the rows of W][64], 16-byte piece c of row r
// at c ^ (r % 8) | barriers full [stages], empty [stages] | of each multiplying warp 16 rows by 32 columns [16][pitch], which turn its
// fragments into whole rows before they are stored. A split's sums [128][columns + 8] take the place of the stages.
#include <algorithm>
#include <cstdint>

#include "cuda/epilogue.cuh"
#include "cuda/hopper.cuh"
#include "cuda/launch.h"
#include "cuda/matmul.h"
#include "cuda/tensor_map.h"

namespace pyllm::cuda {
namespace {

constexpr int kGroupThreads = 128, kMultiplying = 2, kThreads = (1 + kMultiplying) * kGroupThreads;
constexpr int kRows = kMultiplying * 64, kDepth = 64;
constexpr int kUnits = 8;  // row units that are taken before the next column tile, so that both stay in the L2
template <int kColumns>
constexpr int kStages = kColumns == 256   ? 4
                        : kColumns == 192 ? 5
                                          : 6;
template <int kColumns>
constexpr int kStage = (kRows + kColumns) * kDepth;  // elements
template <int kColumns>
constexpr int kSharedBytes = 1024 + kStages<kColumns> * (kStage<kColumns> * 2 + 2 * int(sizeof(Barrier))) +
                             kMultiplying * 4 * 16 * kQuadPitch * 4;

struct Wgmma {
  CUtensorMap x, w;  // boxes of [128, 64] and [columns / blocks of a pair, 64]
  MatmulArgs a;
  int row_units, column_tiles, splits;
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

// kPair: blocks that share W, 1 or 2. With 1 there may be splits.
template <int kColumns, int kPair>
struct Block {
  const Wgmma& s;
  bf16* stages;
  Barrier *full, *empty;
  float* stored;
  int rank;          // in the cluster
  int first, steps;  // of 64 k

  __device__ __forceinline__ bool is_split() const { return kPair == 1 && s.splits > 1; }

  // Calls fn(first row, first column) for each of this block's tiles.
  template <class Fn>
  __device__ __forceinline__ void for_tiles(Fn fn) const {
    const int size = kPair == 1 ? s.splits : kPair;
    const int tiles = s.row_units * s.column_tiles, clusters = int(gridDim.x) / size;
    for (int i = int(blockIdx.x) / size; i < tiles; i += clusters) {
      const Tile tile = tile_of(i, s.row_units, s.column_tiles);
      fn((kPair == 1 ? tile.unit : tile.unit * kPair + rank) * kRows, tile.column * kColumns);
    }
  }

  // One thread brings everything.
  __device__ __forceinline__ void bring() const {
    constexpr int kShare = kColumns / kPair;
    Turn turn;
    for_tiles([&](int row, int column) {
      for (int step = first; step < first + steps; ++step) {
        Barrier* landed = full + turn.stage;
        bf16* x = stages + turn.stage * kStage<kColumns>;
        bf16* w = x + kRows * kDepth;
        wait_for_phase(empty + turn.stage, turn.parity ^ 1);
        arrive_expecting(landed, kStage<kColumns> * 2);
        load_box(x, &s.x, step * kDepth, row, landed);
        if (kPair == 1) {
          load_box(w, &s.w, step * kDepth, column, landed);
        } else {
          load_box(w + rank * kShare * kDepth, &s.w, step * kDepth, column + rank * kShare, landed, (1 << kPair) - 1);
        }
        turn.advance(kStages<kColumns>);
      }
    });
  }

  // A stage has been read by this warpgroup: said to all blocks that send into it.
  __device__ __forceinline__ void release(int stage) const {
    const int member = threadIdx.x % kGroupThreads;
    if (member < kPair) arrive_at(empty + stage, kPair == 1 ? rank : member);
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
      finish(sums, row, column);
    });
  }

  __device__ __forceinline__ static int warp() { return (int(threadIdx.x) - kGroupThreads) / 32; }

  // Sums of a tile, or those of this block's part of its rows that all splits have made, 16 rows by 32 columns after the other. Registers are
  // named when a kernel is compiled, so each 32 columns have code of their own that leaves them in shared memory; the rest stands here once.
  __device__ __forceinline__ void finish(const float (&sums)[kColumns / 8][4], int row0, int column0) const {
    constexpr int kParts = kColumns / kQuadColumns, kWarps = kMultiplying * 4;
    float* mine = stored + warp() * 16 * kQuadPitch;
    if (is_split()) exchange(sums);
    const bool pieces = lies_in_pieces(s.a) && column0 + kColumns <= s.a.n;
    const int rows = is_split() ? kRows / s.splits : 16, begin = is_split() ? warp() : 0;
#pragma unroll 1
    for (int part = begin; part < rows / 16 * kParts; part += is_split() ? kWarps : 1) {
      const int row = (is_split() ? rank * rows + part / kParts * 16 : warp() * 16) + quad_row();
      const int column = part % kParts * kQuadColumns;
      Quads v = {};
      if (is_split()) {
        const float* from = reinterpret_cast<float*>(stages) + row * kWide + column + quad_column();
#pragma unroll 1
        for (int split = 0; split < s.splits; split += 2) {  // both on their way before any is added
          float4 made[2][4];
#pragma unroll
          for (int i = 0; i < 8; ++i) made[i / 4][i % 4] = load_from(from + i % 4 * 4 * kWide, split + i / 4);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const float4 &sum = v[i % 4], &other = made[i / 4][i % 4];
            v[i % 4] = float4{sum.x + other.x, sum.y + other.y, sum.z + other.z, sum.w + other.w};
          }
        }
      } else {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kParts; ++i)
          if (i == part)
#pragma unroll
            for (int j = 0; j < kQuadColumns / 8; ++j)
              leave_sums<kQuadPitch>(sums[i * kQuadColumns / 8 + j], mine + j * 8);
        __syncwarp();
        take_quads(v, mine);
      }
      if (pieces) {
        finish_quads(s.a, row0 + row, column0 + column + quad_column(), v);
      } else {
        finish_any_quads(s.a, row0 + row, column0 + column + quad_column(), v);
      }
    }
  }

  // All blocks of a cluster have left their sums in the place of their stages.
  static constexpr int kWide = kColumns + 8;
  __device__ __forceinline__ void exchange(const float (&sums)[kColumns / 8][4]) const {
    static_assert(kRows * kWide * 4 <= kStages<kColumns> * kStage<kColumns> * 2);
    meet_threads(1, kMultiplying * kGroupThreads);  // both warpgroups have read all stages
    float* mine = reinterpret_cast<float*>(stages) + warp() * 16 * kWide;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) leave_sums<kWide>(sums[j], mine + j * 8);
    cluster_barrier();
  }
};

template <int kColumns, int kPair>
__global__ void __launch_bounds__(kThreads, 1) wgmma_matmul_kernel(const __grid_constant__ Wgmma s) {
  unsigned char* base = shared_memory() + (1024 - shared_address(shared_memory()) % 1024) % 1024;
  bf16* stages = reinterpret_cast<bf16*>(base);
  Barrier* full = reinterpret_cast<Barrier*>(stages + kStages<kColumns> * kStage<kColumns>);
  Barrier* empty = full + kStages<kColumns>;
  const bool clustered = kPair > 1 || s.splits > 1;
  const int rank = clustered ? rank_in_cluster() : 0, steps = int((s.a.k + kDepth - 1) / kDepth);
  const int part = kPair == 1 ? rank : 0, rest = steps % s.splits;  // the first `rest` splits take a step more
  const Block<kColumns, kPair> block{s,
                                     stages,
                                     full,
                                     empty,
                                     reinterpret_cast<float*>(empty + kStages<kColumns>),
                                     rank,
                                     part * (steps / s.splits) + (part < rest ? part : rest),
                                     steps / s.splits + (part < rest)};
  if (threadIdx.x == 0) {
    prefetch_map(&s.x);
    prefetch_map(&s.w);
    for (int i = 0; i < kStages<kColumns>; ++i) {
      make_barrier(full + i, 1);
      make_barrier(empty + i, kMultiplying * kPair);
    }
    publish_barriers();
  }
  if (clustered) {
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
    if (block.is_split()) cluster_barrier();
  } else {
    take_registers<232>();
    block.multiply();
  }
  // Until all have ended, blocks of the cluster send to each other's memory, and read it.
  if (clustered) cluster_barrier();
}

template <int kColumns, int kPair>
cudaError_t launch_tiles(const MatmulArgs& a, const WgmmaPlan& plan, cudaStream_t stream) {
  Wgmma s{};
  s.a = a;
  s.row_units = int(plan.row_units);
  s.column_tiles = int(plan.column_tiles);
  s.splits = int(plan.splits);
  // One row may have any stride, which no box needs.
  cudaError_t error = make_tensor_map(&s.x, a.x, a.rows, a.k, a.rows > 1 ? a.x_stride : a.k, kRows);
  if (error == cudaSuccess) error = make_tensor_map(&s.w, a.w, a.n, a.k, a.k, kColumns / kPair);
  if (error != cudaSuccess) return error;
  return launch(wgmma_matmul_kernel<kColumns, kPair>, s, dim3(unsigned(plan.blocks)), kThreads, plan.shared_bytes,
                stream, true, int(plan.pair * plan.splits));
}

template <int kPair>
cudaError_t launch_plan(const MatmulArgs& a, const WgmmaPlan& plan, cudaStream_t stream) {
  switch (plan.columns) {
    case 128:
      return launch_tiles<128, kPair>(a, plan, stream);
    case 192:
      return launch_tiles<192, kPair>(a, plan, stream);
    default:
      return launch_tiles<256, kPair>(a, plan, stream);
  }
}

// K is cut for this many multiprocessors, those of H100 and H200, on all chips: sums are the same bits. More tiles of rows than kMostCut fill
// a chip without, or nearly.
constexpr int64_t kPlanned = 132, kMostCut = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A plan, and about how many cycles it takes. Tensor cores need 4 cycles for a column of 64 k by 128 rows; the L2 was taken to give 40 bytes a
// cycle and multiprocessor, and 64 to each at most. What a tile takes besides is a guess: all three are to be measured.
struct Estimate {
  WgmmaPlan plan;
  int64_t cycles;
};
Estimate estimate(int64_t rows, int64_t n, int64_t k, int64_t columns, int64_t pair, int64_t splits,
                  int64_t multiprocessors) {
  WgmmaPlan p{};
  p.columns = columns;
  p.pair = pair;
  p.splits = splits;
  p.row_units = ceil_div(rows, kRows * pair);
  p.column_tiles = ceil_div(n, columns);
  p.shared_bytes = columns == 256 ? kSharedBytes<256> : columns == 192 ? kSharedBytes<192> : kSharedBytes<128>;
  const int64_t tiles = p.row_units * p.column_tiles, size = pair * splits;
  // A cluster lies within one of a chip's groups of 16 or 18 multiprocessors, of which those of 4 and 8 blocks use 16.
  const int64_t room = std::max<int64_t>((size > 2 ? multiprocessors / 16 * 16 : multiprocessors) / size, 1);
  const int64_t active = std::min(tiles, room);
  p.blocks = (splits > 1 ? tiles : active) * size;  // one with splits makes one tile
  const int64_t bytes = (kRows + columns / pair) * kDepth * 2;
  const int64_t step = std::max({4 * columns, bytes / 64, bytes * active * size / (40 * multiprocessors)});
  const int64_t besides = splits > 1 ? 4000 : 1500 + 6 * columns;
  return {p, ceil_div(tiles, room) * (ceil_div(ceil_div(k, kDepth), splits) * step + besides)};
}

// The fastest plan with so many splits. Smaller tiles, which read more, and pairs of which a block may have no rows, or blocks alone where
// all have some, are for what they save a part in 80 of.
Estimate fastest(int64_t rows, int64_t n, int64_t k, int64_t splits, int64_t multiprocessors) {
  Estimate best{{}, INT64_MAX};
  const int64_t likely = ceil_div(rows, kRows) % 2 == 0 ? 2 : 1;
  for (const int64_t columns : {256, 192, 128})
    for (const int64_t pair : {likely, 3 - likely}) {
      if (pair == 2 && (splits > 1 || multiprocessors < 2)) continue;
      const Estimate e = estimate(rows, n, k, columns, pair, splits, multiprocessors);
      if (e.cycles < best.cycles - best.cycles / 80) best = e;
    }
  return best;
}

}  // namespace

WgmmaPlan wgmma_plan(int64_t rows, int64_t n, int64_t k, int64_t multiprocessors) {
  int64_t splits = 1;
  const int64_t most = ceil_div(rows, kRows) > kMostCut ? 1 : std::min<int64_t>(ceil_div(k, kDepth), 8);
  for (int64_t more = 2; more <= most; more *= 2)
    if (fastest(rows, n, k, more, kPlanned).cycles < fastest(rows, n, k, splits, kPlanned).cycles) splits = more;
  return fastest(rows, n, k, splits, multiprocessors).plan;
}

namespace {

cudaError_t need_wgmma() {
  bool yes = false;
  const cudaError_t error = has_wgmma(&yes);
  return error == cudaSuccess && !yes ? cudaErrorNotSupported : error;
}

}  // namespace

cudaError_t wgmma_clusters(int64_t size, int64_t* most) {
  const auto kernel = wgmma_matmul_kernel<256, 1>;
  bool programmatic = false;
  cudaError_t error = need_wgmma();
  if (error == cudaSuccess)
    error = prepare_launch(reinterpret_cast<const void*>(kernel), kSharedBytes<256>, &programmatic);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(size);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(size));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes<256>;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  *most = clusters;
  return error;
}

cudaError_t wgmma_matmul(const MatmulArgs& args, int64_t multiprocessors, cudaStream_t stream) {
  if (args.rows == 0 || args.n == 0) return cudaSuccess;
  const cudaError_t error = need_wgmma();
  if (error != cudaSuccess) return error;
  if (args.norm_weight || args.k <= 0 || args.k % 8 || (args.rows > 1 && args.x_stride % 8) || multiprocessors < 1)
    return cudaErrorInvalidValue;
  const WgmmaPlan plan = wgmma_plan(args.rows, args.n, args.k, multiprocessors);
  return plan.pair == 2 ? launch_plan<2>(args, plan, stream) : launch_plan<1>(args, plan, stream);
}

}  // namespace pyllm::cuda
