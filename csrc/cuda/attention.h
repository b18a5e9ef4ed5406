// Attention of a ragged batch over the paged cache, on an NVIDIA GPU. Letters, rules and scores as in core/args.h.
//
// The cache is one layer: [blocks][G][keys, values][kBlockTokens][Ep], Ep = padded_head(). It already holds this step's keys and
// values; what has not been written is never used. A query that sees no key gives 0, and an lse of -infinity.
#pragma once
#include <cuda_runtime.h>

#include "core/args.h"

namespace pyllm::cuda {

struct AttentionArgs {
  void* out;      // [T, H, E] of out_dtype
  float* lse;     // [T, H] log of the sum of exponentials of scores, or null
  const void* q;  // [T, H, E] of q_dtype, already rotated; rounded to the cache's dtype
  CacheView cache;
  const int32_t* starts;   // [B + 1] first row of each sequence
  const int32_t* lengths;  // [B] keys in the cache, this step's included
  const int32_t* tables;   // [B, table_width] block numbers
  AttentionRule rule;
  AttentionScores scores;
  int64_t sequences, heads, table_width, q_stride, out_stride;
  int64_t most_queries;  // of any sequence
  float scale;
  DType q_dtype, out_dtype;
  // split_attention only:
  int64_t
      split_blocks;  // cache blocks that a thread block takes; from it and the lengths alone follows how sums are ordered
  float* partial;    // [B, G, splits, 16, E + 2] with splits = table_width / split_blocks, rounded up
  uint32_t* tickets;  // [B, G], zero, and zero again afterwards
};

// Prompts, a bf16 cache. E, at most kMaxHead, and q_stride are multiples of 8, q is 16-byte aligned.
cudaError_t prompt_attention(const AttentionArgs& args, cudaStream_t stream);

// The same on Hopper, by wgmma: E is 64 or 128, and blocks times G at most kMaxWgmmaBlocks.
constexpr int64_t kMaxWgmmaBlocks = ((int64_t(1) << 31) - 1) / (2 * kBlockTokens);
cudaError_t wgmma_attention(const AttentionArgs& args, cudaStream_t stream);

// Decoding, the same and: most_queries times H / G is at most 16. The keys of a sequence are split over thread blocks, the last of which to
// end adds their results up in rising order.
constexpr int64_t kSplitRows = 16;
cudaError_t split_attention(const AttentionArgs& args, cudaStream_t stream);

// Tests: all in float32.
cudaError_t plain_attention(const AttentionArgs& args, cudaStream_t stream);

}  // namespace pyllm::cuda
