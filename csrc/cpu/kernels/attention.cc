// Attention over the paged cache.
//
// A query row is one head of one token. For each key block of kKeyBlock keys, the row's (max, sum, weighted values)
// start from nothing and take in the block's pages of kBlockTokens keys one after the other, by an online softmax; key
// blocks are then merged in rising order. A score is one chain of steps over channels, a weighted value one chain over
// keys, both in rising order. So a row's bits depend on its own keys only, and every way of cutting the work gives the
// same ones.
//
// An item walks pages outermost, then heads: a page's heads, each its keys and then its values, are one contiguous
// stream. Queries and weights are rounded to bf16 where the cache is bf16 and is multiplied as such; elsewhere the
// cache is widened. Where the cache is i8 they are rounded to 16-bit integers, queries by the largest of their row,
// weights, times the values' scales, by the largest of their row and page: both products are sums of integers, exact.
#include <math.h>

#include <type_traits>

#include "cpu/kernels/attention_amx.h"
#include "cpu/kernels/attention_page.h"
#include "cpu/kernels/attention_plan.h"
#include "cpu/kernels/attention_scores.h"
#include "cpu/kernels/attention_strip.h"
#include "cpu/kernels/dropout.h"

namespace pyllm::PYLLM_ISA {
namespace {

using namespace simd;
using cpu::AttentionWorkspace;

// From here on arithmetic costs more than memory: a page is widened once for all rows, and nothing is fetched ahead.
constexpr int64_t kManyRows = 24;

// What queries and weights are multiplied as.
template <class Step>
constexpr Weights weights_of() {
  return is_words<Step>()                               ? Weights::words
         : std::is_same<typename Step::X, float>::value ? Weights::floats
                                                        : Weights::pairs;
}
inline Weights weights_for(const AttentionArgs& a) {
  if (a.cache.dtype == DType::i8) return Weights::words;
  return PYLLM_HAS_BF16_DOT && a.cache.dtype == DType::bf16 && a.bf16_dots ? Weights::pairs : Weights::floats;
}

// A thread's scratch. Rows are those of the item's first head, then those of its second, and so on.
struct Scratch {
  float* q;      // [rows][Ep] scaled; or bf16 or int16 [rows][q_pairs][2], zero past Ep
  float* o;      // [rows][Ep] of the current key block
  float* total;  // [rows][Ep] merged so far
  float* lanes;  // [rows][kSumLanes] of the current key block's sum
  float* max;    // [rows] of the current key block
  float* total_max;
  float* total_sum;
  float* query_unit;    // [rows] of words, see RowState
  float* weight_unit;   // of the current page
  Seen* seen;           // [rows]
  DropoutRow* dropout;  // [rows]
  int32_t* position;    // [rows] of the query
  int32_t* head;        // [rows]
  float* keys;          // a page of one head widened to float32
  float* values;
  float* seen_values;  // what one row sees of a page
};

Scratch scratch_of(float* memory, int64_t Ep) {
  Scratch s;
  s.q = memory;
  s.o = s.q + kQueryRows * Ep;
  s.total = s.o + kQueryRows * Ep;
  s.lanes = s.total + kQueryRows * Ep;
  s.max = s.lanes + kQueryRows * cpu::kSumLanes;
  s.total_max = s.max + kQueryRows;
  s.total_sum = s.total_max + kQueryRows;
  s.query_unit = s.total_sum + kQueryRows;
  s.weight_unit = s.query_unit + kQueryRows;
  s.seen = reinterpret_cast<Seen*>(s.weight_unit + kQueryRows);
  s.dropout = reinterpret_cast<DropoutRow*>(s.seen + kQueryRows);
  s.position = reinterpret_cast<int32_t*>(s.dropout + kQueryRows);
  s.head = s.position + kQueryRows;
  s.keys = memory + kQueryRows * (3 * Ep + cpu::kSumLanes + cpu::kRowVectors);
  s.values = s.keys + kBlockTokens * Ep;
  s.seen_values = s.values + kBlockTokens * Ep;
  return s;
}

// Rows of one head that take in one page.
struct Rows {
  int64_t begin, end;
  int64_t key;  // where the page starts
};

class Attention {
 public:
  Attention(const AttentionArgs& args, const AttentionWorkspace& workspace)
      : a(args),
        w(workspace),
        E(args.cache.head_size),
        Ep(args.cache.padded_head()),
        q_pairs(round_up(Ep, 32) / 2),
        group(args.heads / args.cache.kv_heads),
        weights(weights_for(args)),
        general(args.dropout.seed || args.scores.changed()),
        plan(args, static_cast<SequencePlan*>(args.workspace), workspace.slots),
        partials(reinterpret_cast<float*>(static_cast<char*>(args.workspace) + workspace.plan_bytes)),
        threads(reinterpret_cast<float*>(static_cast<char*>(args.workspace) + workspace.plan_bytes +
                                         workspace.partial_bytes)) {}

