// The matrix product of decoding: few rows of x, weights streamed once at the memory's speed.
//
// A tile is 8 outputs (rows of W) over all of K; a block takes tiles blockIdx.x, blockIdx.x + gridDim.x, ... K is cut into chunks of
// 1024, and in each of them a warp owns 128 k: it copies them (8 rows of 256 bytes) into a ring of its own and multiplies
// them, so that warps meet only at the end of a tile, where their eight partial sums are added in rising order. The ring starts to
// fill before the wait for earlier kernels. Weights are the 8 columns of m16n8k16, rows of x its 16 rows.
//
// In shared memory: x as bf16 [T][pitch] | partial sums [8 warps][T][8] | rings [8 warps][stages][8 rows][128]. 16-byte piece c of a
// ring's row r stands at c ^ r, so that the 8 rows of a matrix lie in different banks.
#include "cuda/epilogue.cuh"
#include "cuda/launch.h"
#include "cuda/matmul.h"
#include "cuda/warp.cuh"

namespace pyllm::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kTile = 8;                        // outputs
constexpr int kSlice = 128;                     // k of a warp in a chunk
constexpr int kChunk = kWarps * kSlice;         // k
constexpr int kStages = 5;                      // 4 copies under way of 16 KB each, per block
constexpr int kStageElements = kTile * kSlice;  // of one warp
constexpr int kMaxRows = 16;
constexpr int64_t kRingBytes = int64_t(kWarps) * kStages * kStageElements * 2;
constexpr int64_t kMaxShared = 227 * 1024;

struct Skinny {
  MatmulArgs a;
  SkinnyPlan plan;
};

// Copies this warp's slice of work item i (its tile and chunk) into the ring, zeros where W ends; one group of copies, also past the
// last item.
__device__ __forceinline__ void fetch(const Skinny& s, bf16* ring, int64_t i, int64_t items) {
  if (i < items) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t tile = blockIdx.x + i / s.plan.chunks * gridDim.x;
    const int64_t k0 = i % s.plan.chunks * kChunk + warp * kSlice;
    const bf16* w = static_cast<const bf16*>(s.a.w);
    bf16* stage = ring + i % kStages * kStageElements;
#pragma unroll
    for (int step = 0; step < kStageElements / 8 / 32; ++step) {
      const int piece = step * 32 + lane, r = piece / (kSlice / 8), c = piece % (kSlice / 8);
      const int64_t n = tile * kTile + r, k = k0 + c * 8;
      const bool valid = n < s.a.n && k < s.a.k;
      copy16_async(stage + r * kSlice + (c ^ r) * 8, valid ? w + n * s.a.k + k : w, valid);
    }
  }
  commit_copies();
}

// x, normalised where asked, as bf16 in shared memory, zeros up to a whole chunk. A warp takes whole rows, so that a row's sums
// have one order.
template <class T>
__device__ void load_x(const Skinny& s, bf16* xs) {
  const MatmulArgs& a = s.a;
  const int lane = threadIdx.x % 32;
  for (int64_t row = threadIdx.x / 32; row < a.rows; row += kWarps) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    float mean = 0.0f, scale = 1.0f;
    if (a.norm_weight) {
      float sum = 0.0f;
      if (a.norm == NormKind::layer) {
        for (int64_t k = lane; k < a.k; k += 32) sum += to_float(x[k]);
        mean = warp_sum(sum) / float(a.k);
      }
      sum = 0.0f;
      for (int64_t k = lane; k < a.k; k += 32) {
        const float d = to_float(x[k]) - mean;
        sum += d * d;
      }
      scale = 1.0f / sqrtf(warp_sum(sum) / float(a.k) + a.eps);
    }
    for (int64_t k = lane * 2; k < s.plan.chunks * kChunk; k += 64) {  // K is even
      float v[2] = {0.0f, 0.0f};
      for (int j = 0; j < 2; ++j) {
        if (k >= a.k) break;
        v[j] = to_float(x[k + j]);
        if (a.norm_weight) v[j] = (v[j] - mean) * scale * a.norm_weight[k + j];
        if (a.norm_weight && a.norm_bias) v[j] += a.norm_bias[k + j];
      }
      *reinterpret_cast<uint32_t*>(xs + row * s.plan.x_pitch + k) = pack_bf16(v[0], v[1]);
    }
  }
}

