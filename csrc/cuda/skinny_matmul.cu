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
#include "cuda/rows.cuh"
#include "cuda/select.cuh"
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
    store_element(to + c0, v0);
    store_element(to + c1, v1);
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

// Copies this warp's slice of work item i (its tile and chunk) into the ring, zeros where W ends; one group of copies, also past the
// last item.
template <class Finish>
__device__ __forceinline__ void fetch(const Skinny<Finish>& s, bf16* ring, int64_t i, int64_t items) {
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
template <class T, class Finish>
__device__ void load_x(const Skinny<Finish>& s, bf16* xs) {
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
template <class Finish>
__device__ __forceinline__ uint32_t x_pair(const Skinny<Finish>& s, const bf16* xs, int row, int64_t k) {
  return row < s.a.rows ? *reinterpret_cast<const uint32_t*>(xs + row * s.plan.x_pitch + k) : 0u;
}

template <class Finish>
__global__ void __launch_bounds__(kThreads, 2) skinny_matmul_kernel(const __grid_constant__ Skinny<Finish> s) {
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

  Finish finish = s.finish;
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
      finish(s.a, row, tile * kTile + column, v0, v1);
    }
    __syncthreads();
  }
  finish.end(s.a);
}

template <class Finish>
cudaError_t launch_skinny(const MatmulArgs& a, const Finish& finish, int64_t multiprocessors, bool overlapped,
                          cudaStream_t stream) {
  if (a.rows == 0 || a.n == 0) return cudaSuccess;
  const Skinny<Finish> s{a, skinny_plan(a.rows, a.n, a.k, multiprocessors), finish};
  if (!s.plan.fits || a.k % 8 || a.k == 0) return cudaErrorInvalidValue;
  return launch(skinny_matmul_kernel<Finish>, s, dim3(unsigned(s.plan.blocks)), kThreads, s.plan.shared_bytes,
                overlapped, stream);
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
  return launch_skinny(args, Store{}, multiprocessors, overlapped, stream);
}

cudaError_t skinny_qkv(const QkvArgs& args, int64_t multiprocessors, bool overlapped, cudaStream_t stream) {
  const CacheView& cache = args.cache;
  if ((cache.dtype != DType::f32 && cache.dtype != DType::bf16) || cache.head_size % 2 ||
      args.matmul.n != (args.heads + 2 * cache.kv_heads) * cache.head_size || args.matmul.gated)
    return cudaErrorInvalidValue;
  const RotateAndWrite finish{cache, args.cos, args.sin, args.slots, args.heads, args.cos ? args.half : 0};
  return launch_skinny(args.matmul, finish, multiprocessors, overlapped, stream);
}

cudaError_t skinny_argmax(const ArgmaxArgs& args, int64_t multiprocessors, bool overlapped, cudaStream_t stream) {
  return launch_skinny(args.matmul, Argmax{args.tokens, args.partial, args.ticket}, multiprocessors, overlapped,
                       stream);
}

}  // namespace pyllm::cuda
