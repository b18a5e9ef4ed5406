// What the attention kernels share: which keys a row sees, what becomes of its scores, and how pages come into shared memory.
//
// The rows of a key/value head are its queries times the heads of its group: row r is query r / group, head r % group. A page is a block of
// the cache, 64 keys. In shared memory rows of queries, keys and values have a pitch of the head size plus 8, so that the 8 rows
// of a matrix lie in different banks.
#pragma once
#include "cuda/attention.h"
#include "cuda/launch.h"
#include "cuda/store.cuh"

namespace pyllm::cuda {

constexpr int kPage = int(kBlockTokens);
constexpr int kAttentionThreads = 128;
constexpr float kLog2E = 1.44269504f;

// What a kernel of attention is launched with. `stages`: pages that shared memory holds, of which one is worked on.
struct Staged {
  AttentionArgs a;
  int stages;
};

// Launches with as many stages as shared memory holds, at most `stages`; `bytes(n)` is what n of them take.
template <class Bytes>
cudaError_t launch_staged(void (*kernel)(Staged), const AttentionArgs& a, dim3 grid, int stages, Bytes bytes,
                          cudaStream_t stream) {
  int64_t limit = 0;
  const cudaError_t error = shared_limit(&limit);
  if (error != cudaSuccess) return error;
  while (stages > 1 && bytes(stages) > limit) --stages;
  return launch(kernel, Staged{a, stages}, grid, kAttentionThreads, bytes(stages), stream);
}

// One sequence and key/value head of a launch.
struct Group {
  int sequence, kv_head, size;      // size: heads that share the key/value head
  int start, rows, length, offset;  // first row of q; rows; keys; position of the first query
  int prefix, window, sinks;        // window 0: none
  bool causal;
};

__device__ __forceinline__ Group find_group(const AttentionArgs& a, int sequence, int kv_head) {
  Group g;
  g.sequence = sequence;
  g.kv_head = kv_head;
  g.size = int(a.heads / a.cache.kv_heads);
  g.start = a.starts[sequence];
  const int queries = a.starts[sequence + 1] - g.start;
  g.rows = queries * g.size;
  g.length = a.lengths[sequence];
  g.offset = g.length - queries;
  g.prefix = a.rule.prefix ? a.rule.prefix[sequence] : 0;
  g.window = a.rule.window < (1 << 30) ? int(a.rule.window) : 1 << 30;
  g.sinks = a.rule.sinks < g.length ? int(a.rule.sinks) : g.length;
  g.causal = a.rule.causal;
  return g;
}

// A query sees the keys of [low, high), and those below `sinks`.
struct Seen {
  int low, high, sinks;
  __device__ __forceinline__ bool operator()(int key) const { return (key >= low && key < high) || key < sinks; }
};
__device__ __forceinline__ Seen seen_from(const Group& g, int position) {
  Seen s{0, g.length, 0};
  if (g.causal) s.high = position + 1 > g.prefix ? position + 1 : g.prefix;
  if (g.window > 0) {
    s.low = position - g.window + 1 > 0 ? position - g.window + 1 : 0;
    s.sinks = g.causal && s.high < g.sinks ? s.high : g.sinks;
    if (!g.causal && position + g.window < s.high) s.high = position + g.window;
  }
  return s;
}

// A score of query and key as the softmax takes it, of a head and at a distance key - query.
__device__ __forceinline__ float changed_score(const AttentionArgs& a, float score, int head, int distance) {
  score *= a.scale;
  if (a.scores.softcap > 0.0f) score = a.scores.softcap * tanhf(score / a.scores.softcap);
  if (a.scores.bias) {
    const int reach = int(a.scores.reach);
    const int column = distance < -reach ? 0 : distance > reach ? 2 * reach : distance + reach;
    score += a.scores.bias[int64_t(head) * (2 * reach + 1) + column];
  }
  if (a.scores.slopes) score += a.scores.slopes[head] * float(distance);
  return score;
}

// The same for the `count` scores that a lane has of some keys; `score(j)` is the j-th, of row half j % 4 / 2 and key j / 4 * 8 + j % 2 from the
// lane's first on, which is at a distance of `distances` from those rows' queries. What is to be done is asked once for all.
template <int count, class Score>
__device__ __forceinline__ void change_scores(const AttentionArgs& a, Score score, const int (&heads)[2],
                                              const int (&distances)[2]) {
  if (a.scores.softcap > 0.0f) {
    // cap tanh(x / cap), in few instructions: to within 2^-21 of the cap.
    const float cap = a.scores.softcap, unit = a.scale * 2.0f * kLog2E / cap;
#pragma unroll
    for (int j = 0; j < count; ++j) score(j) = cap - 2.0f * cap * reciprocal_fast(1.0f + exp2_fast(score(j) * unit));
  } else {
#pragma unroll
    for (int j = 0; j < count; ++j) score(j) *= a.scale;
  }
  if (a.scores.bias) {
    const int reach = int(a.scores.reach);
    const float* middles[2];
    for (int half = 0; half < 2; ++half) middles[half] = a.scores.bias + int64_t(heads[half]) * (2 * reach + 1) + reach;
#pragma unroll
    for (int j = 0; j < count; ++j) {
      const int distance = distances[j % 4 / 2] + j / 4 * 8 + j % 2;
      score(j) += middles[j % 4 / 2][distance < -reach ? -reach : distance > reach ? reach : distance];
    }
  }
  if (a.scores.slopes) {
    const float slopes[2] = {a.scores.slopes[heads[0]], a.scores.slopes[heads[1]]};
    const float from[2] = {float(distances[0]), float(distances[1])};
#pragma unroll
    for (int j = 0; j < count; ++j) score(j) += slopes[j % 4 / 2] * (from[j % 4 / 2] + float(j / 4 * 8 + j % 2));
  }
}

// The pages that some of rows [row0, end) see: [0, sink_end), then [first, last).
struct Pages {
  int sink_first, sink_end, first, last;
  __device__ __forceinline__ int count() const { return sink_end - sink_first + last - first; }
  __device__ __forceinline__ int operator[](int i) const {
    return i < sink_end - sink_first ? sink_first + i : first + i - (sink_end - sink_first);
  }
};
__device__ __forceinline__ Pages find_pages(const Group& g, int row0, int end) {
  const Seen from = seen_from(g, g.offset + row0 / g.size), to = seen_from(g, g.offset + (end - 1) / g.size);
  Pages p{0, 0, from.low / kPage, (to.high + kPage - 1) / kPage};
  if (p.last < p.first) p.last = p.first;
  p.sink_end = (to.sinks + kPage - 1) / kPage;
  if (p.sink_end > p.first) p.sink_end = p.first;
  return p;
}

// One page's keys and values [2][64][kHead + 8], zeros past what is written and up to kHead; not yet a group of copies.
template <int kHead>
__device__ __forceinline__ void fetch_page(bf16* to, const AttentionArgs& a, const Group& g, int page) {
  const int pitch = int(a.cache.padded_head()), size = int(a.cache.head_size);
  const int64_t half = a.cache.half_elements(), block = a.tables[g.sequence * a.table_width + page];
  const bf16* keys = static_cast<const bf16*>(a.cache.data) + block * a.cache.block_elements() + g.kv_head * 2 * half;
#pragma unroll(kHead > 128 ? 2 : 4)
  for (int i = threadIdx.x; i < 2 * kPage * (kHead / 8); i += kAttentionThreads) {
    const int r = i / (kHead / 8), c = i % (kHead / 8) * 8;
    const bool valid = page * kPage + r % kPage < g.length && c < size;
    copy16_async(to + r * (kHead + 8) + c, valid ? keys + r / kPage * half + r % kPage * pitch + c : keys, valid);
  }
}

// Queries [rows][kHead + 8] as bf16, zeros past the last row and up to kHead; bf16 ones as copies of the next group.
template <int kHead>
__device__ __forceinline__ void fetch_queries(bf16* to, int rows, const AttentionArgs& a, const Group& g, int row0) {
  const int size = int(a.cache.head_size);
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * (kHead / 8); i += kAttentionThreads) {
    const int r = i / (kHead / 8), c = i % (kHead / 8) * 8, row = row0 + r;
    const bool valid = row < g.rows && c < size;
    const int64_t from =
        valid ? (g.start + row / g.size) * a.q_stride + (g.kv_head * g.size + row % g.size) * size + c : 0;
    if (a.q_dtype == DType::bf16) {
      copy16_async(to + r * (kHead + 8) + c, static_cast<const bf16*>(a.q) + from, valid);
      continue;
    }
    const float* q = static_cast<const float*>(a.q) + from;
    uint32_t* pairs = reinterpret_cast<uint32_t*>(to + r * (kHead + 8) + c);
#pragma unroll
    for (int j = 0; j < 4; ++j) pairs[j] = valid ? pack_bf16(q[2 * j], q[2 * j + 1]) : 0u;
  }
}