// Two neighbours of x as an operand; rows past the last are zero.
__device__ __forceinline__ uint32_t x_pair(const Skinny& s, const bf16* xs, int row, int64_t k) {
  return row < s.a.rows ? *reinterpret_cast<const uint32_t*>(xs + row * s.plan.x_pitch + k) : 0u;
}

__global__ void __launch_bounds__(kThreads, 2) skinny_matmul_kernel(const __grid_constant__ Skinny s) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int rows = int(s.a.rows);
  bf16* ring = reinterpret_cast<bf16*>(shared_memory()) + warp * kStages * kStageElements;
  bf16* xs = reinterpret_cast<bf16*>(shared_memory() + kRingBytes);
  float* partial = reinterpret_cast<float*>(xs + rows * s.plan.x_pitch);

  const int64_t tiles = (s.plan.tiles - blockIdx.x + gridDim.x - 1) / gridDim.x, items = tiles * s.plan.chunks;
  for (int i = 0; i < kStages - 1; ++i) fetch(s, ring, i, items);
  wait_for_earlier_kernels();
  let_later_kernels_start();
  if (s.a.x_dtype == DType::f32) {
    load_x<float>(s, xs);
  } else {
    load_x<bf16>(s, xs);
  }
  __syncthreads();

  float sums[4] = {};
  for (int64_t i = 0; i < items; ++i) {
    wait_copies<kStages - 2>();
    __syncwarp();
    fetch(s, ring, i + kStages - 1, items);  // into the stage that was read last
    const bf16* stage = ring + i % kStages * kStageElements;
    const int64_t chunk = i % s.plan.chunks;
#pragma unroll
    for (int step = 0; step < kSlice / 32; ++step) {
      uint32_t w[4];  // 8 outputs by 32 k
      load_matrices(w, stage + lane % 8 * kSlice + ((step * 4 + lane / 8) ^ (lane % 8)) * 8);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t k = chunk * kChunk + warp * kSlice + step * 32 + half * 16 + 2 * t;
        const uint32_t x[4] = {x_pair(s, xs, g, k), x_pair(s, xs, g + 8, k), x_pair(s, xs, g, k + 8),
                               x_pair(s, xs, g + 8, k + 8)};
        mma_bf16(sums, x, w[2 * half], w[2 * half + 1]);
      }
    }
    if (chunk + 1 < s.plan.chunks) continue;

#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = g + j / 2 * 8;
      if (row < rows) partial[(warp * rows + row) * kTile + 2 * t + j % 2] = sums[j];
      sums[j] = 0.0f;
    }
    __syncthreads();
    if (int(threadIdx.x) < rows * kTile / 2) {
      const int row = threadIdx.x / (kTile / 2), column = threadIdx.x % (kTile / 2) * 2;
      float v0 = 0.0f, v1 = 0.0f;
      for (int from = 0; from < kWarps; ++from) {
        v0 += partial[(from * rows + row) * kTile + column];
        v1 += partial[(from * rows + row) * kTile + column + 1];
      }
      const int64_t tile = blockIdx.x + i / s.plan.chunks * gridDim.x;
      finish_pair(s.a, row, tile * kTile + column, v0, v1);
    }
    __syncthreads();
  }
}

}  // namespace

SkinnyPlan skinny_plan(int64_t rows, int64_t n, int64_t k, int64_t multiprocessors) {
  SkinnyPlan p{};
  p.tiles = (n + kTile - 1) / kTile;
  p.blocks = p.tiles < multiprocessors ? p.tiles : multiprocessors;
  p.chunks = (k + kChunk - 1) / kChunk;
  p.x_pitch = p.chunks * kChunk + 8;  // rows lie four banks apart
  p.shared_bytes = kRingBytes + rows * (p.x_pitch * 2 + kWarps * kTile * 4);
  p.fits = rows <= kMaxRows && p.shared_bytes <= kMaxShared;
  return p;
}

cudaError_t skinny_matmul(const MatmulArgs& args, int64_t multiprocessors, bool overlapped, cudaStream_t stream) {
  if (args.rows == 0 || args.n == 0) return cudaSuccess;
  const Skinny s{args, skinny_plan(args.rows, args.n, args.k, multiprocessors)};
  if (!s.plan.fits || args.k % 8 || args.k == 0) return cudaErrorInvalidValue;
  return launch(skinny_matmul_kernel, s, dim3(unsigned(s.plan.blocks)), kThreads, s.plan.shared_bytes, overlapped,
                stream);
}

}  // namespace pyllm::cuda
