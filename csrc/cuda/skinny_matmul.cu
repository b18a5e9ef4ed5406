// The matrix product of decoding: few rows of x, weights streamed once at the memory's speed.
//
// A tile is 8 outputs (rows of W) over all of K; a block takes tiles blockIdx.x, blockIdx.x + gridDim.x, ..., four of them together.
// K is cut into chunks of 1024, and in each of them a warp owns 128 k: it copies them (8 rows of 256 bytes of each tile) into a ring of
// its own and multiplies them, so that warps meet only at a tile's end, where their eight partial sums are added in rising
// order. The ring starts to fill before the wait for earlier kernels. Weights are the 8 columns of m16n8k16, rows of x its 16 rows.
//
// A block's shared memory holds all of x, or, where that is too small, a second ring into which each warp copies its 128 k of x with the
// first tile of a chunk. Nothing but the place of x differs: the bits of the result do not.
//
// In shared memory: rings of W [8 warps][stages][8 rows][128] | x as bf16 [K / 128][T][128], or rings of it [8 warps][stages][T][128] |
// partial sums [8 warps][T][8]. 16-byte piece c of row r stands at c ^ (r % 8), so that the 8 rows of a matrix lie in different banks.
#include "cuda/epilogue.cuh"
#include "cuda/launch.h"
#include "cuda/matmul.h"
#include "cuda/select.cuh"
#include "cuda/warp.cuh"

namespace pyllm::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kTile = 8;                        // outputs
constexpr int kGroup = 4;                       // tiles that are taken together
constexpr int kSlice = 128;                     // k of a warp in a chunk
constexpr int kChunk = kWarps * kSlice;         // k
constexpr int kStages = 5;                      // 4 copies under way of 16 KB each, per block
constexpr int kStageElements = kTile * kSlice;  // of one warp

template <class Finish>
struct Skinny {
  MatmulArgs a;
  SkinnyPlan plan;
  Finish finish;
};

// What becomes of two neighbouring sums of a row. Each thread that makes any calls its own copy for all of its tiles, whose rows are
// the same, and all threads of a block call end() once.
struct Store {
  __device__ __forceinline__ void operator()(const MatmulArgs& a, int row, int64_t column, float v0, float v1) {
    finish_pair(a, row, column, v0, v1);
  }
  __device__ __forceinline__ void end(const MatmulArgs&) {}
};

struct RotateAndWrite {
  CacheView cache;
  const float *cos, *sin;
  const int64_t* slots;
  int64_t heads, half;

  __device__ __forceinline__ void operator()(const MatmulArgs& a, int row, int64_t column, float v0, float v1) {
    if (column >= a.n) return;
    if (a.bias) {
      v0 += a.bias[column];
      v1 += a.bias[column + 1];
    }
    const int64_t size = cache.head_size;
    int64_t head = column / size, c0 = column % size, c1 = c0 + 1;
    if (head < heads + cache.kv_heads && c0 < 2 * half) {
      c0 /= 2;
      c1 = c0 + half;
      const float x = v0, c = cos[row * half + c0], s = sin[row * half + c0];
      v0 = x * c - v1 * s;
      v1 = v1 * c + x * s;
    }
    if (head < heads) {
      const int64_t place = row * a.y_stride + head * size;
      if (a.y_dtype == DType::f32) {
        write(static_cast<float*>(a.y) + place, c0, c1, v0, v1);
      } else {
        write(static_cast<bf16*>(a.y) + place, c0, c1, v0, v1);
      }
      return;
    }
    head -= heads;
    const int64_t slot = slots[row], values = head >= cache.kv_heads;
    if (slot < 0 || slot / kBlockTokens >= cache.blocks) return;
    const int64_t place = slot / kBlockTokens * cache.block_elements() +
                          (head - (values ? cache.kv_heads : 0)) * cache.head_elements() +
                          values * cache.half_elements() + slot % kBlockTokens * cache.padded_head();
    const int64_t pad = column % size + 2 == size ? cache.padded_head() : size;
    if (cache.dtype == DType::f32) {
      write(static_cast<float*>(cache.data) + place, c0, c1, v0, v1);
      for (int64_t i = size; i < pad; ++i) static_cast<float*>(cache.data)[place + i] = 0.0f;
    } else {
      write(static_cast<bf16*>(cache.data) + place, c0, c1, v0, v1);
      for (int64_t i = size; i < pad; ++i) static_cast<bf16*>(cache.data)[place + i] = 0;
    }
  }
  template <class T>
  __device__ __forceinline__ static void write(T* to, int64_t c0, int64_t c1, float v0, float v1) {
    store(to + c0, v0);
    store(to + c1, v1);
  }
  __device__ __forceinline__ void end(const MatmulArgs&) {}
};

