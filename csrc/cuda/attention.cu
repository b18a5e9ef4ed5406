// Attention by mma.sync with an online softmax (Dao: FlashAttention-2, 2023), for prompts and for decoding.
//
// The rows of a key/value head are its queries times the heads of its group: row r is query r / group, head r % group. A page is a block of
// the cache, 64 keys. For prompts a block takes 64 rows, each of its 4 warps 16 of them and all keys of a page; for decoding
// a block takes 16 rows and some pages, each warp all rows and 16 keys of every page.
//
// In shared memory: queries [rows][pitch] | two stages of keys and values [64][pitch] each. The pitch is the head size plus 8, so that the
// 8 rows of a matrix lie in different banks.
#include "cuda/attention.h"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"

namespace pyllm::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * 32, kPage = int(kBlockTokens);

// Copies `rows` rows of `size` elements, zeros past the valid ones and up to kHead.
template <int kHead, class Row>
__device__ __forceinline__ void fetch_rows(bf16* to, int rows, int64_t valid_rows, int64_t size, const bf16* somewhere,
                                           Row row) {
  for (int i = threadIdx.x; i < rows * (kHead / 8); i += kThreads) {
    const int r = i / (kHead / 8), c = i % (kHead / 8) * 8;
    const bool valid = r < valid_rows && c < size;
    copy16_async(to + r * (kHead + 8) + c, valid ? row(r) + c : somewhere, valid);
  }
}

// One row of results, of a lane's two: largest score, sum of weights, and the weighted values beside them in `sums`.
struct Softmax {
  float most[2], total[2];
};

__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

// 16 rows of queries meet kTiles * 8 keys; `seen(row, key)` says whether a row of the 16 sees a key of them.
template <int kHead, int kTiles, class Seen>
__device__ __forceinline__ void attend(float (&sums)[kHead / 8][4], Softmax& softmax, const bf16* q, const bf16* keys,
                                       const bf16* values, float scale, Seen seen) {
  constexpr int kPitch = kHead + 8;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
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
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float most = softmax.most[half];
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        if (!seen(g + half * 8, j * 8 + 2 * t + i % 2)) scores[j][i] = -INFINITY;
        most = fmaxf(most, scores[j][i]);
      }
    most = quad_max(most);
    const float base = most == -INFINITY ? 0.0f : most;  // no key seen so far
    const float keep = exp2_fast((softmax.most[half] - base) * scale);
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) total += scores[j][i] = exp2_fast((scores[j][i] - base) * scale);
    softmax.most[half] = most;
    softmax.total[half] = softmax.total[half] * keep + total;
#pragma unroll
    for (int n = 0; n < kHead / 8; ++n) {
      sums[n][2 * half] *= keep;
      sums[n][2 * half + 1] *= keep;
    }
  }
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

// What a block works on: rows [row0, row0 + 64 or 16) of a sequence and key/value head, over pages [first, last).
struct Work {
  int64_t sequence, kv_head, group, start, queries, length, row0, first, last;
};

__device__ __forceinline__ Work find_work(const AttentionArgs& a, int64_t row0, int rows) {
  Work w;
  w.sequence = blockIdx.z;
  w.kv_head = blockIdx.y;
  w.group = a.heads / a.cache.kv_heads;
  w.start = a.starts[w.sequence];
  w.queries = a.starts[w.sequence + 1] - w.start;
  w.length = a.lengths[w.sequence];
  w.row0 = row0;
  const int64_t end = row0 + rows < w.queries * w.group ? row0 + rows : w.queries * w.group;
  const int64_t offset = w.length - w.queries;
  const int64_t from = a.window > 0 ? offset + row0 / w.group - a.window + 1 : 0;  // keys of the first row
  w.first = from > 0 ? from / kPage : 0;
  w.last = end > row0 ? (offset + (end - 1) / w.group) / kPage + 1 : w.first;
  return w;
}