  void run(Parallel& pool) {
    plan.make(pool.threads());
    parallel_for(pool, plan.items(),
                 [&](int64_t i, int worker) { attend(plan.item(i), threads + worker * w.thread_floats); });
    parallel_for(pool, plan.merged_rows() * a.cache.kv_heads, [&](int64_t i, int) { merge_partials(i); });
  }

 private:
  // Row i of an item: the token of its sequence, the row of q and out that this is, and the head.
  struct Query {
    int64_t token, row, head;
  };

  void attend(const Item& t, float* memory) const {
    const Scratch s = scratch_of(memory, Ep);
    const SequenceRule rule(a, t.sequence);
    const int64_t rows = t.rows * t.heads;
    for (int64_t i = 0; i < rows; ++i) {
      const Query q = query(t, i);
      expect(q);
      s.seen[i] = rule.seen(q.token);
      s.position[i] = int32_t(rule.position(q.token));
      s.head[i] = int32_t(q.head);
      if (a.dropout.seed) s.dropout[i] = dropout_row(a.dropout, q.row, q.head + 1);
    }
    const int64_t first_row = a.starts[t.sequence] - rule.position(0);  // of q and out, of the query at position 0
    for (int64_t i = 0; i < rows; ++i) take_query(s, i, a.q + (first_row + s.position[i]) * a.q_stride + s.head[i] * E);
    // Pages are those of the last row's sinks, and then from the first row's first key on.
    const int64_t end = min_of(t.last_key, s.seen[rows - 1].last);
    const auto page_from = [&](int64_t key) {
      return key < s.seen[rows - 1].sinks ? key : max_of(key, s.seen[0].first / kBlockTokens * kBlockTokens);
    };
    const int64_t begin = page_from(t.first_key);
    const bool alone = !t.split && begin < end && begin / kKeyBlock == (end - 1) / kKeyBlock;  // there is one key block
    if (!t.split && !alone) {
      for (int64_t i = 0; i < rows; ++i) s.total_max[i] = -kInfinity, s.total_sum[i] = 0;
      std::memset(s.total, 0, size_t(rows * Ep) * sizeof(float));
    }
    StripTiles tiles;
    for (int64_t page = begin; page < end;) {
      const int64_t key = page / kKeyBlock * kKeyBlock, block_end = min_of(end, key + kKeyBlock);
      for (int64_t i = 0; i < rows; ++i) s.max[i] = -kInfinity;
      std::memset(s.lanes, 0, size_t(rows) * cpu::kSumLanes * sizeof(float));
      std::memset(s.o, 0, size_t(rows * Ep) * sizeof(float));
      while (page < block_end) {
        const int64_t next = page_from(page + kBlockTokens), ahead = next < end ? next : page;
        if (a.cache.dtype == DType::f32)
          attend_page<float>(t, s, page, ahead, tiles);
        else if (a.cache.dtype == DType::bf16)
          attend_page<uint16_t>(t, s, page, ahead, tiles);
        else
          attend_page<int8_t>(t, s, page, ahead, tiles);
        page = next;
      }
      for (int64_t i = 0; i < rows; ++i) {
        const float sum = end_block(s, i, key);
        if (alone)
          s.total_sum[i] = sum;
        else if (s.seen[i].any(key, key + kKeyBlock))
          keep_block(t, s, i, key, sum);
      }
    }
    if (t.split) return;
    const float *total = alone ? s.o : s.total, *max = alone ? s.max : s.total_max;
    for (int64_t i = 0; i < rows; ++i)
      end_row(first_row + s.position[i], s.head[i], total + i * Ep, max[i], s.total_sum[i]);
  }

