// Causal attention over the paged cache.
//
// A query row is one head of one token. For each key block of kKeyBlock keys, the row's (max, sum, weighted values)
// start from nothing and take in the block's pages of kBlockTokens keys one after the other, by an online softmax; key
// blocks are then merged in rising order. A score is one chain of multiply-adds over channels, a weighted value one
// chain over the visible keys, both in rising order. So a row's bits depend on its own keys only, and every way of
// cutting the work gives the same ones.
//
// A work item is a tile of query rows of one sequence, some key/value heads, and a range of key blocks. It walks pages
// outermost, then heads: a page's heads, each its keys and then its values, are one contiguous stream.
#include "cpu/attention_workspace.h"
#include "cpu/kernels/math.h"

namespace pyllm::PYLLM_ISA {
namespace {

using namespace simd;
using cpu::AttentionWorkspace;
using cpu::kTileRows;
using cpu::SequencePlan;

// Without it gcc 12 keeps the register tiles below in memory.
#define PYLLM_UNROLL _Pragma("GCC unroll 8")
// Inlined into one function, the tiles of all sizes would compete for registers.
#define PYLLM_NOINLINE __attribute__((noinline))

constexpr float kInfinity = __builtin_inff();

// Register tiles: query rows x vectors. bf16 needs registers for the second of a pair.
constexpr int kVectors = F::N == 16 ? 4 : 2;
constexpr int kMaxRows = 6, kMaxRowsBf16 = 4;
constexpr int kPageVectors = kBlockTokens / F::N;
constexpr int kGroupVectors = kKeyGroup / F::N;
// From here on arithmetic costs more than memory: a bf16 page is widened to float32 once for all rows, and nothing is
// fetched ahead.
constexpr int64_t kManyRows = 24;

int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Asks for V vectors' worth of T at `p`. Into the second level of cache: the first is full
// of what is being worked on.
template <int V, class T>
inline void prefetch(const T* p) {
  constexpr int64_t kLine = 64 / sizeof(T), kElements = V * F::N * int64_t(sizeof(float) / sizeof(T));
  PYLLM_UNROLL
  for (int64_t i = 0; i < kElements; i += kLine) __builtin_prefetch(p + i, 0, 2);
}

// Scores of R query rows against V vectors of a page's keys, from vector `first` on: p[r][kBlockTokens].
// `group` is the distance in elements between groups of kKeyGroup keys. While it works, what will be needed next is
// fetched from `ahead`, in order, if kAhead: the hardware does not guess it, for keys are read as several streams.
template <bool kAhead, int R, int V>
PYLLM_NOINLINE void scores(float* p, const float* q, int64_t q_stride, const float* keys, int64_t group,
                           int64_t channels, int first, const float* ahead) {
  F acc[R][V];
  const float* k[V];
  PYLLM_UNROLL
  for (int v = 0; v < V; ++v) k[v] = keys + (first + v) / kGroupVectors * group + (first + v) % kGroupVectors * F::N;
  PYLLM_UNROLL
  for (int r = 0; r < R; ++r) PYLLM_UNROLL
  for (int v = 0; v < V; ++v) acc[r][v] = zero();
  for (int64_t e = 0; e < channels; ++e) {
    if (kAhead) prefetch<V>(ahead + first * F::N * channels + e * V * F::N);
    F key[V];
    PYLLM_UNROLL
    for (int v = 0; v < V; ++v) key[v] = load(k[v] + e * kKeyGroup);
    PYLLM_UNROLL
    for (int r = 0; r < R; ++r) {
      const F query = set(q[r * q_stride + e]);
      PYLLM_UNROLL
      for (int v = 0; v < V; ++v) acc[r][v] = fma(query, key[v], acc[r][v]);
    }
  }
  PYLLM_UNROLL
  for (int r = 0; r < R; ++r) PYLLM_UNROLL
  for (int v = 0; v < V; ++v) store(p + r * kBlockTokens + (first + v) * F::N, acc[r][v]);
}

template <bool kAhead, int R, int V>
PYLLM_NOINLINE void scores(float* p, const float* q, int64_t q_stride, const uint16_t* keys, int64_t group,
                           int64_t channels, int first, const uint16_t* ahead) {
  F acc[R][V];
  const uint16_t* k[V];
  PYLLM_UNROLL
  for (int v = 0; v < V; ++v)
    k[v] = keys + (first + v) / kGroupVectors * group + (first + v) % kGroupVectors * (2 * F::N);
  PYLLM_UNROLL
  for (int r = 0; r < R; ++r) PYLLM_UNROLL
  for (int v = 0; v < V; ++v) acc[r][v] = zero();
  for (int64_t e = 0; e < channels; e += 2) {
    if (kAhead) prefetch<V>(ahead + first * F::N * channels + e * V * F::N);
    F even[V], odd[V];
    PYLLM_UNROLL
    for (int v = 0; v < V; ++v) load_bf16_pairs(k[v] + e * kKeyGroup, even[v], odd[v]);
    PYLLM_UNROLL
    for (int r = 0; r < R; ++r) {
      const F query = set(q[r * q_stride + e]);
      PYLLM_UNROLL
      for (int v = 0; v < V; ++v) acc[r][v] = fma(query, even[v], acc[r][v]);
    }
    PYLLM_UNROLL
    for (int r = 0; r < R; ++r) {
      const F query = set(q[r * q_stride + e + 1]);
      PYLLM_UNROLL
      for (int v = 0; v < V; ++v) acc[r][v] = fma(query, odd[v], acc[r][v]);
    }
  }
  PYLLM_UNROLL
  for (int r = 0; r < R; ++r) PYLLM_UNROLL
  for (int v = 0; v < V; ++v) store(p + r * kBlockTokens + (first + v) * F::N, acc[r][v]);
}

// o[r] += sum over tokens [begin, end) of p[r][token] * values[token], for R rows and V vectors of channels.
template <bool kAhead, int R, int V>
PYLLM_NOINLINE void weigh(float* o, int64_t o_stride, const float* p, const float* values, int64_t Ep, int64_t begin,
                          int64_t end, const float* ahead) {
  F acc[R][V];
  PYLLM_UNROLL
  for (int r = 0; r < R; ++r) PYLLM_UNROLL
  for (int v = 0; v < V; ++v) acc[r][v] = load(o + r * o_stride + v * F::N);
  for (int64_t j = begin; j < end; ++j) {
    if (kAhead) prefetch<V>(ahead + j * Ep);
    F value[V];
    PYLLM_UNROLL
    for (int v = 0; v < V; ++v) value[v] = load(values + j * Ep + v * F::N);
    PYLLM_UNROLL
    for (int r = 0; r < R; ++r) {
      const F weight = set(p[r * kBlockTokens + j]);
      PYLLM_UNROLL
      for (int v = 0; v < V; ++v) acc[r][v] = fma(weight, value[v], acc[r][v]);
    }
  }
  PYLLM_UNROLL
  for (int r = 0; r < R; ++r) PYLLM_UNROLL
  for (int v = 0; v < V; ++v) store(o + r * o_stride + v * F::N, acc[r][v]);
}

// acc[r] += weight[r * kBlockTokens] * value, for one token.
template <int R, int V>
inline __attribute__((always_inline)) void add_token(F (&acc)[R][V], const float* weight, const F (&value)[V]) {
  PYLLM_UNROLL
  for (int r = 0; r < R; ++r) {
    const F w = set(weight[r * kBlockTokens]);
    PYLLM_UNROLL
    for (int v = 0; v < V; ++v) acc[r][v] = fma(w, value[v], acc[r][v]);
  }
}

// A pair's other token may never have been written, so at odd ends only one of the two is used.
template <bool kAhead, int R, int V>
PYLLM_NOINLINE void weigh(float* o, int64_t o_stride, const float* p, const uint16_t* values, int64_t Ep, int64_t begin,
                          int64_t end, const uint16_t* ahead) {
  F acc[R][V];
  PYLLM_UNROLL
  for (int r = 0; r < R; ++r) PYLLM_UNROLL
  for (int v = 0; v < V; ++v) acc[r][v] = load(o + r * o_stride + v * F::N);
  const auto half_pair = [&](int64_t pair, bool second) __attribute__((always_inline)) {
    F value[V];
    PYLLM_UNROLL
    for (int v = 0; v < V; ++v) {
      F even, odd;
      load_bf16_pairs(values + pair * Ep + v * (2 * F::N), even, odd);
      value[v] = second ? odd : even;
    }
    add_token<R, V>(acc, p + pair + second, value);
  };
  if (begin % 2 != 0 && begin < end) half_pair(begin++ - 1, true);
  for (; begin + 2 <= end; begin += 2) {
    if (kAhead) prefetch<V>(ahead + begin * Ep);
    F even[V], odd[V];
    PYLLM_UNROLL
    for (int v = 0; v < V; ++v) load_bf16_pairs(values + begin * Ep + v * (2 * F::N), even[v], odd[v]);
    add_token<R, V>(acc, p + begin, even);
    add_token<R, V>(acc, p + begin + 1, odd);
  }
  if (begin < end) half_pair(begin, false);
  PYLLM_UNROLL
  for (int r = 0; r < R; ++r) PYLLM_UNROLL
  for (int v = 0; v < V; ++v) store(o + r * o_stride + v * F::N, acc[r][v]);
}

// Calls fn(tag) with tag.value = n, 1 <= n <= most, as a constant.
template <int n>
struct Constant {
  static constexpr int value = n;
};
template <int most, class Fn>
inline void with_constant(int n, const Fn& fn) {
  if constexpr (most > 1)
    if (n < most) return with_constant<most - 1>(n, fn);
  fn(Constant<most>{});
}

template <class T>
constexpr int max_rows() {
  return sizeof(T) == 2 ? kMaxRowsBf16 : kMaxRows;
}

// The two loops above over all vectors of keys [first, last), and of channels.
template <bool kAhead, class T>
void all_scores(int rows, float* p, const float* q, int64_t q_stride, const T* keys, int64_t group, int64_t channels,
                int first, int last, const T* ahead) {
  with_constant<max_rows<T>()>(rows, [&](auto r) {
    constexpr int R = decltype(r)::value;
    for (; first + kVectors <= last; first += kVectors)
      scores<kAhead, R, kVectors>(p, q, q_stride, keys, group, channels, first, ahead);
    if (first < last)
      with_constant<kVectors - 1>(last - first, [&](auto v) {
        scores<kAhead, R, decltype(v)::value>(p, q, q_stride, keys, group, channels, first, ahead);
      });
  });
}

template <bool kAhead, class T>
void all_values(int rows, float* o, const float* p, const T* values, int64_t Ep, int64_t begin, int64_t end,
                const T* ahead) {
  if (begin >= end) return;
  constexpr int64_t kPerToken = sizeof(T) == 2 ? 2 : 1;  // a pair's channel, or one token's
  with_constant<max_rows<T>()>(rows, [&](auto r) {
    constexpr int R = decltype(r)::value;
    int64_t e = 0;
    for (; e + kVectors * F::N <= Ep; e += kVectors * F::N)
      weigh<kAhead, R, kVectors>(o + e, Ep, p, values + e * kPerToken, Ep, begin, end, ahead + e * kPerToken);
    if (e < Ep)
      with_constant<kVectors - 1>(int(Ep - e) / F::N, [&](auto v) {
        weigh<kAhead, R, decltype(v)::value>(o + e, Ep, p, values + e * kPerToken, Ep, begin, end,
                                             ahead + e * kPerToken);
      });
  });
}

// A page of one head, widened to float32 in float32's layout: keys, and the values of tokens [begin, end) and their
// pairs.
void widen_page(float* keys, float* values, const uint16_t* page, int64_t Ep, int64_t begin, int64_t end) {
  const int64_t half = kBlockTokens * Ep;
  for (int64_t i = 0; i < half; i += 2 * kKeyGroup) {  // [group][channel pair][16 keys][2]
    for (int64_t j = 0; j < kKeyGroup; j += F::N) {
      F even, odd;
      load_bf16_pairs(page + i + 2 * j, even, odd);
      store(keys + i + j, even);
      store(keys + i + kKeyGroup + j, odd);
    }
  }
  for (int64_t t = begin / 2 * 2; t < end; t += 2) {
    for (int64_t e = 0; e < Ep; e += F::N) {
      F even, odd;
      load_bf16_pairs(page + half + t * Ep + 2 * e, even, odd);
      store(values + t * Ep + e, even);
      store(values + (t + 1) * Ep + e, odd);
    }
  }
}

// The same of an i8 page, whose scales stand behind its keys and its values.
void widen_page(float* keys, float* values, const int8_t* page, int64_t Ep, int64_t begin, int64_t end) {
  const int64_t numbers = kBlockTokens * Ep, half = numbers + 2 * kBlockTokens;
  const auto* key_scales = reinterpret_cast<const uint16_t*>(page + numbers);
  const auto* value_scales = reinterpret_cast<const uint16_t*>(page + half + numbers);
  for (int64_t t = 0; t < kBlockTokens; t += F::N) {
    const F scale = load_bf16(key_scales + t);
    const int64_t from = t / kKeyGroup * kKeyGroup * Ep, lane = t % kKeyGroup;
    for (int64_t i = from; i < from + kKeyGroup * Ep; i += 2 * kKeyGroup) {
      F even, odd;
      load_i8_pairs(page + i + 2 * lane, even, odd);
      store(keys + i + lane, even * scale);
      store(keys + i + kKeyGroup + lane, odd * scale);
    }
  }
  alignas(64) float scales[kBlockTokens];
  for (int64_t t = 0; t < kBlockTokens; t += F::N) store(scales + t, load_bf16(value_scales + t));
  for (int64_t t = begin / 2 * 2; t < end; t += 2) {
    const F first = set(scales[t]), second = set(scales[t + 1]);
    for (int64_t e = 0; e < Ep; e += F::N) {
      F even, odd;
      load_i8_pairs(page + half + t * Ep + 2 * e, even, odd);
      store(values + t * Ep + e, even * first);
      store(values + (t + 1) * Ep + e, odd * second);
    }
  }
}

// e^x for x <= 0, and 0 where it is below 1.7e-38: beside a largest weight of 1 that is nothing, and denormals are
// slow.
inline F weight_of(F x) {
  const F least = set(-87.0f);
  return select_gt(least, x, zero(), exp(simd::max(least, x)));
}

// A thread's scratch. Rows are those of the item's first head, then those of its second, and so on.
struct Scratch {
  float* q;      // [rows][Ep] scaled
  float* o;      // [rows][Ep] of the current key block
  float* total;  // [rows][Ep] merged so far
  float* lanes;  // [rows][kSumLanes] of the current key block's sum
  float* max;    // [rows] of the current key block
  float* total_max;
  float* total_sum;
  int64_t* first;  // [rows] visible keys
  int64_t* last;
  float* keys;  // a widened page of one head
  float* values;
};

Scratch scratch_of(float* memory, int64_t Ep) {
  Scratch s;
  s.q = memory;
  s.o = s.q + kTileRows * Ep;
  s.total = s.o + kTileRows * Ep;
  s.lanes = s.total + kTileRows * Ep;
  s.max = s.lanes + kTileRows * cpu::kSumLanes;
  s.total_max = s.max + kTileRows;
  s.total_sum = s.total_max + kTileRows;
  s.first = reinterpret_cast<int64_t*>(s.total_sum + 2 * kTileRows);
  s.last = s.first + kTileRows;
  s.keys = memory + kTileRows * (3 * Ep + cpu::kSumLanes + cpu::kRowVectors);
  s.values = s.keys + kBlockTokens * Ep;
  return s;
}

// (max, sum, o) <- itself merged with the next key block's.
inline void merge(float& max, float& sum, float* o, float block_max, float block_sum, const float* block_o,
                  int64_t Ep) {
  const float both = max > block_max ? max : block_max;
  const F a = weight_of(set(max - both)), b = weight_of(set(block_max - both));
  alignas(64) float lane[2][F::N];
  store(lane[0], a);
  store(lane[1], b);
  sum = sum * lane[0][0] + block_sum * lane[1][0];
  max = both;
  for (int64_t e = 0; e < Ep; e += F::N) store(o + e, fma(load(block_o + e), b, load(o + e) * a));
}

// out = o / sum. Adding zero turns a -0 into 0.
inline void finish(float* out, const float* o, float sum, int64_t E) {
  const F s = set(sum);
  int64_t e = 0;
  for (; e + F::N <= E; e += F::N) store(out + e, load(o + e) / s + zero());
  if (e < E) store_n(out + e, load(o + e) / s + zero(), int(E - e));
}

// A work item.
struct Item {
  int64_t sequence;
  int64_t row, rows;            // query rows of a head: row / group is the token, row % group the head of the group
  int64_t head, heads;          // key/value heads
  int64_t first_key, last_key;  // whole key blocks, or the end of what is visible
  bool split;
};

class Attention {
 public:
  Attention(const AttentionArgs& args, const AttentionWorkspace& workspace)
      : a(args),
        w(workspace),
        E(args.cache.head_size),
        Ep(args.cache.padded_head()),
        channels(args.cache.dtype == DType::f32 ? E : round_up(E, 2)),
        group(args.heads / args.cache.kv_heads),
        plans(static_cast<SequencePlan*>(args.workspace)),
        partials(reinterpret_cast<float*>(static_cast<char*>(args.workspace) + workspace.plan_bytes)),
        threads(reinterpret_cast<float*>(static_cast<char*>(args.workspace) + workspace.plan_bytes +
                                         workspace.partial_bytes)) {}