struct Argmax {
  int32_t* tokens;
  Mass* partial;
  uint32_t* ticket;
  Mass best = 0;

  __device__ __forceinline__ void operator()(const MatmulArgs& a, int, int64_t column, float v0, float v1) {
    take(a, column, v0);
    take(a, column + 1, v1);
  }
  __device__ __forceinline__ void take(const MatmulArgs& a, int64_t column, float v) {
    if (column >= a.n) return;
    const Mass mine = peak_key(a.bias ? v + a.bias[column] : v, column);
    best = mine > best ? mine : best;
  }
  __device__ __forceinline__ void end(const MatmulArgs& a) {
    // The threads of a row are neighbours.
    for (int offset = 1; offset < kTile / 2; offset *= 2) {
      const Mass other = __shfl_xor_sync(0xffffffffu, best, offset);
      best = other > best ? other : best;
    }
    const int rows = int(a.rows), row = threadIdx.x / (kTile / 2);
    if (row < rows && threadIdx.x % (kTile / 2) == 0) partial[int64_t(blockIdx.x) * rows + row] = best;
    // The block whose ticket is the last sees what all others wrote: their fences come before their tickets.
    uint32_t* shared = reinterpret_cast<uint32_t*>(shared_memory());
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *shared = atomicAdd(ticket, 1u);
    __syncthreads();
    if (*shared + 1 != gridDim.x) return;
    __threadfence();
    for (int r = threadIdx.x / 32; r < rows; r += kWarps) {
      best = 0;
      for (unsigned block = threadIdx.x % 32; block < gridDim.x; block += 32) {
        const Mass other = partial[int64_t(block) * rows + r];
        best = other > best ? other : best;
      }
      for (int offset = 16; offset; offset /= 2) {
        const Mass other = __shfl_xor_sync(0xffffffffu, best, offset);
        best = other > best ? other : best;
      }
      if (threadIdx.x % 32 == 0) tokens[r] = peak_of(best).index;
    }
    if (threadIdx.x == 0) *ticket = 0;
  }
};

// A warp's way through its block's work: the tile `tile` of the group that begins with its `first`, over `chunk`; and the stages of the
// two rings that this is copied into.
struct Place {
  int first = 0, tile = 0, chunk = 0, stage = 0, x_stage = 0;

  __device__ __forceinline__ void advance(int tiles, int chunks, int stages) {
    if (++stage == stages) stage = 0;
    if (++tile < kGroup && first + tile < tiles) return;
    tile = 0;
    if (++x_stage == stages) x_stage = 0;
    if (++chunk < chunks) return;
    chunk = 0;
    first += kGroup;
  }
};

// This warp's slice of a tile and chunk, zeros where W ends.
template <class Finish>
__device__ __forceinline__ void fetch_weights(const Skinny<Finish>& s, bf16* ring, const Place& p, int tiles) {
  if (p.first >= tiles) return;
  const int lane = threadIdx.x % 32, c = lane % (kSlice / 8);
  const int64_t n0 = (int64_t(blockIdx.x) + int64_t(p.first + p.tile) * gridDim.x) * kTile;
  const int64_t k = int64_t(p.chunk) * kChunk + threadIdx.x / 32 * kSlice + c * 8;
  const bf16* w = static_cast<const bf16*>(s.a.w);
  bf16* stage = ring + p.stage * kStageElements;
#pragma unroll
  for (int step = 0; step < kStageElements / 8 / 32; ++step) {
    const int r = step * 2 + lane / (kSlice / 8);
    const bool valid = n0 + r < s.a.n && k < s.a.k;
    copy16_async(stage + r * kSlice + (c ^ r) * 8, valid ? w + (n0 + r) * s.a.k + k : w, valid);
  }
}

// This warp's slice of x, where the first tile of a chunk needs it.
template <class Finish>
__device__ __forceinline__ void fetch_x(const Skinny<Finish>& s, bf16* xs, const Place& p, int tiles) {
  if (p.first >= tiles || p.tile != 0) return;
  const int lane = threadIdx.x % 32, c = lane % (kSlice / 8), rows = int(s.a.rows);
  const int64_t k = int64_t(p.chunk) * kChunk + threadIdx.x / 32 * kSlice + c * 8;
  const bf16* x = static_cast<const bf16*>(s.a.x);
  bf16* stage = xs + p.x_stage * rows * kSlice;
  for (int r = lane / (kSlice / 8); r < rows; r += 2)
    copy16_async(stage + r * kSlice + (c ^ (r % 8)) * 8, k < s.a.k ? x + r * s.a.x_stride + k : x, k < s.a.k);
}