  // Asks for what is read and written of a query: each is on another page.
  void expect(const Query& q) const {
    const float *in = a.q + q.row * a.q_stride + q.head * E, *out = a.out + q.row * a.out_stride + q.head * E;
    for (int64_t e = 0; e < E; e += 16) {
      __builtin_prefetch(in + e, 0, 3);
      __builtin_prefetch(out + e, 1, 3);
    }
  }

  // What is kept by dropout is divided by its probability here, with the sum, which is 0 where no key is seen only.
  void end_row(int64_t row, int64_t head, const float* total, float max, float sum) const {
    const float divisor = sum == 0.0f ? 1.0f : sum * (1.0f - a.dropout.rate);
    finish(a.out + row * a.out_stride + head * E, total, divisor, E);
    if (a.lse) a.lse[row * a.heads + head] = max / kLog2e + logf(sum);
  }

  void take_query(const Scratch& s, int64_t i, const float* q) const {
    alignas(64) float scaled[kMaxHead + 16];
    float* to = weights == Weights::floats ? s.q + i * Ep : scaled;
    const F scale = set(a.scale * kLog2e);
    int64_t e = 0;
    for (; e + F::N <= E; e += F::N) store(to + e, load(q + e) * scale);
    if (e < E) store(to + e, load_n(q + e, int(E - e)) * scale);
    if (weights == Weights::floats) return;
    for (e = round_up(E, F::N); e < 2 * q_pairs; e += F::N) store(to + e, zero());
    uint16_t* row = reinterpret_cast<uint16_t*>(s.q) + i * 2 * q_pairs;
    if (weights == Weights::words) s.query_unit[i] = round_to_words(reinterpret_cast<int16_t*>(row), to, 2 * q_pairs);
#if PYLLM_HAS_BF16_DOT
    if (weights == Weights::words) return;
    for (e = 0; e < 2 * q_pairs; e += 2 * F::N) store_pairs(row + e, round_pairs(load(to + e), load(to + e + F::N)));
#endif
  }

  Query query(const Item& t, int64_t i) const {
    const auto rows = uint32_t(t.rows), heads = uint32_t(group), at = uint32_t(t.row) + uint32_t(i) % rows;
    const int64_t token = at / heads;
    return {token, a.starts[t.sequence] + token, (t.head + uint32_t(i) / rows) * group + at % heads};
  }
  float* partial(int64_t sequence, int64_t token, int64_t block, int64_t head) const {
    return partials + (plan.slot(sequence, token, block) * a.heads + head) * w.slot_floats;
  }

  // Where one head's part of a page begins, in elements.
  int64_t page_of(const Item& t, int64_t key, int64_t head) const {
    const int64_t block = a.tables[t.sequence * a.table_width + key / kBlockTokens];
    return block * a.cache.block_elements() + (t.head + head) * a.cache.head_elements();
  }

  // Takes in the keys [key, key + kBlockTokens) for all heads and rows of an item; the page after it begins at
  // `next_key`, which is `key` where there is none.
  template <class T>
  void attend_page(const Item& t, const Scratch& s, int64_t key, int64_t next_key, StripTiles& tiles) const {
    const T* data = static_cast<const T*>(a.cache.data);
    const int64_t half = a.cache.half_elements();
    const auto page = [&](int64_t k, int64_t h) {
      const T* keys = data + page_of(t, k, h);
      return Page<T>{keys, keys + half};
    };
    for (int64_t h = 0; h < t.heads; ++h) {
      Page<T> next = page(key, min_of(h + 1, t.heads - 1));  // in the item's order
      if (h + 1 == t.heads && next_key != key) next = page(next_key, 0);
      attend_head(s, Rows{h * t.rows, (h + 1) * t.rows, key}, page(key, h), next, tiles);
    }
  }

