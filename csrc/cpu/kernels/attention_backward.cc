// Gradients of attention over the paged cache, with the softmax's weights made anew from the log-sum-exp.
//
// An item is one head of one sequence. It takes keys in spans of kSpanPages pages, whose gradients stay in scratch, and to
// each span the blocks of kQueryBlock queries that see it. Five products for a page and a block: scores = Q K^T, dP = dout
// V^T, then, of the weights P and of dS, dV += P^T dout, dK += dS^T Q, dQ += dS K. Each skips what no row of a strip sees.
// All are sums of multiply-adds in rising order of key or query.
//
// Queries are rounded to bf16 where the forward pass does so, for the weights to be the same ones; else all is float32.
#include "cpu/kernels/attention_page.h"
#include "cpu/kernels/attention_plan.h"
#include "cpu/kernels/attention_scores.h"
#include "cpu/kernels/dropout.h"
#include "cpu/kernels/transpose.h"

namespace pyllm::PYLLM_ISA {
namespace {

using namespace simd;
using cpu::AttentionBackwardWorkspace;
using cpu::kQueryBlock;
using cpu::kSpanPages;

constexpr int64_t kSpan = kSpanPages * kBlockTokens;  // keys
constexpr float kLn2 = 0.69314718f;

// The left-hand side of a product: element (r, s) at data[r * row + s * step].
struct Left {
  const float* data;
  int64_t row, step;
};

// c[r][v] (+)= sum of x(r, s) * w(s, v) over s, for vectors [first, first + V) of columns.
template <int R, int V>
PYLLM_NOINLINE void gradient_tile(float* c, int64_t c_stride, Left x, PageOperand<float> w, int first, int64_t steps,
                                  bool fresh) {
  constexpr int kGroupVectors = kKeyGroup / F::N;
  F sum[R][V];
  const float* column[V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    const int i = first + v;
    column[v] = w.data + i / kGroupVectors * w.group + i % kGroupVectors * F::N;
  }
  c += first * F::N;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sum[r][v] = fresh ? zero() : load(c + r * c_stride + v * F::N);
  }
  for (int64_t s = 0; s < steps; ++s, x.data += x.step) {
    F b[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) b[v] = load(column[v] + s * w.step);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const F a = set(x.data[r * x.row]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sum[r][v] = fma(a, b[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(c + r * c_stride + v * F::N, sum[r][v]);
  }
}

// The same for up to kTileRows rows and vectors [first, last) of columns.
void product(int64_t rows, float* c, int64_t c_stride, Left x, PageOperand<float> w, int first, int last, int64_t steps,
             bool fresh) {
  with_constant<kTileRows>(int(rows), [&](auto tag) {
    constexpr int R = decltype(tag)::value, V = tile_vectors(R);
    for (; first < last; first += V) {
      with_constant<V>(last - first < V ? last - first : V, [&](auto columns) {
        gradient_tile<R, decltype(columns)::value>(c, c_stride, x, w, first, steps, fresh);
      });
    }
  });
}

// Calls fn(begin, rows) for strips of at most kTileRows of [0, count), of about equal size.
template <class Fn>
inline void for_strips(int64_t count, const Fn& fn) {
  const int64_t strips = divide_up(count, kTileRows);
  for (int64_t i = 0; i < strips; ++i) {
    const int64_t begin = count * i / strips;
    fn(begin, count * (i + 1) / strips - begin);
  }
}

// A thread's scratch.
struct Scratch {
  float* key_columns;    // [span pages][64 / 16][E][16], in float32 the cache's own in its place
  float* value_columns;  // the same of values
  float* keys;           // [span][Ep]
  float* dk;             // [span][Ep]
  float* dv;             // [span][Ep]
  float* q;              // [block][Ep] scaled, in units of ln 2
  float* dout;           // [block][Ep]
  float* dq;             // [block][Ep] of a span's keys
  float* p;              // [block][kBlockTokens]
  float* ds;             // [block][kBlockTokens]
  float* lse;            // [block] in units of ln 2
  float* delta;          // [block]
  DropoutRow* dropout;   // [block]
  const float* page_keys[kSpanPages];
};

Scratch scratch_of(float* memory, int64_t Ep) {
  Scratch s;
  s.key_columns = memory;
  s.value_columns = s.key_columns + kSpan * Ep;
  s.keys = s.value_columns + kSpan * Ep;
  s.dk = s.keys + kSpan * Ep;
  s.dv = s.dk + kSpan * Ep;
  s.q = s.dv + kSpan * Ep;
  s.dout = s.q + kQueryBlock * Ep;
  s.dq = s.dout + kQueryBlock * Ep;
  s.p = s.dq + kQueryBlock * Ep;
  s.ds = s.p + kQueryBlock * kBlockTokens;
  s.lse = s.ds + kQueryBlock * kBlockTokens;
  s.delta = s.lse + kQueryBlock;
  s.dropout = reinterpret_cast<DropoutRow*>(s.delta + kQueryBlock);
  return s;
}

class AttentionBackward {
 public:
  AttentionBackward(const AttentionBackwardArgs& args, const AttentionBackwardWorkspace& workspace)
      : a(args),
        w(workspace),
        E(args.cache.head_size),
        Ep(args.cache.padded_head()),
        group(args.heads / args.cache.kv_heads),
        key_group(kKeyGroup * (args.cache.dtype == DType::f32 ? E : Ep)),
        rounds(PYLLM_HAS_BF16_DOT && args.cache.dtype == DType::bf16 && args.bf16_dots),
        general(args.dropout.seed || args.scores.changed()),
        partials(static_cast<float*>(args.workspace)),
        biases(partials + 2 * workspace.partial_floats),
        threads(biases + workspace.bias_floats) {}

  void run(Parallel& pool) const {
    parallel_for(pool, a.sequences * a.heads, [&](int64_t i, int worker) {
      differentiate(i / a.heads, i % a.heads, scratch_of(threads + worker * w.thread_floats, Ep));
    });
    if (group > 1) parallel_for(pool, a.keys, [&](int64_t t, int) { add_heads(t); });
    if (a.dbias) parallel_for(pool, a.heads, [&](int64_t head, int) { add_sequences(head); });
  }

 private:
  struct Block {
    int64_t row, rows;  // queries of the sequence
    int64_t head;
  };

  void differentiate(int64_t sequence, int64_t head, Scratch s) const {
    const SequenceRule rule(a, sequence);
    BiasGradient dbias(dbias_of(sequence, head), a.scores.reach);
    int64_t first_key = 0;  // the sequence's first row of dk and dv
    for (int64_t b = 0; b < sequence; ++b) first_key += a.lengths[b];
    for (int64_t key = 0; key < rule.length; key += kSpan) {
      const int64_t keys = min_of(kSpan, rule.length - key);
      for (int64_t page = 0; page * kBlockTokens < keys; ++page)
        take_page(s, page, a.tables[sequence * a.table_width + key / kBlockTokens + page], head / group);
      std::memset(s.dk, 0, size_t(keys * Ep) * sizeof(float));
      std::memset(s.dv, 0, size_t(keys * Ep) * sizeof(float));
      for (int64_t row = max_of(0, rule.first_row(key)) / kQueryBlock * kQueryBlock; row < rule.rows;
           row += kQueryBlock) {
        const Block block{row, min_of(kQueryBlock, rule.rows - row), head};
        if (!sees(rule, block, key, key + keys)) continue;
        take_queries(s, rule.start + row, block);
        for (int64_t page = 0; page * kBlockTokens < keys; ++page)
          take_products(s, rule, block, dbias, page, key + page * kBlockTokens,
                        min_of(kBlockTokens, keys - page * kBlockTokens));
        const Seen seen = rule.seen(row);
        give_dq(s, rule.start + row, block, (seen.sinks > 0 ? 0 : seen.first) / kSpan == key / kSpan);
      }
      for (int64_t j = 0; j < keys; ++j) {
        write_row(dk_of(first_key + key + j, head), s.dk + j * Ep, kLn2);  // of queries in units of ln 2
        write_row(dv_of(first_key + key + j, head), s.dv + j * Ep, 1.0f);
      }
    }
    dbias.finish();
    for (int64_t row = 0; rule.length == 0 && row < rule.rows; ++row)
      std::memset(a.dq + (rule.start + row) * a.dq_stride + head * E, 0, size_t(E) * sizeof(float));
  }

  // Whether some row of a block sees one of the keys [begin, end).
  static bool sees(const SequenceRule& rule, Block block, int64_t begin, int64_t end) {
    const Seen top = rule.seen(block.row), bottom = rule.seen(block.row + block.rows - 1);
    return (top.first < end && bottom.last > begin) || bottom.sinks > begin;
  }

  float* dk_of(int64_t t, int64_t head) const {
    return group > 1 ? partials + (t * a.heads + head) * E : a.dk + t * a.dk_stride + head * E;
  }
  float* dv_of(int64_t t, int64_t head) const {
    return group > 1 ? partials + w.partial_floats + (t * a.heads + head) * E : a.dv + t * a.dv_stride + head * E;
  }

  float* dbias_of(int64_t sequence, int64_t head) const {
    return a.dbias ? biases + (sequence * a.heads + head) * (2 * a.scores.reach + 1) : nullptr;
  }

  // One head's page as the products want it.
  void take_page(Scratch& s, int64_t page, int64_t block, int64_t g) const {
    const int64_t at = block * a.cache.block_elements() + g * a.cache.head_elements(), half = a.cache.half_elements();
    float* value_columns = s.value_columns + page * kBlockTokens * Ep;
    float* keys = s.keys + page * kBlockTokens * Ep;
    const float* values = keys;
    if (a.cache.dtype == DType::f32) {
      s.page_keys[page] = static_cast<const float*>(a.cache.data) + at;
      values = s.page_keys[page] + half;
    } else {
      const uint16_t* data = static_cast<const uint16_t*>(a.cache.data) + at;
      float* key_columns = s.key_columns + page * kBlockTokens * Ep;
      s.page_keys[page] = key_columns;
      widen_pairs(key_columns, data, kBlockTokens / kKeyGroup * Ep / 2, kKeyGroup);
      widen_pairs(keys, data + half, kBlockTokens / 2, Ep);  // values, until they are transposed
    }
    for (int64_t t = 0; t < kBlockTokens; t += kKeyGroup)
      transpose(value_columns + t * E, kKeyGroup, values + t * Ep, Ep, kKeyGroup, E);
    for (int64_t t = 0; t < kBlockTokens; t += kKeyGroup) {
      transpose(keys + t * Ep, Ep, s.page_keys[page] + t / kKeyGroup * key_group, kKeyGroup, E, kKeyGroup);
      for (int64_t j = t; E < Ep && j < t + kKeyGroup; ++j)
        std::memset(keys + j * Ep + E, 0, size_t(Ep - E) * sizeof(float));
    }
  }

  void take_queries(Scratch& s, int64_t t, Block block) const {
    const F scale = set(a.scale * kLog2e);
    for (int64_t r = 0; r < block.rows; ++r, ++t) {
      const float* q = a.q + t * a.q_stride + block.head * E;
      const float* dout = a.dout + t * a.dout_stride + block.head * E;
      const float* out = a.out + t * a.out_stride + block.head * E;
      F delta = zero();
      for (int64_t e = 0; e < Ep; e += F::N) {
        const int n = int(max_of(0, min_of(F::N, E - e)));
        F scaled = load_n(q + e, n) * scale;
        if (rounds) {
          alignas(64) uint16_t halves[F::N];
          store_bf16(halves, scaled);
          scaled = load_bf16(halves);
        }
        store(s.q + r * Ep + e, scaled);
        const F d = load_n(dout + e, n);
        store(s.dout + r * Ep + e, d);
        delta = fma(d, load_n(out + e, n), delta);
      }
      s.delta[r] = sum(delta);
      s.lse[r] = a.lse[t * a.heads + block.head] * kLog2e;
      if (a.dropout.seed) s.dropout[r] = dropout_row(a.dropout, t, block.head + 1);
    }
    std::memset(s.dq, 0, size_t(block.rows * Ep) * sizeof(float));
  }

  // What a block's queries and `count` keys of a page, which starts at `key`, add to the gradients.
  void take_products(const Scratch& s, const SequenceRule& rule, Block block, BiasGradient& dbias, int64_t page,
                     int64_t key, int64_t count) const {
    if (!sees(rule, block, key, key + kBlockTokens)) return;
    const int64_t at = page * kBlockTokens * Ep;
    const PageOperand<float> key_columns{s.page_keys[page], key_group, kKeyGroup};
    const PageOperand<float> value_columns{s.value_columns + at, kKeyGroup * E, kKeyGroup};
    // What row r of the block sees, as places of the page.
    const auto seen_of = [&](int64_t r) {
      const Seen seen = rule.seen(block.row + r);
      return Seen{min_of(kBlockTokens, max_of(0, seen.first - key)), max_of(0, min_of(kBlockTokens, seen.last - key)),
                  min_of(kBlockTokens, seen.sinks - key)};
    };
    for_strips(block.rows, [&](int64_t r, int64_t n) {
      const Seen top = seen_of(r), bottom = seen_of(r + n - 1);
      const int64_t low = bottom.sinks > 0 ? 0 : top.first, high = max_of(low, bottom.last);
      const int first = int(low / F::N), end = int(divide_up(high, F::N));
      float *p = s.p + r * kBlockTokens, *ds = s.ds + r * kBlockTokens;
      product(n, p, kBlockTokens, {s.q + r * Ep, Ep, 1}, key_columns, first, end, E, true);
      product(n, ds, kBlockTokens, {s.dout + r * Ep, Ep, 1}, value_columns, first, end, E, true);
      for (int64_t i = 0; i < n; ++i) {
        const Row row{r + i, block.head, key, key - rule.position(block.row + r + i)};
        if (general)
          weigh<true>(s, row, seen_of(r + i), first, end, dbias);
        else
          weigh<false>(s, row, seen_of(r + i), first, end, dbias);
      }
      if (low < high)
        product(n, s.dq + r * Ep, Ep, {ds + low, kBlockTokens, 1}, {s.keys + at + low * Ep, kKeyGroup, Ep}, 0,
                int(Ep / F::N), high - low, false);
    });
    for_strips(count, [&](int64_t j, int64_t n) {
      const int64_t begin = max_of(0, rule.first_row(key + j) - block.row);
      const int64_t end = min_of(block.rows, max_of(rule.end_row(key + j), rule.end_row(key + j + n - 1)) - block.row);
      if (begin >= end) return;
      const int64_t from = begin * kBlockTokens + j;
      product(n, s.dv + at + j * Ep, Ep, {s.p + from, 1, kBlockTokens}, {s.dout + begin * Ep, kKeyGroup, Ep}, 0,
              int(Ep / F::N), end - begin, false);
      product(n, s.dk + at + j * Ep, Ep, {s.ds + from, 1, kBlockTokens}, {s.q + begin * Ep, kKeyGroup, Ep}, 0,
              int(Ep / F::N), end - begin, false);
    });
  }

  // A row of a block and a page's first key, which is `distance` from its position.
  struct Row {
    int64_t index, head, key, distance;
  };

  // Scores into weights, and their gradients dP into dS; 0 for keys that are not `seen`. Vectors [first, end) have been
  // computed. kGeneral: scores are changed, or weights dropped.
  template <bool kGeneral>
  void weigh(const Scratch& s, Row row, Seen seen, int first, int end, BiasGradient& dbias) const {
    float *p = s.p + row.index * kBlockTokens, *ds = s.ds + row.index * kBlockTokens;
    const F lse = set(s.lse[row.index]), delta = set(s.delta[row.index]);
    const DropoutRule rule(a.dropout, 1.0f / (1.0f - a.dropout.rate));
    const ScoreChange change(a.scores, row.head, row.distance);
    const auto differentiate = [&](int v, const auto& where_seen) {
      const int64_t j = v * F::N;
      const F score = load(p + j);
      const F weight = where_seen(weight_of<false>((kGeneral ? change(j, score) : score) - lse));
      F dp = load(ds + j), kept = weight;
      if (kGeneral && a.dropout.seed) {
        kept = rule.keep(s.dropout[row.index], row.key + j, weight);
        dp = rule.keep(s.dropout[row.index], row.key + j, dp);
      }
      store(p + j, kept);
      F dscore = where_seen(weight * (dp - delta));
      if (kGeneral) {
        dbias.add(row.distance + j, dscore);
        if (change.capped()) dscore = where_seen(dscore * change.slope(score));
      }
      store(ds + j, dscore);
    };
    if (seen.first == 0 && seen.last == kBlockTokens) {
      for (int v = 0; v < int(kBlockTokens / F::N); ++v) differentiate(v, [](F x) { return x; });
      return;
    }
    const F before = set(float(seen.first) - 0.5f), after = set(float(seen.last) - 0.5f), place = to_float(places());
    const F sinks = set(float(seen.sinks) - 0.5f);
    for (int v = 0; v < int(kBlockTokens / F::N); ++v) {
      const int64_t j = v * F::N;
      if (v < first || v >= end) {
        store(p + j, zero());
        store(ds + j, zero());
        continue;
      }
      const F at = place + set(float(j));
      differentiate(v, [&](F x) {
        return select_gt(sinks, at, x, select_gt(at, before, select_gt(after, at, x, zero()), zero()));
      });
    }
  }

  void give_dq(const Scratch& s, int64_t t, Block block, bool fresh) const {
    const F scale = set(a.scale);
    for (int64_t r = 0; r < block.rows; ++r, ++t) {
      float* dq = a.dq + t * a.dq_stride + block.head * E;
      for (int64_t e = 0; e < E; e += F::N) {
        const int n = int(min_of(F::N, E - e));
        const F d = load(s.dq + r * Ep + e) * scale;
        store_n(dq + e, fresh ? d : load_n(dq + e, n) + d, n);
      }
    }
  }

  void write_row(float* to, const float* from, float factor) const {
    for (int64_t e = 0; e < E; e += F::N) store_n(to + e, load(from + e) * set(factor), int(min_of(F::N, E - e)));
  }

  // dk and dv of a key: the sums over the heads of each group.
  void add_heads(int64_t t) const {
    for (int64_t g = 0; g < a.cache.kv_heads; ++g) {
      for (int64_t e = 0; e < E; e += F::N) {
        const int n = int(min_of(F::N, E - e));
        F dk = zero(), dv = zero();
        for (int64_t head = g * group; head < (g + 1) * group; ++head) {
          dk = dk + load_n(dk_of(t, head) + e, n);
          dv = dv + load_n(dv_of(t, head) + e, n);
        }
        store_n(a.dk + t * a.dk_stride + g * E + e, dk, n);
        store_n(a.dv + t * a.dv_stride + g * E + e, dv, n);
      }
    }
  }

  // A head's dbias: the sum over sequences.
  void add_sequences(int64_t head) const {
    const int64_t columns = 2 * a.scores.reach + 1;
    float* to = a.dbias + head * columns;
    for (int64_t i = 0; i < columns; i += F::N) {
      const int n = int(min_of(F::N, columns - i));
      F sum = a.add_dbias ? load_n(to + i, n) : zero();
      for (int64_t b = 0; b < a.sequences; ++b) sum = sum + load_n(dbias_of(b, head) + i, n);
      store_n(to + i, sum, n);
    }
  }

  const AttentionBackwardArgs& a;
  const AttentionBackwardWorkspace& w;
  const int64_t E, Ep, group, key_group;
  const bool rounds, general;
  float* partials;
  float* biases;
  float* threads;
};

}  // namespace

void attention_backward(const AttentionBackwardArgs& a, Parallel& pool) {
  const AttentionBackwardWorkspace workspace = cpu::attention_backward_workspace(a, pool.threads());
  AttentionBackward(a, workspace).run(pool);
}

}  // namespace pyllm::PYLLM_ISA