// Walks pages [w.first, w.last): every warp its 16 rows from `warp_row` on and kKeys keys of a page from `warp_key` on. Where sums
// take most of the registers, 32 keys at a time.
template <int kHead, int kRows, int kKeys>
__device__ __forceinline__ void walk(float (&sums)[kHead / 8][4], Softmax& softmax, const AttentionArgs& a,
                                     const Work& w, int warp_row, int warp_key) {
  constexpr int kPitch = kHead + 8, kStep = kHead > 128 && kKeys > 32 ? 32 : kKeys;
  bf16* q = reinterpret_cast<bf16*>(shared_memory());
  bf16* stages = q + kRows * kPitch;
  const bf16* queries = static_cast<const bf16*>(a.q);
  const bf16* cache = static_cast<const bf16*>(a.cache.data);
  const int64_t head = a.cache.head_size, pitch = (head + kHeadPad - 1) / kHeadPad * kHeadPad, half = kPage * pitch;
  const int64_t offset = w.length - w.queries;
  const auto fetch_page = [&](int64_t page) {
    if (page < w.last) {
      const int64_t block = a.tables[w.sequence * a.table_width + page];
      const bf16* keys = cache + (block * a.cache.kv_heads + w.kv_head) * 2 * half;
      const bf16* values = keys + half;
      bf16* stage = stages + (page - w.first) % 2 * 2 * kPage * kPitch;
      const int64_t valid = w.length - page * kPage;
      fetch_rows<kHead>(stage, kPage, valid, head, keys, [&](int r) { return keys + r * pitch; });
      fetch_rows<kHead>(stage + kPage * kPitch, kPage, valid, head, keys, [&](int r) { return values + r * pitch; });
    }
    commit_copies();
  };
  fetch_rows<kHead>(q, kRows, w.queries * w.group - w.row0, head, queries, [&](int r) {
    const int64_t row = w.row0 + r;
    return queries + (w.start + row / w.group) * a.q_stride + (w.kv_head * w.group + row % w.group) * head;
  });
  fetch_page(w.first);
  const float scale = a.scale * 1.44269504f;  // weights are powers of two
  // Last key that each of a lane's two rows sees.
  int last_seen[2];
  for (int i = 0; i < 2; ++i) last_seen[i] = int(offset + (w.row0 + warp_row + threadIdx.x % 32 / 4 + i * 8) / w.group);
  const int window = a.window > 0 && a.window < w.length ? int(a.window) : int(w.length);
  for (int64_t page = w.first; page < w.last; ++page) {
    fetch_page(page + 1);
    wait_copies<1>();
    __syncthreads();
    const bf16* keys = stages + (page - w.first) % 2 * 2 * kPage * kPitch;
#pragma unroll 1
    for (int from = warp_key; from < warp_key + kKeys; from += kStep) {
      attend<kHead, kStep / 8>(sums, softmax, q + warp_row * kPitch, keys + from * kPitch,
                               keys + (kPage + from) * kPitch, scale, [&](int row, int key) {
                                 const int last = last_seen[row / 8], j = int(page) * kPage + from + key;
                                 return j <= last && j < int(w.length) && last - j < window;
                               });
    }
    __syncthreads();
  }
  for (float& total : softmax.total) total = quad_sum(total);
}

__device__ __forceinline__ bf16* out_row(const AttentionArgs& a, const Work& w, int64_t row) {
  return static_cast<bf16*>(a.out) + (w.start + row / w.group) * a.out_stride +
         (w.kv_head * w.group + row % w.group) * a.cache.head_size;
}