  void run(Parallel& pool) {
    make_plans(pool.threads());
    parallel_for(pool, plans[a.sequences].first_item,
                 [&](int64_t i, int worker) { attend(item(i), threads + worker * w.thread_floats); });
    parallel_for(pool, plans[a.sequences].first_row * a.cache.kv_heads, [&](int64_t i, int) { merge_partials(i); });
  }

 private:
  int64_t rows_of(int64_t b) const { return int64_t(a.starts[b + 1]) - a.starts[b]; }
  int64_t position(int64_t b, int64_t token) const { return a.lengths[b] - rows_of(b) + token; }
  int64_t first_key(int64_t position) const { return a.window > 0 ? max_of(0, position - a.window + 1) : 0; }

  // Query rows that fit into a tile, as whole heads where a sequence has few rows: heads of one item.
  int64_t heads_per_tile(int64_t b) const {
    const int64_t rows = rows_of(b) * group;
    return rows >= kTileRows ? 1 : min_of(a.cache.kv_heads, kTileRows / rows);
  }

  // Sequences are cut so that no item is more than a quarter of a thread's share: first over key blocks, as long as
  // there is room for partial results, then over heads.
  void make_plans(int64_t thread_count) {
    const int64_t G = a.cache.kv_heads;
    int64_t work = 0;
    for (int64_t b = 0; b < a.sequences; ++b) {
      SequencePlan& p = plans[b];
      const int64_t n = rows_of(b);
      p.first_block = n > 0 ? first_key(position(b, 0)) / kKeyBlock : 0;
      p.blocks = n > 0 ? (a.lengths[b] - 1) / kKeyBlock + 1 - p.first_block : 0;
      work += p.blocks * n * a.heads;
    }
    const int64_t share = max_of(1, work / (4 * thread_count));
    int64_t items = 0, slots = 0, merged_rows = 0;
    for (int64_t b = 0; b < a.sequences; ++b) {
      SequencePlan& p = plans[b];
      const int64_t n = rows_of(b);
      p.first_item = items;
      p.first_slot = slots;
      p.first_row = merged_rows;
      p.split = false;
      if (n == 0) continue;
      const int64_t heads = heads_per_tile(b), tile_rows = min_of(kTileRows, n * group);
      p.tiles = divide_up(n * group, kTileRows);
      const int64_t cost = tile_rows * heads * p.blocks;
      p.split = thread_count > 1 && p.blocks > 1 && cost > share && slots + n * p.blocks <= w.slots;
      const int64_t item_cost = p.split ? tile_rows * heads : cost;
      p.pieces = divide_up(G, heads);
      if (thread_count > 1 && item_cost > share) p.pieces = min_of(G, p.pieces * divide_up(item_cost, share));
      items += p.tiles * p.pieces * (p.split ? p.blocks : 1);
      if (p.split) {
        slots += n * p.blocks;
        merged_rows += n;
      }
    }
    plans[a.sequences].first_item = items;
    plans[a.sequences].first_row = merged_rows;
  }

