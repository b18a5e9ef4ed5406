// Attention of prompts by mma.sync with an online softmax (Dao: FlashAttention-2, 2023). A block takes 64 rows, each of its 4 warps 16
// of them and all keys of a page.
//
// In shared memory: queries [64][pitch] | one or two stages of keys and values [2][64][pitch].
#include "cuda/attention.cuh"

namespace pyllm::cuda {
namespace {

constexpr int kRows = kAttentionThreads / 32 * 16;

// 16 rows of queries meet kTiles * 8 keys; `finish(scores)` makes of their products [tile][row g or g + 8, two keys each] what the softmax
// takes, in units of 1 / scale.
template <int kHead, int kTiles, class Finish>
__device__ __forceinline__ void attend(float (&sums)[kHead / 8][4], Softmax& softmax, const bf16* q, const bf16* keys,
                                       const bf16* values, float scale, Finish finish) {
  constexpr int kPitch = kHead + 8;
  const int lane = threadIdx.x % 32;
  float scores[kTiles][4] = {};
#pragma unroll
  for (int k16 = 0; k16 < kHead / 16; ++k16) {
    uint32_t x[4];
    load_matrices(x, q + lane % 16 * kPitch + k16 * 16 + lane / 16 * 8);
#pragma unroll
    for (int j = 0; j < kTiles / 2; ++j) {
      uint32_t k[4];  // 16 keys by 16 channels
      load_matrices(k, keys + (j * 16 + lane / 16 * 8 + lane % 8) * kPitch + k16 * 16 + lane / 8 % 2 * 8);
      mma_bf16(scores[2 * j], x, k[0], k[1]);
      mma_bf16(scores[2 * j + 1], x, k[2], k[3]);
    }
  }
  finish(scores);
  float keep[2];
  take_scores(softmax, keep, scores, scale);
  keep_sums(sums, keep);
#pragma unroll
  for (int j = 0; j < kTiles / 2; ++j) {  // sums of two tiles of 8 keys are, rounded, an operand of 16 keys
    const float *a = scores[2 * j], *b = scores[2 * j + 1];
    const uint32_t p[4] = {pack_bf16(a[0], a[1]), pack_bf16(a[2], a[3]), pack_bf16(b[0], b[1]), pack_bf16(b[2], b[3])};
#pragma unroll
    for (int n = 0; n < kHead / 16; ++n) {
      uint32_t v[4];  // 16 channels by 16 keys
      load_matrices_transposed(v, values + (j * 16 + lane / 8 % 2 * 8 + lane % 8) * kPitch + n * 16 + lane / 16 * 8);
      mma_bf16(sums[2 * n], p, v[0], v[1]);
      mma_bf16(sums[2 * n + 1], p, v[2], v[3]);
    }
  }
}

template <int kHead>
__global__ void __launch_bounds__(kAttentionThreads, 1) prompt_attention_kernel(const __grid_constant__ Staged s) {
  // Where sums take most of the registers, 32 keys at a time.
  constexpr int kPitch = kHead + 8, kStep = kHead > 128 ? 32 : kPage;
  const AttentionArgs& a = s.a;
  const int ahead = s.stages - 1;
  wait_for_earlier_kernels();
  let_later_kernels_start();
  const Group group = find_group(a, blockIdx.z, blockIdx.y);
  // The last rows of a sequence have the most keys: they start first.
  const int row0 = int(gridDim.x - 1 - blockIdx.x) * kRows;
  if (row0 >= group.rows) return;
  const Pages pages = find_pages(group, row0, row0 + kRows < group.rows ? row0 + kRows : group.rows);

  bf16* q = reinterpret_cast<bf16*>(shared_memory());
  bf16* stages = q + kRows * kPitch;
  const auto fetch = [&](int i) {
    if (i < pages.count()) fetch_page<kHead>(stages + i % s.stages * 2 * kPage * kPitch, a, group, pages[i]);
    commit_copies();
  };
  fetch_queries<kHead>(q, kRows, a, group, row0);
  for (int i = 0; i < ahead; ++i) fetch(i);

  const int warp_row = threadIdx.x / 32 * 16, lane = threadIdx.x % 32;
  int rows[2], positions[2], heads[2];
  Seen seen[2];
  for (int half = 0; half < 2; ++half) {
    rows[half] = row0 + warp_row + lane / 4 + half * 8;
    positions[half] = group.offset + rows[half] / group.size;
    heads[half] = group.kv_head * group.size + rows[half] % group.size;
    seen[half] = seen_from(group, positions[half]);
  }
  const bool changed = a.scores.changed();
  const float unit = changed ? 1.0f : a.scale;
  // All rows see the keys from `low` to `high`.
  const int low = seen_from(group, group.offset + (row0 + kRows - 1) / group.size).low;
  const int high = seen_from(group, group.offset + row0 / group.size).high;
  float sums[kHead / 8][4] = {};
  Softmax softmax;
  for (int i = 0; i < pages.count(); ++i) {
    fetch(i + ahead);
    wait_copies_but(ahead);
    __syncthreads();
    const bf16* keys = stages + i % s.stages * 2 * kPage * kPitch;
    const int page = pages[i];
#pragma unroll 1
    for (int from = 0; from < kPage; from += kStep) {
      const int first = page * kPage + from;
      attend<kHead, kStep / 8>(sums, softmax, q + warp_row * kPitch, keys + from * kPitch,
                               keys + (kPage + from) * kPitch, unit * kLog2E, [&](float (&scores)[kStep / 8][4]) {
                                 if (changed) {
                                   const int key = first + lane % 4 * 2;
                                   const int distances[2] = {key - positions[0], key - positions[1]};
                                   change_scores<kStep / 2>(
                                       a, [&](int j) -> float& { return scores[j / 4][j % 4]; }, heads, distances);
                                 }
                                 if (first >= low && first + kStep <= high) return;
#pragma unroll
                                 for (int j = 0; j < kStep / 2; ++j)
                                   if (!seen[j % 4 / 2](first + j / 4 * 8 + lane % 4 * 2 + j % 2))
                                     scores[j / 4][j % 4] = -INFINITY;
                               });
    }
    __syncthreads();
  }
  store_rows(a, group, rows, sums, softmax, unit);
}

template <int kHead>
cudaError_t launch_prompt(const AttentionArgs& a, cudaStream_t stream) {
  const int64_t rows = a.most_queries * (a.heads / a.cache.kv_heads);
  const dim3 grid(unsigned((rows + kRows - 1) / kRows), unsigned(a.cache.kv_heads), unsigned(a.sequences));
  const auto bytes = [](int stages) { return int64_t(kRows + stages * 2 * kPage) * (kHead + 8) * 2; };
  return launch_staged(prompt_attention_kernel<kHead>, a, grid, 2, bytes, stream);
}

}  // namespace

cudaError_t prompt_attention(const AttentionArgs& args, cudaStream_t stream) {
  if (args.sequences == 0 || args.most_queries == 0) return cudaSuccess;
  if (!usable(args)) return cudaErrorInvalidValue;
  const int64_t head = args.cache.head_size;
  if (head <= 64) return launch_prompt<64>(args, stream);
  if (head <= 96) return launch_prompt<96>(args, stream);
  if (head <= 128) return launch_prompt<128>(args, stream);
  return launch_prompt<256>(args, stream);
}

}  // namespace pyllm::cuda