template <int kHead>
__global__ void __launch_bounds__(kThreads, 1) prompt_attention_kernel(const __grid_constant__ AttentionArgs a) {
  wait_for_earlier_kernels();
  let_later_kernels_start();
  // The last rows of a sequence have the most keys: they start first.
  const Work w = find_work(a, int64_t(gridDim.x - 1 - blockIdx.x) * kWarps * 16, kWarps * 16);
  if (w.first >= w.last) return;
  const int warp_row = threadIdx.x / 32 * 16, lane = threadIdx.x % 32;
  float sums[kHead / 8][4] = {};
  Softmax softmax{{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
  walk<kHead, kWarps * 16, kPage>(sums, softmax, a, w, warp_row, 0);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = w.row0 + warp_row + lane / 4 + half * 8;
    if (row >= w.queries * w.group) continue;
    uint32_t* out = reinterpret_cast<uint32_t*>(out_row(a, w, row));
    const float share = 1.0f / softmax.total[half];
#pragma unroll
    for (int n = 0; n < kHead / 8; ++n)
      if (n * 8 < a.cache.head_size)
        out[n * 4 + lane % 4] = pack_bf16(sums[n][2 * half] * share, sums[n][2 * half + 1] * share);
  }
}

// Merges `count` results [count][16][kHead + 2] (weighted values, largest score, sum of weights), `stride` apart, in rising order.
struct Merged {
  float most, total, value;
};
__device__ __forceinline__ Merged merge(const float* results, int64_t stride, int64_t count, int64_t size, int channel,
                                        float scale) {
  Merged m{-INFINITY, 0.0f, 0.0f};
  for (int64_t i = 0; i < count; ++i) m.most = fmaxf(m.most, results[i * stride + size]);
  for (int64_t i = 0; i < count; ++i) {
    const float* r = results + i * stride;
    const float weight = r[size] == -INFINITY ? 0.0f : exp2_fast((r[size] - m.most) * scale);
    m.total += r[size + 1] * weight;
    m.value += r[channel] * weight;
  }
  return m;
}

template <int kHead>
__global__ void __launch_bounds__(kThreads, 1) split_attention_kernel(const __grid_constant__ AttentionArgs a) {
  constexpr int kRows = int(kSplitRows), kRecord = kHead + 2;
  wait_for_earlier_kernels();
  let_later_kernels_start();
  Work w = find_work(a, 0, kRows);
  const int64_t first_split = w.first / a.split_blocks, splits = (w.last + a.split_blocks - 1) / a.split_blocks;
  const int64_t split = blockIdx.x;
  if (w.first >= w.last || split < first_split || split >= splits) return;
  if (w.first < split * a.split_blocks) w.first = split * a.split_blocks;
  if (w.last > (split + 1) * a.split_blocks) w.last = (split + 1) * a.split_blocks;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float sums[kHead / 8][4] = {};
  Softmax softmax{{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
  walk<kHead, kRows, kPage / kWarps>(sums, softmax, a, w, 0, warp * 16);

  wait_copies<0>();
  __syncthreads();
  float* results = reinterpret_cast<float*>(shared_memory());  // [warps][16][kRecord], where queries and pages were
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* record = results + (warp * kRows + g + half * 8) * kRecord;
#pragma unroll
    for (int n = 0; n < kHead / 8; ++n) {
      record[n * 8 + 2 * t] = sums[n][2 * half];
      record[n * 8 + 2 * t + 1] = sums[n][2 * half + 1];
    }
    record[kHead] = softmax.most[half];
    record[kHead + 1] = softmax.total[half];
  }
  __syncthreads();

  const float scale = a.scale * 1.44269504f;
  const int64_t rows = w.queries * w.group, head = a.cache.head_size, size = rows * head;
  const int64_t place = w.sequence * a.cache.kv_heads + w.kv_head, record = head + 2;
  float* partial = a.partial + place * gridDim.x * kRows * record;
  const bool alone = first_split + 1 == splits;
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    const int64_t row = i / head;
    const int channel = int(i % head);
    const Merged m = merge(results + row * kRecord, kRows * kRecord, kWarps, kHead, channel, scale);
    if (alone) {
      out_row(a, w, row)[channel] = bf16(pack_bf16(m.value / m.total, 0.0f));
      continue;
    }
    float* mine = partial + (split * kRows + row) * record;
    mine[channel] = m.value;
    if (channel == 0) {
      mine[head] = m.most;
      mine[head + 1] = m.total;
    }
  }
  if (alone) return;

  // The block whose ticket is the last sees what all others wrote: their fences come before their tickets.
  uint32_t* ticket = reinterpret_cast<uint32_t*>(results);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *ticket = atomicAdd(a.tickets + place, 1u);
  __syncthreads();
  if (*ticket + 1 != uint32_t(splits - first_split)) return;
  __threadfence();
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    const int64_t row = i / head;
    const Merged m = merge(partial + (first_split * kRows + row) * record, kRows * record, splits - first_split, head,
                           int(i % head), scale);
    out_row(a, w, row)[i % head] = bf16(pack_bf16(m.value / m.total, 0.0f));
  }
  if (threadIdx.x == 0) a.tickets[place] = 0;
}

template <int kHead>
int64_t shared_bytes(int rows) {
  return int64_t(rows + 4 * kPage) * (kHead + 8) * 2;
}

bool usable(const AttentionArgs& a) {
  return a.cache.dtype == DType::bf16 && a.cache.head_size % 8 == 0 && a.cache.head_size <= kMaxHead &&
         a.q_stride % 8 == 0 && a.heads % a.cache.kv_heads == 0;
}

template <int kHead>
cudaError_t launch_prompt(const AttentionArgs& a, cudaStream_t stream) {
  const int64_t rows = a.most_queries * (a.heads / a.cache.kv_heads);
  const dim3 grid(unsigned((rows + kWarps * 16 - 1) / (kWarps * 16)), unsigned(a.cache.kv_heads),
                  unsigned(a.sequences));
  return launch(prompt_attention_kernel<kHead>, a, grid, kThreads, shared_bytes<kHead>(kWarps * 16), true, stream);
}

template <int kHead>
cudaError_t launch_split(const AttentionArgs& a, cudaStream_t stream) {
  const dim3 grid(unsigned((a.table_width + a.split_blocks - 1) / a.split_blocks), unsigned(a.cache.kv_heads),
                  unsigned(a.sequences));
  return launch(split_attention_kernel<kHead>, a, grid, kThreads, shared_bytes<kHead>(int(kSplitRows)), true, stream);
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

cudaError_t split_attention(const AttentionArgs& args, cudaStream_t stream) {
  if (args.sequences == 0 || args.most_queries == 0) return cudaSuccess;
  if (!usable(args) || args.split_blocks <= 0 || args.most_queries * (args.heads / args.cache.kv_heads) > kSplitRows)
    return cudaErrorInvalidValue;
  const int64_t head = args.cache.head_size;
  if (head <= 64) return launch_split<64>(args, stream);
  if (head <= 96) return launch_split<96>(args, stream);
  if (head <= 128) return launch_split<128>(args, stream);
  return launch_split<256>(args, stream);
}

}  // namespace pyllm::cuda