  // The sequence that holds item or merged row i.
  template <class First>
  int64_t find(int64_t i, First first) const {
    int64_t low = 0, high = a.sequences;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first(plans[middle]) <= i ? low : high) = middle;
    }
    return low;
  }

  Item item(int64_t i) const {
    Item t;
    t.sequence = find(i, [](const SequencePlan& p) { return p.first_item; });
    const SequencePlan& p = plans[t.sequence];
    i -= p.first_item;
    const int64_t tile = i % p.tiles, piece = i / p.tiles % p.pieces, block = i / p.tiles / p.pieces;
    t.row = tile * kTileRows;
    t.rows = min_of(kTileRows, rows_of(t.sequence) * group - t.row);
    t.head = piece * a.cache.kv_heads / p.pieces;
    t.heads = (piece + 1) * a.cache.kv_heads / p.pieces - t.head;
    t.split = p.split;
    t.first_key = (p.first_block + block) * kKeyBlock;
    t.last_key = p.split ? t.first_key + kKeyBlock : a.lengths[t.sequence];
    return t;
  }

  void attend(const Item& t, float* memory) const {
    const Scratch s = scratch_of(memory, Ep);
    const int64_t rows = t.rows * t.heads;
    const F scale = set(a.scale);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = t.row + i % t.rows, token = row / group;
      const float* q = query(t, i);
      int64_t e = 0;
      for (; e + F::N <= E; e += F::N) store(s.q + i * Ep + e, load(q + e) * scale);
      if (e < E) store(s.q + i * Ep + e, load_n(q + e, int(E - e)) * scale);
      const int64_t p = position(t.sequence, token);
      s.first[i] = first_key(p);
      s.last[i] = p + 1;
      s.total_max[i] = -kInfinity;
      s.total_sum[i] = 0;
    }
    std::memset(s.total, 0, size_t(rows * Ep) * sizeof(float));
    const int64_t begin = max_of(t.first_key, s.first[0]), end = min_of(t.last_key, s.last[rows - 1]);
    for (int64_t key = begin / kKeyBlock * kKeyBlock; key < end; key += kKeyBlock) {
      for (int64_t i = 0; i < rows; ++i) s.max[i] = -kInfinity;
      std::memset(s.lanes, 0, size_t(rows) * cpu::kSumLanes * sizeof(float));
      std::memset(s.o, 0, size_t(rows * Ep) * sizeof(float));
      const int64_t last_page = min_of(end, key + kKeyBlock);
      for (int64_t page = max_of(key, begin) / kBlockTokens * kBlockTokens; page < last_page; page += kBlockTokens) {
        if (a.cache.dtype == DType::f32)
          attend_page<float>(t, s, page, end);
        else if (a.cache.dtype == DType::bf16)
          attend_page<uint16_t>(t, s, page, end);
        else
          attend_page<int8_t>(t, s, page, end);
      }
      for (int64_t i = 0; i < rows; ++i) end_block(t, s, i, key);
    }
    if (t.split) return;
    for (int64_t i = 0; i < rows; ++i) finish(output(t, i), s.total + i * Ep, s.total_sum[i], E);
  }

  const float* query(const Item& t, int64_t i) const {
    const int64_t row = t.row + i % t.rows, head = (t.head + i / t.rows) * group + row % group;
    return a.q + (a.starts[t.sequence] + row / group) * a.q_stride + head * E;
  }
  float* output(const Item& t, int64_t i) const {
    const int64_t row = t.row + i % t.rows, head = (t.head + i / t.rows) * group + row % group;
    return a.out + (a.starts[t.sequence] + row / group) * a.out_stride + head * E;
  }
  float* partial(int64_t sequence, int64_t token, int64_t block, int64_t head) const {
    const SequencePlan& p = plans[sequence];
    const int64_t slot = p.first_slot + token * p.blocks + block - p.first_block;
    return partials + (slot * a.heads + head) * w.slot_floats;
  }

  // Where one head's part of a page begins, in elements.
  int64_t page_of(const Item& t, int64_t key, int64_t head) const {
    const int64_t block = a.tables[t.sequence * a.table_width + key / kBlockTokens];
    return block * a.cache.block_elements() + (t.head + head) * a.cache.head_elements();
  }

  // Takes in the keys [key, key + kBlockTokens) for all heads and rows of an item; `end` is where its keys end.
  template <class T>
  void attend_page(const Item& t, const Scratch& s, int64_t key, int64_t end) const {
    const T* data = static_cast<const T*>(a.cache.data);
    const int64_t half = a.cache.half_elements(), key_group = kKeyGroup * (sizeof(T) == 4 ? E : Ep);
    const int64_t next_page =
        key + kBlockTokens < end ? page_of(t, key + kBlockTokens, 0) : page_of(t, key, t.heads - 1);
    for (int64_t h = 0; h < t.heads; ++h) {
      const T* page = data + page_of(t, key, h);
      const int64_t row = h * t.rows;
      if constexpr (sizeof(T) == 1) {
        attend_widened(t, s, row, key, page, key_group);
      } else if (t.rows < kManyRows) {
        const T* next = h + 1 < t.heads ? page + a.cache.head_elements() : data + next_page;
        attend_rows<true>(s, row, t.rows, key, page, page + half, key_group, next, next + half);
      } else if constexpr (sizeof(T) == 2) {
        attend_widened(t, s, row, key, page, key_group);
      } else {
        attend_rows<false>(s, row, t.rows, key, page, page + half, key_group, page, page);
      }
    }
  }

  template <class T>
  void attend_widened(const Item& t, const Scratch& s, int64_t row, int64_t key, const T* page,
                      int64_t key_group) const {
    const int64_t low = max_of(0, s.first[row] - key), high = min_of(kBlockTokens, s.last[row + t.rows - 1] - key);
    widen_page(s.keys, s.values, page, Ep, low, high);
    attend_rows<false, float>(s, row, t.rows, key, s.keys, s.values, key_group, s.keys, s.values);
  }

  // One head's page for its rows, as many at a time as the registers hold.
  template <bool kAhead, class T>
  void attend_rows(const Scratch& s, int64_t row, int64_t rows, int64_t key, const T* keys, const T* values,
                   int64_t key_group, const T* next_keys, const T* next_values) const {
    const int64_t strips = divide_up(rows, max_rows<T>());
    alignas(64) float p[kMaxRows * kBlockTokens];
    for (int64_t i = 0; i < strips; ++i) {
      const int64_t begin = row + rows * i / strips, count = row + rows * (i + 1) / strips - begin;
      // Places in the page that the strip's first and last row see; both ends rise from row to row.
      const int64_t low = max_of(0, s.first[begin] - key), high = min_of(kBlockTokens, s.last[begin + count - 1] - key);
      if (low >= high) continue;
      const int first = int(low / F::N), last = int(divide_up(high, F::N));
      all_scores<kAhead>(int(count), p, s.q + begin * Ep, Ep, keys, key_group, channels, first, last, next_keys);
      int64_t all_first = 0, all_last = kBlockTokens;  // what every row sees
      for (int64_t r = 0; r < count; ++r) {
        const int64_t b = max_of(0, s.first[begin + r] - key), e = min_of(kBlockTokens, s.last[begin + r] - key);
        all_first = max_of(all_first, b);
        all_last = min_of(all_last, e);
        if (b < e) weights(s, begin + r, p + r * kBlockTokens, b, e, first, last);
      }
      const auto one_by_one = [&](int64_t from, int64_t to) {
        for (int64_t r = 0; r < count; ++r)
          all_values<false>(1, s.o + (begin + r) * Ep, p + r * kBlockTokens, values, Ep,
                            max_of(from, s.first[begin + r] - key), min_of(to, s.last[begin + r] - key), values);
      };
      if (all_first >= all_last) {
        one_by_one(0, kBlockTokens);
      } else {
        one_by_one(0, all_first);
        all_values<kAhead>(int(count), s.o + begin * Ep, p, values, Ep, all_first, all_last, next_values);
        one_by_one(all_last, kBlockTokens);
      }
    }
  }

  // Turns a row's scores into weights, p[j] = e^(p[j] - max) for the places [begin, end) it sees and 0 for the others
  // of vectors [first, last), and rescales what it has gathered in this key block to the new max.
  void weights(const Scratch& s, int64_t row, float* p, int64_t begin, int64_t end, int first, int last) const {
    alignas(64) static const float kPlaces[kBlockTokens] = {
        0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
        22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
        44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
    const F hidden = set(-kInfinity);
    if (begin > first * F::N || end < last * F::N) {
      const F b = set(float(begin) - 0.5f), e = set(float(end) - 0.5f);
      for (int v = first; v < last; ++v) {
        const F place = load(kPlaces + v * F::N);
        store(p + v * F::N, select_gt(place, b, select_gt(e, place, load(p + v * F::N), hidden), hidden));
      }
    }
    F largest = hidden;
    for (int v = first; v < last; ++v) largest = simd::max(largest, load(p + v * F::N));
    const float old = s.max[row], page_max = simd::max(largest);
    const float now = old > page_max ? old : page_max;
    s.max[row] = now;
    float* lanes = s.lanes + row * cpu::kSumLanes;
    F sum = load(lanes);
    if (now != old) {
      const F shrink = weight_of(set(old - now));
      sum = sum * shrink;
      float* o = s.o + row * Ep;
      for (int64_t e = 0; e < Ep; e += F::N) store(o + e, load(o + e) * shrink);
    }
    const F m = set(now);
    for (int v = first; v < last; ++v) {
      const F weight = weight_of(load(p + v * F::N) - m);
      store(p + v * F::N, weight);
      sum = sum + weight;
    }
    store(lanes, sum);
  }

  // Row i of an item has taken in the pages of the key block that starts at `key`.
  void end_block(const Item& t, const Scratch& s, int64_t i, int64_t key) const {
    if (s.first[i] >= key + kKeyBlock || s.last[i] <= key) return;
    const float sum = simd::sum(load(s.lanes + i * cpu::kSumLanes));
    const float* o = s.o + i * Ep;
    if (!t.split) {
      merge(s.total_max[i], s.total_sum[i], s.total + i * Ep, s.max[i], sum, o, Ep);
      return;
    }
    const int64_t row = t.row + i % t.rows, head = (t.head + i / t.rows) * group + row % group;
    float* slot = partial(t.sequence, row / group, key / kKeyBlock, head);
    slot[0] = s.max[i];
    slot[1] = sum;
    std::memcpy(slot + cpu::kPartialHeader, o, size_t(Ep) * sizeof(float));
  }

  // The heads of one group of one row whose key blocks went to different items.
  void merge_partials(int64_t i) const {
    const int64_t merged_row = i / a.cache.kv_heads, g = i % a.cache.kv_heads;
    const int64_t b = find(merged_row, [](const SequencePlan& p) { return p.first_row; });
    const int64_t token = merged_row - plans[b].first_row, p = position(b, token);
    alignas(64) float total[kMaxHead];
    for (int64_t head = g * group; head < (g + 1) * group; ++head) {
      float max = -kInfinity, sum = 0;
      std::memset(total, 0, size_t(Ep) * sizeof(float));
      for (int64_t block = first_key(p) / kKeyBlock; block <= p / kKeyBlock; ++block) {
        const float* slot = partial(b, token, block, head);
        merge(max, sum, total, slot[0], slot[1], slot + cpu::kPartialHeader, Ep);
      }
      finish(a.out + (a.starts[b] + token) * a.out_stride + head * E, total, sum, E);
    }
  }

  const AttentionArgs& a;
  const AttentionWorkspace& w;
  const int64_t E, Ep, channels, group;
  SequencePlan* plans;
  float* partials;
  float* threads;
};

}  // namespace

void attention(const AttentionArgs& a, Parallel& pool) {
  const AttentionWorkspace workspace = cpu::attention_workspace(a, pool.threads());
  Attention(a, workspace).run(pool);
}

}  // namespace pyllm::PYLLM_ISA