__device__ __forceinline__ int64_t out_place(const AttentionArgs& a, const Group& g, int row) {
  return (g.start + row / g.size) * a.out_stride + (g.kv_head * g.size + row % g.size) * a.cache.head_size;
}
// `most` in units of 1 / scale of the softmax's scores.
__device__ __forceinline__ void store_lse(const AttentionArgs& a, const Group& g, int row, float most, float scale,
                                          float total) {
  if (!a.lse) return;
  a.lse[(g.start + row / g.size) * a.heads + g.kv_head * g.size + row % g.size] =
      total > 0.0f ? most * scale + logf(total) : -INFINITY;
}

// Over the four lanes that share a row of a product.
__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

// Of a lane's two rows of a product the largest score so far, and the sum of weights of the lane's keys.
struct Softmax {
  float most[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
};

// Makes weights of the scores of some keys, [tile of 8 keys][row g or g + 8, two keys each], in units of 1 / scale of powers of two. `keep` is
// what sums of earlier weights are worth still.
template <int kTiles>
__device__ __forceinline__ void take_scores(Softmax& softmax, float (&keep)[2], float (&scores)[kTiles][4],
                                            float scale) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float most = softmax.most[half];
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) most = fmaxf(most, scores[j][i]);
    most = quad_max(most);
    const float base = most == -INFINITY ? 0.0f : most;  // no key seen so far
    keep[half] = exp2_fast((softmax.most[half] - base) * scale);
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) total += scores[j][i] = exp2_fast((scores[j][i] - base) * scale);
    softmax.most[half] = most;
    softmax.total[half] = softmax.total[half] * keep[half] + total;
  }
}

