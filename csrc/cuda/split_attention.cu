// Attention of decoding by mma.sync with an online softmax. A block takes 16 rows and some pages of a sequence; of every page each of
// its 4 warps makes the scores of 16 keys, and then, for all 64, a quarter of the channels of the weighted values. So weights go through
// shared memory, and a lane holds few sums. The last block of a sequence to end adds up what all have made.
//
// In shared memory: stages of keys and values [2][64][pitch] | queries [16][pitch] | weights [16][72] | maxima and sums [4 warps][16].
#include "cuda/attention.cuh"

namespace pyllm::cuda {
namespace {

constexpr int kRows = int(kSplitRows), kWarps = kAttentionThreads / 32, kWeightPitch = kPage + 8;
constexpr int kStages = 3;  // at most

// The splits that see any of a group's keys, in rising order: [0, sinks), then from `first` on.
struct Splits {
  int sinks, first, count;
  __device__ __forceinline__ int operator[](int i) const { return i < sinks ? i : first + i - sinks; }
};
__device__ __forceinline__ Splits find_splits(const Pages& pages, int size) {
  Splits s;
  s.first = pages.first / size;
  s.sinks = (pages.sink_end + size - 1) / size;
  if (s.sinks > s.first) s.sinks = s.first;
  s.count = s.sinks + (pages.last > pages.first ? (pages.last + size - 1) / size - s.first
                       : pages.sink_end > 0     ? 1
                                                : 0);
  return s;
}

// Merges results [size] (weighted values, largest score, sum of weights), in rising order; `record(i)` is the i-th of `count`.
struct Merged {
  float most, total, value;
};
template <class Record>
__device__ __forceinline__ Merged merge(Record record, int count, int size, int channel, float scale) {
  Merged m{-INFINITY, 0.0f, 0.0f};
  for (int i = 0; i < count; ++i) m.most = fmaxf(m.most, record(i)[size]);
  for (int i = 0; i < count; ++i) {
    const float* r = record(i);
    const float weight = r[size] == -INFINITY ? 0.0f : exp2_fast((r[size] - m.most) * scale);
    m.total += r[size + 1] * weight;
    m.value += r[channel] * weight;
  }
  return m;
}

template <int kHead>
__global__ void __launch_bounds__(kAttentionThreads, 4) split_attention_kernel(const __grid_constant__ Staged s) {
  constexpr int kPitch = kHead + 8, kStage = 2 * kPage * kPitch, kChannels = kHead / kWarps;
  constexpr int kUnroll = kHead > 128 ? 1 : 4;  // within the registers
  const AttentionArgs& a = s.a;
  const int ahead = s.stages - 1;
  wait_for_earlier_kernels();
  let_later_kernels_start();
  const Group group = find_group(a, blockIdx.z, blockIdx.y);
  if (group.rows == 0) return;
  Pages pages = find_pages(group, 0, group.rows);
  const int size = int(a.split_blocks), split = blockIdx.x;
  const Splits splits = find_splits(pages, size);
  const bool alone = splits.count <= 1;
  if (splits.count == 0 ? split > 0
                        : split >= splits.sinks && (split < splits.first || split > splits[splits.count - 1]))
    return;
  const int begin = split * size, end = begin + size;
  pages.sink_first = pages.sink_first > begin ? pages.sink_first : begin;
  pages.sink_end = pages.sink_end < end ? pages.sink_end : end;
  if (pages.sink_end < pages.sink_first) pages.sink_end = pages.sink_first;
  pages.first = pages.first > begin ? pages.first : begin;
  pages.last = pages.last < end ? pages.last : end;
  if (pages.last < pages.first) pages.last = pages.first;

  bf16* stages = reinterpret_cast<bf16*>(shared_memory());
  bf16* q = stages + s.stages * kStage;
  bf16* weights = q + kRows * kPitch;
  float* maxima = reinterpret_cast<float*>(weights + kRows * kWeightPitch);
  const auto fetch = [&](int i) {
    if (i < pages.count()) fetch_page<kHead>(stages + i % s.stages * kStage, a, group, pages[i]);
    commit_copies();
  };
  fetch_queries<kHead>(q, kRows, a, group, 0);
  for (int i = 0; i < ahead; ++i) fetch(i);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const bool changed = a.scores.changed();
  const float unit = changed ? 1.0f : a.scale, scale = unit * kLog2E;  // weights are powers of two
  float sums[kChannels / 8][4] = {}, most[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
#pragma unroll 1
  for (int i = 0; i < pages.count(); ++i) {
    if (ahead > 0) wait_copies_but(ahead - 1);
    __syncthreads();
    fetch(i + ahead);  // into the stage that was read last
    if (ahead == 0) {
      wait_copies<0>();
      __syncthreads();
    }
    const bf16* keys = stages + i % s.stages * kStage;
    const bf16* values = keys + kPage * kPitch;

    float scores[2][4] = {};  // 16 rows by 16 keys
#pragma unroll(kUnroll)
    for (int k16 = 0; k16 < kHead / 16; ++k16) {
      uint32_t x[4], k[4];
      load_matrices(x, q + lane % 16 * kPitch + k16 * 16 + lane / 16 * 8);
      load_matrices(k, keys + (warp * 16 + lane / 16 * 8 + lane % 8) * kPitch + k16 * 16 + lane / 8 % 2 * 8);
      mma_bf16(scores[0], x, k[0], k[1]);
      mma_bf16(scores[1], x, k[2], k[3]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = g + half * 8, position = group.offset + row / group.size;
      const Seen seen = seen_from(group, position);
      float largest = -INFINITY;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& score = scores[j / 2][2 * half + j % 2];
        const int key = pages[i] * kPage + warp * 16 + j / 2 * 8 + 2 * t + j % 2;
        if (!seen(key)) {
          score = -INFINITY;
        } else if (changed) {
          score = changed_score(a, score, group.kv_head * group.size + row % group.size, key - position);
        }
        largest = fmaxf(largest, score);
      }
      largest = quad_max(largest);
      if (t == 0) maxima[warp * kRows + row] = largest;
    }
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = g + half * 8;
      float largest = most[half];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, maxima[w * kRows + row]);
      const float base = largest == -INFINITY ? 0.0f : largest;  // no key seen so far
      const float keep = exp2_fast((most[half] - base) * scale);
      most[half] = largest;
      total[half] *= keep;
#pragma unroll
      for (int n = 0; n < kChannels / 8; ++n) {
        sums[n][2 * half] *= keep;
        sums[n][2 * half + 1] *= keep;
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float first = exp2_fast((scores[j][2 * half] - base) * scale);
        const float second = exp2_fast((scores[j][2 * half + 1] - base) * scale);
        total[half] += first + second;
        *reinterpret_cast<uint32_t*>(weights + row * kWeightPitch + warp * 16 + j * 8 + 2 * t) =
            pack_bf16(first, second);
      }
    }
    __syncthreads();
#pragma unroll(kUnroll)
    for (int k16 = 0; k16 < kPage / 16; ++k16) {
      uint32_t p[4];
      load_matrices(p, weights + lane % 16 * kWeightPitch + k16 * 16 + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < kChannels / 16; ++n) {
        uint32_t v[4];  // 16 channels by 16 keys
        load_matrices_transposed(
            v, values + (k16 * 16 + lane / 8 % 2 * 8 + lane % 8) * kPitch + warp * kChannels + n * 16 + lane / 16 * 8);
        mma_bf16(sums[2 * n], p, v[0], v[1]);
        mma_bf16(sums[2 * n + 1], p, v[2], v[3]);
      }
    }
  }

