// Attention of prompts on Hopper by wgmma and TMA with an online softmax (Shah et al.: FlashAttention-3, 2024). A block takes 128 rows; of
// its three warpgroups the first brings keys and values, two pages of the cache at a time, and the two others take 64 rows each. The
// scores of the next keys are under way while the last ones' weights meet their values.
//
// In shared memory, from a multiple of 1,024 bytes on, boxes of rows of 64 channels, 16-byte piece c of row r at c ^ (r % 8): queries [2
// warpgroups][channels / 64][64 rows] | keys [stages][channels / 64][128] | values [stages][channels / 64][128] | barriers.
#include "cuda/attention.cuh"
#include "cuda/hopper.cuh"
#include "cuda/tensor_map.h"

namespace pyllm::cuda {
namespace {

constexpr int kGroupThreads = 128, kAttending = 2, kThreads = (1 + kAttending) * kGroupThreads;
constexpr int kRows = kAttending * 64, kPages = 2, kKeys = kPages * kPage, kBox = 64;  // channels of a box
template <int kHead>
constexpr int kStages = kHead == 128 ? 2 : 4;
template <int kHead>
constexpr int kStage = kKeys * kHead;  // elements of the keys, and of the values, of a stage
template <int kHead>
constexpr int kSharedBytes =
    1024 + (kRows * kHead + 2 * kStages<kHead> * kStage<kHead>)*2 + 4 * kStages<kHead> * int(sizeof(Barrier));

struct Wgmma {
  CUtensorMap cache;  // rows of channels, in boxes of a page's rows by 64
  AttentionArgs a;
};

// The barriers of the keys or of the values.
struct Ring {
  bf16* stages;
  Barrier *full, *empty;
};

// Queries of this warpgroup as bf16, zeros past the last row.
template <int kHead>
__device__ __forceinline__ void load_queries(bf16* to, const AttentionArgs& a, const Group& g, int row0) {
#pragma unroll 1
  for (int i = threadIdx.x % kGroupThreads; i < 64 * (kHead / 8); i += kGroupThreads) {
    const int r = i / (kHead / 8), c = i % (kHead / 8), row = row0 + r;
    uint4 piece{0, 0, 0, 0};
    if (row < g.rows) {
      const int64_t from = (g.start + row / g.size) * a.q_stride + (g.kv_head * g.size + row % g.size) * kHead + c * 8;
      if (a.q_dtype == DType::bf16) {
        piece = *reinterpret_cast<const uint4*>(static_cast<const bf16*>(a.q) + from);
      } else {
        const float* q = static_cast<const float*>(a.q) + from;
        piece = uint4{pack_bf16(q[0], q[1]), pack_bf16(q[2], q[3]), pack_bf16(q[4], q[5]), pack_bf16(q[6], q[7])};
      }
    }
    *reinterpret_cast<uint4*>(to + (c / 8 * 64 + r) * kBox + (c % 8 ^ r % 8) * 8) = piece;
  }
}

template <int kHead>
struct Attention {
  const Wgmma& s;
  const Group group;
  const Pages pages;
  int row0, steps;
  bf16* queries;
  Ring keys, values;

  // One thread brings the pages of step after step.
  __device__ __forceinline__ void bring() const {
    for (int i = 0; i < steps; ++i) {
      bring(keys, i, 0);
      bring(values, i, 1);
    }
  }
  __device__ __forceinline__ void bring(const Ring& ring, int i, int part) const {
    const int stage = i % kStages<kHead>, count = pages.count() - i * kPages < kPages ? 1 : kPages;
    Barrier* landed = ring.full + stage;
    wait_for_phase(ring.empty + stage, i / kStages<kHead> % 2 ^ 1);
    arrive_expecting(landed, count * kPage * kHead * 2);
    for (int p = 0; p < count; ++p) {
      const int block = s.a.tables[group.sequence * s.a.table_width + pages[i * kPages + p]];
      const int row = ((block * int(s.a.cache.kv_heads) + group.kv_head) * 2 + part) * kPage;
      for (int c = 0; c < kHead / kBox; ++c)
        load_box(ring.stages + stage * kStage<kHead> + (c * kKeys + p * kPage) * kBox, &s.cache, c * kBox, row, landed);
    }
  }

  // A stage, once it is full; and said to be empty again.
  __device__ __forceinline__ bf16* full(const Ring& ring, int i) const {
    wait_for_phase(ring.full + i % kStages<kHead>, i / kStages<kHead> % 2);
    return ring.stages + i % kStages<kHead> * kStage<kHead>;
  }
  __device__ __forceinline__ void release(const Ring& ring, int i) const {
    if (threadIdx.x % kGroupThreads == 0) arrive_at(ring.empty + i % kStages<kHead>, 0);
  }