// A row's sums of earlier weights times values, as much as they are worth still.
template <int kTiles>
__device__ __forceinline__ void keep_sums(float (&sums)[kTiles][4], const float (&keep)[2]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n][i] *= keep[i / 2];
}

// Stores a lane's two rows of results: sums [tile of 8 channels][4]; `rows` [2] are those of the group, `unit` as in store_lse.
template <int kTiles>
__device__ __forceinline__ void store_rows(const AttentionArgs& a, const Group& group, const int (&rows)[2],
                                           const float (&sums)[kTiles][4], const Softmax& softmax, float unit) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = quad_sum(softmax.total[half]);
    if (rows[half] >= group.rows) continue;
    const float share = total > 0.0f ? 1.0f / total : 0.0f;
    const int64_t place = out_place(a, group, rows[half]) + t * 2;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      if (n * 8 < a.cache.head_size)
        store_pair(a.out, a.out_dtype, place + n * 8, sums[n][2 * half] * share, sums[n][2 * half + 1] * share);
    if (t == 0) store_lse(a, group, rows[half], softmax.most[half], unit, total);
  }
}

inline bool usable(const AttentionArgs& a) {
  return a.cache.dtype == DType::bf16 && a.cache.head_size % 8 == 0 && a.cache.head_size <= kMaxHead &&
         a.q_stride % 8 == 0 && a.heads % a.cache.kv_heads == 0;
}

}  // namespace pyllm::cuda