  void attend_head(const Scratch& s, Rows rows, Page<float> page, Page<float> next, StripTiles&) const {
    const PageOperand<float> keys{page.keys, kKeyGroup * E, kKeyGroup}, values{page.values, kKeyGroup, Ep};
    attend_rows<StepF32>(s, rows, keys, values, {}, next);
  }

  void attend_head(const Scratch& s, Rows rows, Page<int8_t> page, Page<int8_t> next, StripTiles&) const {
    const PageOperand<int8_t> keys{page.keys, kKeyGroup * Ep, 2 * kKeyGroup},
        values{page.values, 2 * kKeyGroup, 2 * Ep};
    const auto scales = [&](const int8_t* half) { return reinterpret_cast<const uint16_t*>(half + kBlockTokens * Ep); };
    attend_rows<StepWords>(s, rows, keys, values, {scales(page.keys), scales(page.values)}, next);
  }

  void attend_head(const Scratch& s, Rows rows, Page<uint16_t> page, Page<uint16_t> next, StripTiles& tiles) const {
    const PageOperand<uint16_t> keys{page.keys, kKeyGroup * Ep, 2 * kKeyGroup},
        values{page.values, 2 * kKeyGroup, 2 * Ep};
#if PYLLM_HAS_BF16_DOT
    if (weights == Weights::pairs) return attend_pairs(s, rows, keys, values, next, tiles);
#endif
    if (rows.end - rows.begin >= kManyRows) {
      widen_pairs(s.keys, page.keys, kBlockTokens / kKeyGroup * Ep / 2, kKeyGroup);
      widen_pairs(s.values, page.values, kBlockTokens / 2, Ep);
      attend_rows<StepF32>(s, rows, {s.keys, kKeyGroup * Ep, kKeyGroup}, {s.values, kKeyGroup, Ep}, {}, next);
    } else {
      attend_rows<StepBf16Wide<false>>(s, rows, keys, values, {}, next);
    }
  }

#if PYLLM_HAS_BF16_DOT
  void attend_pairs(const Scratch& s, Rows rows, PageOperand<uint16_t> keys, PageOperand<uint16_t> values,
                    Page<uint16_t> next, StripTiles& tiles) const {
#if PYLLM_HAS_AMX
    const int64_t products = 2 * Ep / kAmxGroup + 4 * divide_up(Ep / 2, kAmxPairs);
    const bool ahead = rows.end - rows.begin < kManyRows;
    attend_rows_amx(s, rows, keys, values, PageAhead(next.keys, 2 * a.cache.half_elements() * 2, ahead ? products : 0),
                    tiles);
#else
    attend_rows<StepBf16Dot>(s, rows, keys, values, {}, next);
#endif
  }
#endif

  // One head's page for its rows. Few of them wait for memory: meanwhile `next` is fetched.
  template <class Step, class T>
  void attend_rows(const Scratch& s, Rows rows, PageOperand<typename Step::W> keys,
                   PageOperand<typename Step::W> values, PageScales scales, Page<T> next) const {
    if (rows.end - rows.begin >= kManyRows)
      attend_strips<Step, false>(s, rows, keys, values, scales, next);
    else
      attend_strips<Step, true>(s, rows, keys, values, scales, next);
  }