  // Keys of page p of a step that have been written.
  __device__ __forceinline__ int written(int i, int p) const {
    if (i * kPages + p >= pages.count()) return 0;
    const int left = group.length - pages[i * kPages + p] * kPage;
    return left < kPage ? left : kPage;
  }

  __device__ __forceinline__ void attend() const {
    const AttentionArgs& a = s.a;
    const int member = threadIdx.x / kGroupThreads - 1, lane = threadIdx.x % 32;
    bf16* q = queries + member * 64 * kHead;
    load_queries<kHead>(q, a, group, row0 + member * 64);
    publish_writes();
    meet_threads(1 + member, kGroupThreads);

    int rows[2], positions[2], heads[2];
    Seen seen[2];
    for (int half = 0; half < 2; ++half) {
      rows[half] = row0 + member * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4 + half * 8;
      positions[half] = group.offset + rows[half] / group.size;
      heads[half] = group.kv_head * group.size + rows[half] % group.size;
      seen[half] = seen_from(group, positions[half]);
    }
    const bool changed = a.scores.changed();
    const float unit = changed ? 1.0f : a.scale;
    // All rows see the keys from `low` to `high`.
    const int low = seen_from(group, group.offset + (row0 + kRows - 1) / group.size).low;
    const int high = seen_from(group, group.offset + row0 / group.size).high;

    float scores[kKeys / 8][4], sums[kHead / 8][4] = {};
    uint32_t weights[kKeys / 16][4];
    Softmax softmax;
    // Makes weights of the scores of step i.
    const auto weigh = [&](int i, float (&keep)[2]) {
#pragma unroll
      for (int p = 0; p < kPages; ++p) {
        const int first = written(i, p) > 0 ? pages[i * kPages + p] * kPage : -1;
        if (changed) {
          const int key = first + lane % 4 * 2, distances[2] = {key - positions[0], key - positions[1]};
          change_scores<kPage / 2>(a, [&](int j) -> float& { return scores[p * 8 + j / 4][j % 4]; }, heads, distances);
        }
        if (first >= 0 && first >= low && first + kPage <= high) continue;
#pragma unroll
        for (int j = 0; j < kPage / 2; ++j)
          if (first < 0 || !seen[j % 4 / 2](first + j / 4 * 8 + lane % 4 * 2 + j % 2))
            scores[p * 8 + j / 4][j % 4] = -INFINITY;
      }
      take_scores(softmax, keep, scores, unit * kLog2E);
    };
    const auto pack = [&] {
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j)  // sums of two tiles of 8 keys are, rounded, an operand of 16 keys
#pragma unroll
        for (int r = 0; r < 4; ++r)
          weights[j][r] = pack_bf16(scores[2 * j + r / 2][r % 2 * 2], scores[2 * j + r / 2][r % 2 * 2 + 1]);
    };

#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      float keep[2];
      const bf16* v = i > 0 ? written_values(i - 1) : nullptr;
      multiply_keys(scores, q, full(keys, i));
      if (i > 0) {
        multiply_values(sums, weights, v);
        wgmma_wait<1>();
      } else {
        wgmma_wait<0>();
      }
      wgmma_settle(scores);
      release(keys, i);
      weigh(i, keep);
      wgmma_wait<0>();
      wgmma_settle(sums);
      if (i > 0) release(values, i - 1);
      keep_sums(sums, keep);
      pack();
    }
    if (steps > 0) {
      multiply_values(sums, weights, written_values(steps - 1));
      wgmma_wait<0>();
      wgmma_settle(sums);
    }
    store_rows(a, group, rows, sums, softmax, unit);
  }

  __device__ __forceinline__ static void multiply_keys(float (&scores)[kKeys / 8][4], const bf16* q, const bf16* k) {
    wgmma_begin();
#pragma unroll
    for (int k16 = 0; k16 < kHead / 16; ++k16)
      wgmma<kKeys>(scores, operand(q + k16 / 4 * 64 * kBox) + k16 % 4 * 2,
                   operand(k + k16 / 4 * kKeys * kBox) + k16 % 4 * 2, k16 > 0);
    wgmma_commit();
  }