  // Sums of weights over the warps, in rising order.
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float own = quad_sum(total[half]);
    if (t == 0) maxima[warp * kRows + g + half * 8] = own;
  }
  __syncthreads();
  const int head = int(a.cache.head_size), record = head + 2;
  const int64_t group_index = int64_t(group.sequence) * a.cache.kv_heads + group.kv_head;
  float* partial = a.partial + group_index * gridDim.x * kRows * record;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = g + half * 8;
    if (row >= group.rows) continue;
    float whole = 0.0f;
    for (int w = 0; w < kWarps; ++w) whole += maxima[w * kRows + row];
    const float share = whole > 0.0f ? 1.0f / whole : 0.0f;
    const int64_t place = out_place(a, group, row);
    float* mine = partial + (split * kRows + row) * record;
#pragma unroll
    for (int n = 0; n < kChannels / 8; ++n) {
      const int channel = warp * kChannels + n * 8 + 2 * t;  // heads have a multiple of 8
      if (channel >= head) continue;
      if (alone) {
        store_pair(a.out, a.out_dtype, place + channel, sums[n][2 * half] * share, sums[n][2 * half + 1] * share);
      } else {
        store_pair(mine + channel, sums[n][2 * half], sums[n][2 * half + 1]);
      }
    }
    if (threadIdx.x % 32 % 4 != 0 || warp != 0) continue;
    if (alone) {
      store_lse(a, group, row, most[half], unit, whole);
    } else {
      mine[head] = most[half];
      mine[head + 1] = whole;
    }
  }
  if (alone) return;

  // The block whose ticket is the last sees what all others wrote: their fences come before their tickets.
  uint32_t* ticket = reinterpret_cast<uint32_t*>(weights);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *ticket = atomicAdd(a.tickets + group_index, 1u);
  __syncthreads();
  if (int(*ticket) + 1 != splits.count) return;
  __threadfence();
  for (int i = threadIdx.x; i < group.rows * head; i += kAttentionThreads) {
    const int row = i / head, channel = i % head;
    const Merged m =
        merge([&](int j) { return partial + (splits[j] * kRows + row) * record; }, splits.count, head, channel, scale);
    store(a.out, a.out_dtype, out_place(a, group, row) + channel, m.total > 0.0f ? m.value / m.total : 0.0f);
    if (channel == 0) store_lse(a, group, row, m.most, unit, m.total);
  }
  if (threadIdx.x == 0) a.tickets[group_index] = 0;
}

template <int kHead>
cudaError_t launch_split(const AttentionArgs& a, cudaStream_t stream) {
  const dim3 grid(unsigned((a.table_width + a.split_blocks - 1) / a.split_blocks), unsigned(a.cache.kv_heads),
                  unsigned(a.sequences));
  const auto bytes = [](int stages) {
    return int64_t(stages * 2 * kPage + kRows) * (kHead + 8) * 2 + kRows * kWeightPitch * 2 + kWarps * kRows * 4;
  };
  return launch_staged(split_attention_kernel<kHead>, a, grid, kStages, bytes, stream);
}

}  // namespace

cudaError_t split_attention(const AttentionArgs& args, cudaStream_t stream) {
  if (args.sequences == 0 || args.most_queries == 0) return cudaSuccess;
  if (!usable(args) || args.split_blocks <= 0 || args.most_queries * (args.heads / args.cache.kv_heads) > kSplitRows)
    return cudaErrorInvalidValue;
  const int64_t head = args.cache.head_size;
  if (head <= 64) return launch_split<64>(args, stream);
  if (head <= 128) return launch_split<128>(args, stream);
  return launch_split<256>(args, stream);
}

}  // namespace pyllm::cuda