  // As many rows at a time as the registers hold.
  template <class Step, bool kAhead, class T>
  void attend_strips(const Scratch& s, Rows rows, PageOperand<typename Step::W> keys,
                     PageOperand<typename Step::W> values, PageScales scales, Page<T> next) const {
    using X = typename Step::X;
    constexpr Weights kWeights = weights_of<Step>();
    constexpr int kPerX = kWeights == Weights::floats ? 1 : 2;
    constexpr int64_t kTokens = Step::kColumn;      // of a step over values
    constexpr int64_t kRow = kBlockTokens / kPerX;  // weights of a row, in X
    constexpr int kStrip = tile_rows<Step>();
    const int64_t steps = a.cache.dtype == DType::f32 ? E : divide_up(E, 2) * (Step::kColumn == 2 ? 1 : 2);
    const int64_t q_stride = kPerX == 2 ? q_pairs : Ep;
    const auto* ahead_keys = reinterpret_cast<const char*>(next.keys);
    const auto* ahead_values = reinterpret_cast<const char*>(next.values);
    const int64_t count = rows.end - rows.begin, strips = divide_up(count, kStrip);
    alignas(64) float p[kStrip * kBlockTokens];
    alignas(64) uint16_t narrow[kPerX == 2 ? kStrip * kBlockTokens : 1];
    const X* weights = kPerX == 2 ? reinterpret_cast<const X*>(narrow) : reinterpret_cast<const X*>(p);
    Finite finite;
    for (int64_t i = 0, begin = rows.begin, n; i < strips; ++i, begin += n) {
      n = rows.begin + int64_t(uint32_t(count * (i + 1)) / uint32_t(strips)) - begin;
      const Strip strip = strip_of(s, begin, n, rows.key, kPerX, kTokens);
      if (strip.first == strip.last) continue;
      if constexpr (kStripsFit && std::is_same<Step, StepF32>::value) {
        if (!general && strip.low == 0 && !strip.ragged) {
          const UniformStrip uniform{s.q + begin * Ep, s.max + begin, s.lanes + begin * cpu::kSumLanes,
                                     s.o + begin * Ep, steps,         Ep,
                                     strip.high};
          attend_uniform(int(n), uniform, keys, values.data,
                         kAhead ? ahead_keys : reinterpret_cast<const char*>(keys.data),
                         kAhead ? ahead_values : reinterpret_cast<const char*>(values.data));
          continue;
        }
      }
      const X* q = reinterpret_cast<const X*>(s.q) + begin * q_stride;
      page_product<Step, kAhead>(int(n), p, kBlockTokens, q, q_stride, nullptr, keys, strip.first, strip.last, steps,
                                 true, ahead_keys);
      for (int64_t r = 0; r < n; ++r)
        weigh_row<kWeights>(s, begin + r, rows.key, p + r * kBlockTokens, narrow + r * kBlockTokens * (kPerX - 1),
                            strip, scales);
      const auto add = [&](int64_t r, int64_t many, PageOperand<typename Step::W> from) {
        from.data += strip.low / kTokens * from.step;
        page_product<Step, kAhead>(int(many), s.o + (begin + r) * Ep, Ep, weights + r * kRow + strip.low / kPerX, kRow,
                                   s.weight_unit + begin + r, from, 0, int(Ep / F::N),
                                   (strip.high - strip.low) / kTokens, false, ahead_values);
      };
      if (!strip.ragged || finite.all(values.data, kBlockTokens * Ep))
        add(0, n, values);
      else
        one_by_one(s, begin, n, rows.key, values, kTokens, add);
    }
  }

#if PYLLM_HAS_AMX
  // The same on tiles. What one strip stores, its weights and its scores, is loaded as tiles or vectors only after another
  // strip's turn: loads that find their line in the store buffer would wait, and tiles multiply while weights are made.
  void attend_rows_amx(const Scratch& s, Rows rows, PageOperand<uint16_t> keys, PageOperand<uint16_t> values,
                       PageAhead ahead, StripTiles& tiles) const {
    constexpr int64_t kTokens = 2 * kAmxPairs;  // of a step over values
    const auto* q = reinterpret_cast<const uint16_t*>(s.q);
    const int64_t strips = divide_up(rows.end - rows.begin, kTileLines);
    alignas(64) float scores[2][kTileLines * kBlockTokens];
    alignas(64) uint16_t rounded[2][kTileLines * kBlockTokens];
    Finite finite;
    const auto begin_of = [&](int64_t i) { return rows.begin + i * kTileLines; };
    const auto rows_of = [&](int64_t i) { return min_of(kTileLines, rows.end - begin_of(i)); };
    const auto strip_at = [&](int64_t i) {
      return strip_of(s, begin_of(i), rows_of(i), rows.key, int(kTokens / F::N), kTokens);
    };
    const auto score = [&](int64_t i) {
      const Strip strip = strip_at(i);
      if (strip.first == strip.last) return;
      tiles.shape(rows_of(i));
      amx_products(strip.first, strip.last, scores[i % 2], kBlockTokens, q + begin_of(i) * 2 * q_pairs, 2 * q_pairs,
                   keys, Ep / 2, true, ahead);
    };
    const auto weigh = [&](int64_t i) {
      const Strip strip = strip_at(i);
      if (strip.first == strip.last) return;
      for (int64_t r = 0; r < rows_of(i); ++r)
        weigh_row<Weights::pairs>(s, begin_of(i) + r, rows.key, scores[i % 2] + r * kBlockTokens,
                                  rounded[i % 2] + r * kBlockTokens, strip, {});
    };
    const auto add_values = [&](int64_t i) {
      const Strip strip = strip_at(i);
      if (strip.first == strip.last) return;
      const auto add = [&](int64_t r, int64_t n, PageOperand<uint16_t> from) {
        from.data += strip.low * Ep;
        tiles.shape(n);
        amx_products(0, int(Ep / kAmxGroup), s.o + (begin_of(i) + r) * Ep, Ep,
                     rounded[i % 2] + r * kBlockTokens + strip.low, kBlockTokens, from, (strip.high - strip.low) / 2,
                     false, ahead);
      };
      if (!strip.ragged || finite.all(values.data, kBlockTokens * Ep))
        add(0, rows_of(i), values);
      else
        one_by_one(s, begin_of(i), rows_of(i), rows.key, values, 2, add);
    };
    score(0);
    for (int64_t i = 0; i < strips; ++i) {
      if (i + 1 < strips) score(i + 1);
      if (i > 0) add_values(i - 1);
      weigh(i);
    }
    add_values(strips - 1);
  }
#endif