// All of x, normalised where asked, as bf16 in shared memory, zeros up to a whole chunk. A warp takes whole rows, so that a row's sums
// have one order.
template <class T, class Finish>
__device__ void load_x(const Skinny<Finish>& s, bf16* xs) {
  const MatmulArgs& a = s.a;
  const int lane = threadIdx.x % 32, rows = int(a.rows), end = int(s.plan.chunks) * kChunk;
  for (int row = threadIdx.x / 32; row < rows; row += kWarps) {
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
    for (int k = lane * 2; k < end; k += 64) {  // K is even
      float v[2] = {0.0f, 0.0f};
      for (int j = 0; j < 2; ++j) {
        if (k >= a.k) break;
        v[j] = to_float(x[k + j]);
        if (a.norm_weight) v[j] = (v[j] - mean) * scale * a.norm_weight[k + j];
        if (a.norm_weight && a.norm_bias) v[j] += a.norm_bias[k + j];
      }
      bf16* slice = xs + (k / kSlice * rows + row) * kSlice;
      *reinterpret_cast<uint32_t*>(slice + (k % kSlice / 8 ^ row % 8) * 8 + k % 8) = pack_bf16(v[0], v[1]);
    }
  }
}

// sums[16 rows, 8 outputs] += a slice of x times one of W. Rows past the last repeat it: nobody reads their sums.
__device__ __forceinline__ void multiply(float (&sums)[4], const bf16* x, const bf16* w, int rows) {
  const int lane = threadIdx.x % 32, row = lane % 16 < rows ? lane % 16 : rows - 1;
  x += row * kSlice;
  w += lane % 8 * kSlice;
#pragma unroll
  for (int step = 0; step < kSlice / 32; ++step) {
    uint32_t b[4];  // 8 outputs by 32 k
    load_matrices(b, w + ((step * 4 + lane / 8) ^ (lane % 8)) * 8);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[4];  // 16 rows by 16 k
      load_matrices(a, x + ((step * 4 + half * 2 + lane / 16) ^ (row % 8)) * 8);
      mma_bf16(sums, a, b[2 * half], b[2 * half + 1]);
    }
  }
}

template <class Finish>
__global__ void __launch_bounds__(kThreads, 2) skinny_matmul_kernel(const __grid_constant__ Skinny<Finish> s) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rows = int(s.a.rows), chunks = int(s.plan.chunks), stages = int(s.plan.stages);
  const bool streamed = s.plan.streamed;
  bf16* ring = reinterpret_cast<bf16*>(shared_memory()) + warp * stages * kStageElements;
  bf16* all_x = reinterpret_cast<bf16*>(shared_memory()) + kWarps * stages * kStageElements;
  bf16* xs = all_x + (streamed ? warp * stages * rows * kSlice : warp * rows * kSlice);
  float* partial = reinterpret_cast<float*>(all_x + (streamed ? kWarps * stages : kWarps * chunks) * rows * kSlice);

  const int tiles = (int(s.plan.tiles) - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x);
  Place ahead;  // what is fetched next
  for (int i = 0; i < stages - 1; ++i) {
    fetch_weights(s, ring, ahead, tiles);
    commit_copies();
    ahead.advance(tiles, chunks, stages);
  }
  wait_for_earlier_kernels();
  let_later_kernels_start();
  if (streamed) {
    Place first;
    for (int i = 0; i < stages - 1; ++i) {
      fetch_x(s, xs, first, tiles);
      first.advance(tiles, chunks, stages);
    }
    commit_copies();
    wait_copies<0>();
  } else {
    if (s.a.x_dtype == DType::f32) {
      load_x<float>(s, all_x);
    } else {
      load_x<bf16>(s, all_x);
    }
    __syncthreads();
  }

  Finish finish = s.finish;
  int stage = 0, x_stage = 0;
  for (int first = 0; first < tiles; first += kGroup) {
    float sums[kGroup][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const bf16* x = xs + (streamed ? x_stage : kWarps * chunk) * rows * kSlice;
      if (++x_stage == stages) x_stage = 0;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (first + j >= tiles) break;
        wait_copies_but(stages - 2);
        __syncwarp();
        fetch_weights(s, ring, ahead, tiles);  // into the stage that was read last
        if (streamed) fetch_x(s, xs, ahead, tiles);
        commit_copies();
        ahead.advance(tiles, chunks, stages);
        multiply(sums[j], x, ring + stage * kStageElements, rows);
        if (++stage == stages) stage = 0;
      }
    }
