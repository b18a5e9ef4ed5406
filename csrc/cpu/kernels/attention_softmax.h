// The online softmax: scores of a page into weights, key blocks into one another, sums into outputs.
//
// Scores are in units of ln 2 (queries are scaled by log2 e), so that a weight is 2^(score - max).
#pragma once
#include <type_traits>

#include "cpu/attention_workspace.h"
#include "cpu/kernels/attention_rule.h"

namespace pyllm::PYLLM_ISA {

constexpr float kInfinity = __builtin_inff(), kLog2e = 1.44269504f;

// 2^x for x <= kHeadroom below; 1 at 0, and 0 where it is below 2^-126: beside a largest weight of about 1 that is
// nothing, and denormals are slow. NaN stays.
// 2^x = 2^n 2^r with n = round(x), |r| <= 1/2; 2^r = 1 + r q(r), q fitted to the relative error as those of math.h, of
// degree 4 (1.1e-7) or, for weights that are rounded to bf16, 2 (1.0e-4).
template <bool kShort>
inline simd::F weight_of(simd::F x) {
  using namespace simd;
  const F least = set(-126.0f), held = simd::max(least, x);
  const F n = round(held), r = held - n;
  F q;
  if (kShort) {
    q = fma(set(0x1.c2a218p-5f), r, set(0x1.f00c4cp-3f));
    q = fma(q, r, set(0x1.62f5fap-1f));
  } else {
    q = fma(set(0x1.5bba14p-10f), r, set(0x1.3cea88p-7f));
    q = fma(q, r, set(0x1.c6b752p-5f));
    q = fma(q, r, set(0x1.ebf9bcp-3f));
    q = fma(q, r, set(0x1.62e42ap-1f));
  }
  return select_gt(least, x, zero(), ldexp(fma(q, r, set(1.0f)), n));
}

// What weights become for their product with values.
enum class Weights { floats, pairs, words };  // float32; bf16; int16, at most kWord, times a unit of the row and page

constexpr float kWord = 32767.0f;
// A unit of words is no less than this over kWord, so that nothing is divided by zero.
constexpr float kLeastWord = 0x1p-110f;

// One row's part of a key block: weights relative to 2^max, their sum in lanes, weighted values o[Ep]. Words only: the
// unit of its query, by which scores are multiplied, and of its weights, which is found.
struct RowState {
  float* max;
  float* lanes;  // [kSumLanes]
  float* o;
  int64_t Ep;
  float query_unit;
  float* weight_unit;
};

// x[count] to words and their unit, NaN where x is not finite; count is a multiple of F::N.
inline float round_to_words(int16_t* words, const float* x, int64_t count) {
  using namespace simd;
  F most = set(kLeastWord), wrong = zero();  // x * 0 is 0 unless x is infinite or NaN
  for (int64_t e = 0; e < count; e += F::N) {
    most = simd::max(most, abs(load(x + e)));
    wrong = fma(load(x + e), zero(), wrong);
  }
  const float largest = simd::max(most);
  const F per_unit = set(kWord / largest);
  for (int64_t e = 0; e < count; e += F::N) store_words(words + e, load(x + e) * per_unit);
  return largest / kWord + simd::sum(wrong);
}

// How far a page's scores may stand over `max` before it is raised, which rescales what has been gathered. Weights up to
// 2^8 are as good as weights up to 1.
constexpr float kHeadroom = 8.0f;

// Raises the largest score of a row's key block where a page's is far beyond it, rescaling what has been gathered: its
// sum in lanes [kSumLanes] and o[Ep]. Gives the score that weights are relative to from now on.
inline float raise_max(float page_max, float* max, float* lanes, float* o, int64_t Ep) {
  using namespace simd;
  const float old = *max;
  if (!(page_max > old + kHeadroom)) return old;
  *max = page_max;
  if (old == -kInfinity) return page_max;  // nothing has been gathered
  const F shrink = weight_of<false>(set(old - page_max));
  store(lanes, load(lanes) * shrink);
  for (int64_t e = 0; e < Ep; e += F::N) store(o + e, load(o + e) * shrink);
  return page_max;
}

// Of an i8 page, [kBlockTokens] bf16 each.
struct PageScales {
  const uint16_t* keys;
  const uint16_t* values;
};

// Places of a page: `seen` of them are what a row sees; vectors `first` to `last` are what has been computed.
struct Places {
  Seen seen;
  int first, last;
};

struct Unchanged {
  simd::F operator()(int, simd::F x) const { return x; }
};

// Turns a row's scores of one page into weights, 0 where it does not see: into p, or as pairs or words into `narrow`.
// kWhole: it sees the whole page. `scales`, words only: what the page's keys and values are to be multiplied with.
// change(v, scores) gives what becomes of the scores of a vector, keep(v, weights) what is left of its weights after they
// have been added to the sum.
template <Weights kWeights, bool kWhole, class Change, class Keep>
inline void weigh_scores(RowState row, float* p, uint16_t* narrow, Places at, PageScales scales, const Change& change,
                         const Keep& keep) {
  using namespace simd;
  constexpr bool kWords = kWeights == Weights::words, kChanged = !std::is_same<Change, Unchanged>::value;
  alignas(64) static const float kPlaces[kBlockTokens] = {
      0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
      22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
      44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
  const F begin = set(float(at.seen.first) - 0.5f), end = set(float(at.seen.last) - 0.5f);
  const F sinks = set(float(at.seen.sinks) - 0.5f);
  const bool partial = !kWhole && (at.seen.first > at.first * F::N || at.seen.last < at.last * F::N);
  const auto where_seen = [&](int v, F x, F otherwise) {
    const F place = load(kPlaces + v * F::N), inside = select_gt(end, place, x, otherwise);
    return select_gt(sinks, place, x, select_gt(place, begin, inside, otherwise));
  };
  F largest = set(-kInfinity);
  if (partial || kWords || kChanged) {
    for (int v = at.first; v < at.last; ++v) {
      F score = load(p + v * F::N);
      if (kWords) score = score * (load_bf16(scales.keys + v * F::N) * set(row.query_unit));
      score = change(v, score);
      if (partial) score = where_seen(v, score, set(-kInfinity));
      store(p + v * F::N, score);
      largest = simd::max(largest, score);
    }
  } else {
    for (int v = at.first; v < at.last; ++v) largest = simd::max(largest, load(p + v * F::N));
  }
  const F m = set(raise_max(simd::max(largest), row.max, row.lanes, row.o, row.Ep));
  F sum = load(row.lanes);
  const auto weight = [&](int v) {
    const F w = weight_of<kWeights == Weights::pairs>(load(p + v * F::N) - m);
    sum = sum + w;
    return keep(v, w);
  };
  if (kWeights == Weights::floats)
    for (int v = at.first; v < at.last; ++v) store(p + v * F::N, weight(v));
#if PYLLM_HAS_BF16_DOT
  if (kWeights == Weights::pairs) {
    for (int v = at.first; v < at.last; v += 2) {
      const F low = weight(v);
      store_pairs(narrow + v * F::N, round_pairs(low, weight(v + 1)));
    }
  }
#endif
  if (kWords) {
    F most = zero(), wrong = zero();  // x * 0 is 0 unless x is infinite or NaN
    for (int v = at.first; v < at.last; ++v) {
      F scaled = weight(v) * load_bf16(scales.values + v * F::N);
      if (partial) scaled = where_seen(v, scaled, zero());  // what is not seen may have any scale
      most = simd::max(most, scaled);
      wrong = fma(scaled, zero(), wrong);
      store(p + v * F::N, scaled);
    }
    const float largest_word = simd::max(simd::max(most, set(kLeastWord)));
    *row.weight_unit = largest_word / kWord + simd::sum(wrong);
    const F per_unit = set(kWord / largest_word);
    for (int v = at.first; v < at.last; ++v)
      store_words(reinterpret_cast<int16_t*>(narrow) + v * F::N, load(p + v * F::N) * per_unit);
  }
  store(row.lanes, sum);
}

// (max, sum, o) <- itself merged with the next key block's.
inline void merge(float& max, float& sum, float* o, float block_max, float block_sum, const float* block_o,
                  int64_t Ep) {
  using namespace simd;
  const float both = max > block_max ? max : block_max;
  const F a = weight_of<false>(set(max - both)), b = weight_of<false>(set(block_max - both));
  alignas(64) float lane[2][F::N];
  store(lane[0], a);
  store(lane[1], b);
  sum = sum * lane[0][0] + block_sum * lane[1][0];
  max = both;
  for (int64_t e = 0; e < Ep; e += F::N) store(o + e, fma(load(block_o + e), b, load(o + e) * a));
}

// out = o / sum, by the inverse of sum: divisions of vectors are slow. Adding zero turns a -0 into 0.
inline void finish(float* out, const float* o, float sum, int64_t E) {
  using namespace simd;
  const F inverse = set(1.0f / sum);
  int64_t e = 0;
  for (; e + F::N <= E; e += F::N) store(out + e, fma(load(o + e), inverse, zero()));
  if (e < E) store_n(out + e, fma(load(o + e), inverse, zero()), int(E - e));
}

}  // namespace pyllm::PYLLM_ISA