  // Rows that are multiplied together.
  struct Strip {
    int first, last;    // vectors of a page's places that some row sees
    int64_t low, high;  // places of its values, in whole steps
    bool ragged;        // some row does not see all of these
  };
  static Strip strip_of(const Scratch& s, int64_t begin, int64_t n, int64_t key, int vectors, int64_t tokens) {
    // All ends of what is visible rise from row to row.
    const Seen &top = s.seen[begin], &bottom = s.seen[begin + n - 1];
    const int64_t low = key < bottom.sinks ? 0 : max_of(0, top.first - key);
    const int64_t high = min_of(kBlockTokens, bottom.last - key);
    if (low >= high) return {0, 0, 0, 0, false};
    Strip strip;
    strip.first = int(low / (vectors * F::N)) * vectors;
    strip.last = int(divide_up(high, vectors * F::N)) * vectors;
    strip.low = low / tokens * tokens;
    strip.high = round_up(high, tokens);
    strip.ragged = bottom.first - key > strip.low || top.last - key < strip.high;
    return strip;
  }

  // What a row sees of the page at `key`, as places of it.
  static Seen seen_of(const Scratch& s, int64_t row, int64_t key) {
    const Seen& seen = s.seen[row];
    return {max_of(0, seen.first - key), min_of(kBlockTokens, seen.last - key), min_of(kBlockTokens, seen.sinks - key)};
  }

  template <Weights kWeights>
  void weigh_row(const Scratch& s, int64_t row, int64_t key, float* p, uint16_t* narrow, Strip strip,
                 PageScales scales) const {
    const bool whole = s.seen[row].first <= key && s.seen[row].last >= key + kBlockTokens;
    const Seen seen = whole ? Seen{0, kBlockTokens, 0} : seen_of(s, row, key);
    if (whole || seen.any(0, kBlockTokens)) {
      const RowState state{s.max + row,        s.lanes + row * cpu::kSumLanes, s.o + row * Ep, Ep, s.query_unit[row],
                           s.weight_unit + row};
      const Places places{seen, strip.first, strip.last};
      if (general) {
        const ScoreChange change(a.scores, s.head[row], key - s.position[row]);
        const DropoutRule rule(a.dropout, 1.0f);
        weigh_scores<kWeights, false>(
            state, p, narrow, places, scales, [&](int v, F score) { return change(v * F::N, score); },
            [&](int v, F weight) {
              return a.dropout.seed ? rule.keep(s.dropout[row], key + v * F::N, weight) : weight;
            });
      } else {
        const Unchanged all;
        if (whole)
          weigh_scores<kWeights, true>(state, p, narrow, places, scales, all, all);
        else
          weigh_scores<kWeights, false>(state, p, narrow, places, scales, all, all);
      }
      return;
    }
    for (int64_t j = strip.first * F::N; j < strip.last * F::N; ++j)
      (kWeights == Weights::floats ? (void)(p[j] = 0) : (void)(narrow[j] = 0));
    s.weight_unit[row] = 0;
  }