#pragma unroll 1
    for (int j = 0; j < kGroup && first + j < tiles; ++j) {
      const auto leave = [&](const float (&d)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = lane / 4 + i / 2 * 8;
          if (row < rows) partial[(warp * rows + row) * kTile + lane % 4 * 2 + i % 2] = d[i];
        }
      };
#pragma unroll
      for (int of = 0; of < kGroup; ++of)  // registers are named when a kernel is compiled
        if (of == j) leave(sums[of]);
      __syncthreads();
      if (int(threadIdx.x) < rows * kTile / 2) {
        const int row = threadIdx.x / (kTile / 2), column = threadIdx.x % (kTile / 2) * 2;
        float v0 = 0.0f, v1 = 0.0f;
        for (int from = 0; from < kWarps; ++from) {
          v0 += partial[(from * rows + row) * kTile + column];
          v1 += partial[(from * rows + row) * kTile + column + 1];
        }
        finish(s.a, row, (int64_t(blockIdx.x) + int64_t(first + j) * gridDim.x) * kTile + column, v0, v1);
      }
      __syncthreads();
    }
  }
  finish.end(s.a);
}

// An x that is rounded or normalised on its way has to lie in shared memory as a whole.
bool is_whole(const MatmulArgs& a) { return a.x_dtype != DType::bf16 || a.norm_weight; }

template <class Finish>
cudaError_t launch_skinny(const MatmulArgs& a, const Finish& finish, int64_t multiprocessors, cudaStream_t stream) {
  if (a.rows == 0 || a.n == 0) return cudaSuccess;
  int64_t shared_bytes = 0;
  const cudaError_t error = shared_limit(&shared_bytes);
  if (error != cudaSuccess) return error;
  const Skinny<Finish> s{a, skinny_plan(a.rows, a.n, a.k, is_whole(a), multiprocessors, shared_bytes), finish};
  if (!s.plan.fits || (s.plan.streamed && a.rows > 1 && a.x_stride % 8)) return cudaErrorInvalidValue;
  return launch(skinny_matmul_kernel<Finish>, s, dim3(unsigned(s.plan.blocks)), kThreads, s.plan.shared_bytes, stream);
}

}  // namespace

SkinnyPlan skinny_plan(int64_t rows, int64_t n, int64_t k, bool whole, int64_t multiprocessors, int64_t shared_limit) {
  SkinnyPlan p{};
  p.tiles = (n + kTile - 1) / kTile;
  p.blocks = p.tiles < multiprocessors ? p.tiles : multiprocessors;
  p.chunks = (k + kChunk - 1) / kChunk;
  if (rows > kSkinnyRows || k <= 0 || k % 8) return p;
  const int64_t sums = rows * kWarps * kTile * 4, slice = rows * kSlice * 2;
  const auto take = [&](int64_t stages, bool streamed) {
    p.stages = stages;
    p.streamed = streamed;
    p.shared_bytes = kWarps * (stages * kStageElements * 2 + (streamed ? stages : p.chunks) * slice) + sums;
    p.fits = p.shared_bytes <= shared_limit;
    return p.fits;
  };
  if (take(kStages, false)) return p;
  for (int64_t stages = kStages; stages >= 2; --stages)
    if (take(stages, !whole)) return p;
  return p;
}

cudaError_t skinny_matmul(const MatmulArgs& args, int64_t multiprocessors, cudaStream_t stream) {
  return launch_skinny(args, Store{}, multiprocessors, stream);
}

cudaError_t skinny_qkv(const QkvArgs& args, int64_t multiprocessors, cudaStream_t stream) {
  const CacheView& cache = args.cache;
  if ((cache.dtype != DType::f32 && cache.dtype != DType::bf16) || cache.head_size % 2 ||
      args.matmul.n != (args.heads + 2 * cache.kv_heads) * cache.head_size || args.matmul.gated)
    return cudaErrorInvalidValue;
  const RotateAndWrite finish{cache, args.cos, args.sin, args.slots, args.heads, args.cos ? args.half : 0};
  return launch_skinny(args.matmul, finish, multiprocessors, stream);
}

cudaError_t skinny_argmax(const ArgmaxArgs& args, int64_t multiprocessors, cudaStream_t stream) {
  return launch_skinny(args.matmul, Argmax{args.tokens, args.partial, args.ticket}, multiprocessors, stream);
}

}  // namespace pyllm::cuda
