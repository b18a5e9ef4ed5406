// Matrix products on an NVIDIA GPU. Shapes: T rows of x, N outputs, K inner dimension. Strides are in elements between rows.
#pragma once
#include <cuda_runtime.h>

#include "core/types.h"

namespace pyllm::cuda {

// y = act(norm(x) W^T + bias) + residual;  gated: rows 2j and 2j + 1 of W are gate and up of output j, and so are the biases':
// y = act(gate) * up + residual, of N / 2 columns.
//
// Within each of the five kernels (skinny, split, mma, wgmma, plain) every output is summed over k in an order that depends on K alone, in
// split_matmul on N and K, so a row's result does not depend on the other rows as long as the kernel stays the same. In wgmma_matmul it
// depends on how many tiles of 128 rows there are too, up to 8 of them; and it takes wgmma of 128, 192 and 256 columns to add alike, which no
// GPU has shown yet.
struct MatmulArgs {
  void* y;                   // [T, N], gated [T, N / 2], of y_dtype
  const void* x;             // [T, K] of x_dtype
  const void* w;             // [N, K] of w_dtype, rows adjacent
  const float* bias;         // [N] or null
  const float* residual;     // like y, float32, or null; may be y itself
  const float* norm_weight;  // [K] or null: no norm; skinny_matmul alone has norms
  const float* norm_bias;    // [K] or null
  int64_t rows, n, k, x_stride, y_stride, residual_stride;
  float eps;
  NormKind norm;
  Activation activation;
  bool gated;  // N is even
  DType x_dtype, w_dtype, y_dtype;
};

// Decoding: at most 16 rows, w bf16, x float32 (rounded to bf16 after the norm) or bf16; K a multiple of 8, pointers 16-byte aligned. The
// first weights are under way before the kernel that makes x has ended.
constexpr int64_t kSkinnyRows = 16;
struct SkinnyPlan {
  int64_t tiles, blocks, chunks;  // of 8 outputs; thread blocks; pieces of K
  int64_t stages;                 // of the rings
  int64_t shared_bytes;
  bool streamed;  // x goes through a ring too: its rows are 16-byte aligned
  bool fits;      // into `shared_limit` bytes of a block's shared memory
};
// `whole`: x is float32 or has a norm, and cannot be streamed.
SkinnyPlan skinny_plan(int64_t rows, int64_t n, int64_t k, bool whole, int64_t multiprocessors, int64_t shared_limit);
cudaError_t skinny_matmul(const MatmulArgs& args, int64_t multiprocessors, cudaStream_t stream);

// The same for the projection of queries, keys and values of decoding. W has the rows of H heads of queries, G of keys and G of values, E
// (even) each: queries go to y, keys into the cache, both rotated where cos is not null, values into the cache. In heads of queries and
// keys the rows of W and the bias stand in pairs that are rotated together, (0, half), (1, half + 1), ...; those from 2 * half on, and
// values, in order.
struct QkvArgs {
  MatmulArgs matmul;  // y [T, H, E]; no residual, activation or gate
  CacheView cache;    // float32 or bf16, in the layout of cuda/attention.h
  const float* cos;   // [T, half] or null
  const float* sin;
  const int64_t* slots;  // [T]: block * kBlockTokens + offset; one outside the cache is skipped
  int64_t heads, half;   // H
};
cudaError_t skinny_qkv(const QkvArgs& args, int64_t multiprocessors, cudaStream_t stream);

// The same for the head of greedy decoding: no outputs but the place of the largest in each row, the lowest of equals; -1 where one is
// NaN or +inf. The last block to end compares what all have found.
struct ArgmaxArgs {
  MatmulArgs matmul;            // y, residual, activation and gate are not used
  int32_t* tokens;              // [T]
  unsigned long long* partial;  // [multiprocessors, T]
  uint32_t* ticket;             // [1], zero, and zero again afterwards
};
cudaError_t skinny_argmax(const ArgmaxArgs& args, int64_t multiprocessors, cudaStream_t stream);

// Decoding of more: at most 64 rows, x and w bf16, K and x_stride multiples of 8, pointers 16-byte aligned. W is cut into tiles of 128 outputs
// and, so that there are blocks enough to draw on all of the memory's speed, into splits of K; which depends on N and K alone,
// and so does the order in which the splits of an output are added.
constexpr int64_t kSplitMatmulRows = 64;
constexpr int64_t kSplitMatmulBlocks = 256;  // where there are several splits: what a workspace has room for
constexpr int64_t kSplitMatmulFloats = kSplitMatmulBlocks * kSplitMatmulRows * 128;
struct SplitPlan {
  int64_t tiles, splits, steps;  // steps of 64 k in a split
};
SplitPlan split_plan(int64_t n, int64_t k);
struct SplitMatmulArgs {
  MatmulArgs matmul;
  float* partial;     // [kSplitMatmulFloats]
  uint32_t* tickets;  // [kSplitMatmulBlocks], zero, and zero again afterwards
};
cudaError_t split_matmul(const SplitMatmulArgs& args, cudaStream_t stream);

// Prompts and training: x and w bf16, K and x_stride multiples of 8, pointers 16-byte aligned.
cudaError_t mma_matmul(const MatmulArgs& args, cudaStream_t stream);

// The same on Hopper, by wgmma. A block makes tiles of 128 rows by 256, 192 or 128 outputs, one after the other. A pair of blocks, neighbours
// along the rows, shares what it reads of W; or, where there are few tiles, up to 8 blocks share a tile, each with a part of K.
struct WgmmaPlan {
  int64_t columns, pair,
      splits;  // outputs of a tile; blocks that share W; parts of K: a cluster has pair * splits blocks
  int64_t row_units, column_tiles;  // a unit: the row tiles of a pair
  int64_t blocks, shared_bytes;
};
// The splits depend on N, K and the number of tiles of 128 rows alone, and there are none for more than 8 of these; the rest depends on the
// number of multiprocessors too.
WgmmaPlan wgmma_plan(int64_t rows, int64_t n, int64_t k, int64_t multiprocessors);
cudaError_t wgmma_matmul(const MatmulArgs& args, int64_t multiprocessors, cudaStream_t stream);

// How many clusters of 2, 4 or 8 blocks of wgmma_matmul the current GPU runs at once, which wgmma_plan takes as known. Hopper alone.
cudaError_t wgmma_clusters(int64_t size, int64_t* most);

// Tests, and sizes that the others refuse: any size and alignment, x and w both float32 or both bf16; multiply-adds in float32.
cudaError_t plain_matmul(const MatmulArgs& args, cudaStream_t stream);

}  // namespace pyllm::cuda