  // Whether a page's values are all finite, found out when first asked: then hidden ones need a weight of 0 only.
  class Finite {
   public:
    template <class W>
    bool all(const W* values, int64_t count) {
      if (!known_) {
        known_ = true;
        finite_ = all_finite(values, count);
      }
      return finite_;
    }

   private:
    bool known_ = false, finite_ = false;
  };

  // Adds values to each row by itself, of a copy without what the row does not see.
  template <class W, class Add>
  void one_by_one(const Scratch& s, int64_t begin, int64_t n, int64_t key, PageOperand<W> values, int64_t column,
                  const Add& add) const {
    auto* seen = reinterpret_cast<W*>(s.seen_values);
    for (int64_t r = 0; r < n; ++r) {
      const Seen of_row = seen_of(s, begin + r, key);
      if (!of_row.any(0, kBlockTokens)) continue;
      copy_tokens(seen, values.data, Ep, column, of_row);
      add(r, 1, PageOperand<W>{seen, values.group, values.step});
    }
  }

  // Row i of an item has taken in the pages of the key block that starts at `key`: its sum.
  float end_block(const Scratch& s, int64_t i, int64_t key) const {
    if (weights == Weights::pairs && s.seen[i].any(key, key + kKeyBlock)) {
      // The bf16 instructions take denormals for 0, but only in pages that a row takes part in.
      float* o = s.o + i * Ep;
      const F least = set(0x1p-126f);
      for (int64_t e = 0; e < Ep; e += F::N) store(o + e, select_gt(least, abs(load(o + e)), zero(), load(o + e)));
    }
    return simd::sum(load(s.lanes + i * cpu::kSumLanes));
  }

  // What row i of an item made of a key block, of which it saw some: a partial result, or merged with earlier ones.
  void keep_block(const Item& t, const Scratch& s, int64_t i, int64_t key, float sum) const {
    const float* o = s.o + i * Ep;
    if (!t.split) {
      merge(s.total_max[i], s.total_sum[i], s.total + i * Ep, s.max[i], sum, o, Ep);
      return;
    }
    const Query q = query(t, i);
    float* slot = partial(t.sequence, q.token, key / kKeyBlock, q.head);
    slot[0] = s.max[i];
    slot[1] = sum;
    std::memcpy(slot + cpu::kPartialHeader, o, size_t(Ep) * sizeof(float));
  }

  // The heads of one group of one row whose key blocks went to different items.
  void merge_partials(int64_t i) const {
    const int64_t g = i % a.cache.kv_heads;
    int64_t b, token;
    plan.merged_row(i / a.cache.kv_heads, b, token);
    const Seen seen = SequenceRule(a, b).seen(token);
    alignas(64) float total[kMaxHead];
    for (int64_t head = g * group; head < (g + 1) * group; ++head) {
      float max = -kInfinity, sum = 0;
      std::memset(total, 0, size_t(Ep) * sizeof(float));
      for (int64_t k = 0; k < plan.blocks(b); ++k) {
        const int64_t block = plan.block_at(b, k);
        if (!seen.any(block * kKeyBlock, (block + 1) * kKeyBlock)) continue;
        const float* slot = partial(b, token, block, head);
        merge(max, sum, total, slot[0], slot[1], slot + cpu::kPartialHeader, Ep);
      }
      end_row(a.starts[b] + token, head, total, max, sum);
    }
  }

  const AttentionArgs& a;
  const AttentionWorkspace& w;
  const int64_t E, Ep, q_pairs, group;
  const Weights weights;
  const bool general;  // scores are changed, or weights dropped
  AttentionPlan plan;
  float* partials;
  float* threads;
};

}  // namespace

void attention(const AttentionArgs& a, Parallel& pool) {
  const AttentionWorkspace workspace = cpu::attention_workspace(a, pool.threads());
  Attention(a, workspace).run(pool);
}

}  // namespace pyllm::PYLLM_ISA