  __device__ __forceinline__ static void multiply_values(float (&sums)[kHead / 8][4],
                                                         const uint32_t (&weights)[kKeys / 16][4], const bf16* v) {
    wgmma_begin();
#pragma unroll
    for (int k16 = 0; k16 < kKeys / 16; ++k16)
      wgmma_of_rows<kHead>(sums, weights[k16], operand_by_columns(v + k16 * 16 * kBox, kKeys * kBox * 2));
    wgmma_commit();
  }

  // The values of a step, zeros where no key has been written: there may be anything, of which weights of 0 would not make 0.
  __device__ __forceinline__ const bf16* written_values(int i) const {
    bf16* v = full(values, i);
    if (written(i, 0) == kPage && written(i, 1) == kPage) return v;
    for (int j = int(threadIdx.x) - kGroupThreads; j < kKeys * kHead / 8; j += kAttending * kGroupThreads) {
      const int key = j / 8 % kKeys;
      if (key % kPage >= written(i, key / kPage)) *reinterpret_cast<uint4*>(v + j * 8) = uint4{0, 0, 0, 0};
    }
    publish_writes();
    meet_threads(1 + kAttending, kAttending * kGroupThreads);
    return v;
  }
};

template <int kHead>
__global__ void __launch_bounds__(kThreads, 1) wgmma_attention_kernel(const __grid_constant__ Wgmma s) {
  unsigned char* base = shared_memory() + (1024 - shared_address(shared_memory()) % 1024) % 1024;
  bf16* queries = reinterpret_cast<bf16*>(base);
  bf16* stages = queries + kRows * kHead;
  Barrier* barriers = reinterpret_cast<Barrier*>(stages + 2 * kStages<kHead> * kStage<kHead>);
  const Ring keys{stages, barriers, barriers + kStages<kHead>};
  const Ring values{stages + kStages<kHead> * kStage<kHead>, barriers + 2 * kStages<kHead>,
                    barriers + 3 * kStages<kHead>};
  if (threadIdx.x == 0) {
    prefetch_map(&s.cache);
    for (int i = 0; i < kStages<kHead>; ++i) {
      make_barrier(keys.full + i, 1);
      make_barrier(values.full + i, 1);
      make_barrier(keys.empty + i, kAttending);
      make_barrier(values.empty + i, kAttending);
    }
    publish_barriers();
  }
  __syncthreads();
  wait_for_earlier_kernels();
  let_later_kernels_start();
  const Group group = find_group(s.a, blockIdx.z, blockIdx.y);
  // The last rows of a sequence have the most keys: they start first.
  const int row0 = int(gridDim.x - 1 - blockIdx.x) * kRows;
  if (row0 >= group.rows) return;
  const Pages pages = find_pages(group, row0, row0 + kRows < group.rows ? row0 + kRows : group.rows);
  const Attention<kHead> attention{s, group, pages, row0, (pages.count() + kPages - 1) / kPages, queries, keys, values};
  if (threadIdx.x < kGroupThreads) {
    keep_registers<40>();
    if (threadIdx.x == 0) attention.bring();
  } else {
    take_registers<232>();
    attention.attend();
  }
}

template <int kHead>
cudaError_t launch_attention(const AttentionArgs& a, cudaStream_t stream) {
  Wgmma s{};
  s.a = a;
  const int64_t cache_rows = a.cache.blocks * a.cache.kv_heads * 2 * kPage;
  const cudaError_t error = make_tensor_map(&s.cache, a.cache.data, cache_rows, kHead, kHead, kPage);
  if (error != cudaSuccess) return error;
  const int64_t rows = a.most_queries * (a.heads / a.cache.kv_heads);
  const dim3 grid(unsigned((rows + kRows - 1) / kRows), unsigned(a.cache.kv_heads), unsigned(a.sequences));
  return launch(wgmma_attention_kernel<kHead>, s, grid, kThreads, kSharedBytes<kHead>, stream);
}

}  // namespace

cudaError_t wgmma_attention(const AttentionArgs& args, cudaStream_t stream) {
  if (args.sequences == 0 || args.most_queries == 0) return cudaSuccess;
  bool yes = false;
  const cudaError_t error = has_wgmma(&yes);
  if (error != cudaSuccess) return error;
  if (!yes) return cudaErrorNotSupported;
  const int64_t head = args.cache.head_size;
  if (!usable(args) || (head != 64 && head != 128) || args.cache.blocks * args.cache.kv_heads > kMaxWgmmaBlocks)
    return cudaErrorInvalidValue;
  return head == 64 ? launch_attention<64>(args, stream) : launch_attention<128>(args, stream);
}

}  // namespace pyllm::cuda
