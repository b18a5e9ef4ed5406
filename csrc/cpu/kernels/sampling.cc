// The choice of the next token from a row of logits, and log-probabilities.
//
// Rows are independent and each is handled by one thread in a fixed order, so a row's token depends on nothing but the
// row and its parameters. Nothing is sorted: the k-th largest logit and the border of the nucleus are found by
// selection.
#include "core/random.h"
#include "cpu/kernels/math.h"

namespace pyllm::PYLLM_ISA {
namespace {

using namespace simd;

constexpr float kLargest = 3.40282347e+38f, kInfinity = __builtin_inff();
constexpr int64_t kBlock = kMaximaBlock;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// What is known of a row after one look: the largest logit, its first place, and whether any was NaN or +inf.
struct Peak {
  float value;
  int64_t index;  // -1 where nothing can be chosen
};

// Calls fn(i, count) for the vectors of [begin, end); count is below F::N in the last at most.
template <class Fn>
inline void for_vectors(int64_t begin, int64_t end, Fn&& fn) {
  int64_t i = begin;
  for (; i + F::N <= end; i += F::N) fn(i, F::N);
  if (i < end) fn(i, int(end - i));
}

// Maxima of the blocks of x go to maxima[ceil(n / kBlock)] where that is not null.
Peak find_peak(const float* x, int64_t n, float* maxima) {
  const F lowest = set(-kLargest);
  F poison = zero();  // becomes NaN at a NaN or +inf: 0 times it is NaN, while -inf is lifted to a finite number first
  Peak peak{-kInfinity, -1};
  int64_t best = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    F most = set(-kInfinity);
    for_vectors(begin, least(begin + kBlock, n), [&](int64_t i, int count) {
      // The lanes past a counted load are 0 and must not win: they take the first element, which is in the block.
      const F v = count == F::N ? load(x + i) : load_n(x + i, count);
      if (count == F::N) {
        most = max(most, v);
      } else {
        for (int j = 0; j < count; ++j) most = max(most, set(x[i + j]));
      }
      poison = fma(max(lowest, v), zero(), poison);
    });
    const float block = max(most);
    if (maxima) maxima[begin / kBlock] = block;
    if (block > peak.value) peak.value = block, best = begin;
  }
  const float check = sum(poison);
  if (check != check || peak.value == -kInfinity) return peak;
  for (peak.index = best; x[peak.index] != peak.value;) ++peak.index;
  return peak;
}

// One thread's scratch: sample_floats(vocab) floats.
struct Scratch {
  float* maxima;
  float* x;
  float* w;
  int32_t* ids;
  float* rest;  // what find_border has left, and its weights
  float* rest_w;

  Scratch(void* workspace, int64_t vocab, int worker) {
    maxima = static_cast<float*>(workspace) + worker * sample_floats(vocab);
    x = maxima + (vocab + kBlock - 1) / kBlock;
    w = x + vocab;
    ids = reinterpret_cast<int32_t*>(w + vocab);
    rest = w + 2 * vocab;
    rest_w = rest + vocab;
  }
};

// Walking the elements by falling x: the value of the last one before which less than `target` has been passed, and how
// much lies above that value. What is passed is w, or 1 for each element where w is null.
struct Border {
  float value;
  double above;
};

// Each round sums what lies above and at a few bars taken from the elements, then leaves those between two of the bars.
// There is no branch on the data in the loops over it, for half of these would be mispredicted.
Border find_border(const float* x, const float* w, int64_t n, double target, const Scratch& s) {
  constexpr int kBars = 4, kSample = 31;
  double passed = 0;  // above all that is left
  for (;;) {
    // Bars: four of a small sorted sample, falling.
    float sample[kSample];
    const int taken = int(least(n, kSample));
    for (int i = 0; i < taken; ++i) {
      const float v = x[i * n / taken];
      int j = i;
      for (; j > 0 && sample[j - 1] < v; --j) sample[j] = sample[j - 1];
      sample[j] = v;
    }
    float bars[kBars];
    for (int b = 0; b < kBars; ++b) bars[b] = sample[(2 * b + 1) * taken / (2 * kBars)];
    double over[kBars] = {}, reached[kBars] = {};
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      F above[kBars], from[kBars];
      for (int b = 0; b < kBars; ++b) above[b] = from[b] = zero();
      for_vectors(begin, least(begin + kBlock, n), [&](int64_t i, int count) {
        const F v = load_n(x + i, count), mass = w ? load_n(w + i, count) : ones(count);
        for (int b = 0; b < kBars; ++b) {
          above[b] = above[b] + select_gt(v, set(bars[b]), mass, zero());
          from[b] = from[b] + select_gt(set(bars[b]), v, zero(), mass);
        }
      });
      for (int b = 0; b < kBars; ++b) over[b] += sum(above[b]), reached[b] += sum(from[b]);
    }
    int b = 0;
    while (b < kBars && passed + reached[b] < target) ++b;
    if (b < kBars && passed + over[b] < target) return {bars[b], passed + over[b]};
    const float low = b < kBars ? bars[b] : -kInfinity, high = b > 0 ? bars[b - 1] : kInfinity;
    int64_t left = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float v = x[i], mass = w ? w[i] : 1.0f;
      s.rest[left] = v;
      s.rest_w[left] = mass;
      left += (v > low) & (v < high);
    }
    if (left == 0) return {high, passed + over[b - 1]};  // the target lies past the end by a rounding error
    passed += b > 0 ? reached[b - 1] : 0;
    x = s.rest;
    w = s.rest_w;
    n = left;
  }
}

// The tokens still in the race, by rising id.
struct Candidates {
  const float* x;
  const int32_t* ids;  // null: the i-th is token i
  float* w;            // probabilities up to a common factor, the largest being 1; 0 for a token that is out
  int64_t n;
};

// The largest of kBlock elements.
inline float block_max(const float* x) {
  F most = load(x);
  for (int64_t i = F::N; i < kBlock; i += F::N) most = max(most, load(x + i));
  return max(most);
}

// Copies the tokens whose `by` is at least `bar` into the scratch, with their weights where c has any; blocks without
// such a token are passed over by their maximum.
Candidates collect(const Candidates& c, const float* by, float bar, const Scratch& s) {
  int64_t count = 0;
  for (int64_t begin = 0; begin < c.n; begin += kBlock) {
    const int64_t end = least(begin + kBlock, c.n);
    if (end - begin == kBlock && block_max(by + begin) < bar) continue;
    for (int64_t i = begin; i < end; ++i) {
      const bool in = by[i] >= bar;
      s.x[count] = c.x[i];
      s.ids[count] = c.ids ? c.ids[i] : int32_t(i);
      if (c.w) s.w[count] = c.w[i];  // count <= i: where c.w is s.w it is never ahead of what is read
      count += in;
    }
  }
  return {s.x, s.ids, s.w, count};
}

// Sum in blocks: float within, double across.
double sum_of(const float* w, int64_t n) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    F s = zero();
    for_vectors(begin, least(begin + kBlock, n),
                [&](int64_t i, int count) { s = s + (count == F::N ? load(w + i) : load_n(w + i, count)); });
    total += sum(s);
  }
  return total;
}

// The first element at which the running sum passes u times the total.
int64_t draw(const float* w, int64_t n, double u) {
  const double target = u * sum_of(w, n);
  double passed = 0;
  int64_t last = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = least(begin + kBlock, n);
    const double block = sum_of(w + begin, end - begin);
    if (passed + block > target) {
      double running = passed;
      for (int64_t i = begin; i < end; ++i) {
        running += w[i];
        if (w[i] > 0) last = i;
        if (running > target) return last;
      }
      return last;  // the two sums of the block differ by their rounding
    }
    passed += block;
  }
  for (last = n - 1; w[last] <= 0;) --last;
  return last;
}

void adjust(const SampleArgs& a, int64_t r, float* x, float* kept) {
  const SampleRow& row = a.rows[r];
  if (a.history.starts) {
    for (int64_t i = a.history.starts[r]; i < a.history.starts[r + 1]; ++i) {
      float& s = x[a.history.ids[i]];
      s = s < 0 ? s * row.repetition_penalty : s / row.repetition_penalty;
      const int32_t count = a.history_counts[i];
      if (count > 0) s -= row.frequency_penalty * float(count) + row.presence_penalty;
    }
  }
  if (a.bias.starts)
    for (int64_t i = a.bias.starts[r]; i < a.bias.starts[r + 1]; ++i) x[a.bias.ids[i]] += a.bias_values[i];
  if (a.allowed.starts && a.allowed.starts[r + 1] > a.allowed.starts[r]) {
    const int32_t* ids = a.allowed.ids + a.allowed.starts[r];
    const int64_t n = a.allowed.starts[r + 1] - a.allowed.starts[r];
    for (int64_t i = 0; i < n; ++i) kept[i] = x[ids[i]];
    for (int64_t i = 0; i < a.vocab; ++i) x[i] = -kInfinity;
    for (int64_t i = 0; i < n; ++i) x[ids[i]] = kept[i];
  }
}

// The k largest and what equals the k-th. Each of the k largest block maxima is an element, so the k-th of them is a
// bar that at least k elements reach: the rest are never looked at again.
Candidates keep_top_k(const float* x, int64_t n, int64_t k, const Scratch& s) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  float bar = -kLargest;
  if (k < blocks) {
    const float kth = find_border(s.maxima, nullptr, blocks, double(k), s).value;
    if (kth > bar) bar = kth;
  }
  Candidates c = collect({x, nullptr, nullptr, n}, x, bar, s);
  if (c.n > k) c = collect({c.x, c.ids, nullptr, c.n}, c.x, find_border(c.x, nullptr, c.n, double(k), s).value, s);
  return c;
}

// Where a few bars show that the nucleus lies among a small part of the candidates: only that part.
Candidates narrow(const Candidates& c, double needed, const Scratch& s) {
  constexpr float kBars[3] = {0.1353f, 6.738e-3f, 1.234e-4f};  // e^-2, e^-5, e^-9
  double mass[3] = {}, number[3] = {};
  for (int64_t begin = 0; begin < c.n; begin += kBlock) {
    F masses[3] = {zero(), zero(), zero()}, numbers[3] = {zero(), zero(), zero()};
    for_vectors(begin, least(begin + kBlock, c.n), [&](int64_t i, int count) {
      const F w = load_n(c.w + i, count), one = ones(count);
      for (int b = 0; b < 3; ++b) {
        const F bar = set(kBars[b]);
        masses[b] = masses[b] + select_gt(bar, w, zero(), w);
        numbers[b] = numbers[b] + select_gt(bar, w, zero(), one);
      }
    });
    for (int b = 0; b < 3; ++b) mass[b] += sum(masses[b]), number[b] += sum(numbers[b]);
  }
  for (int b = 0; b < 3; ++b)
    if (mass[b] >= needed * 1.0001) return number[b] * 8 < double(c.n) ? collect(c, c.w, kBars[b], s) : c;
  return c;
}

Candidates keep_top_p(Candidates c, double top_p, const Scratch& s) {
  const double needed = top_p * sum_of(c.w, c.n);
  if (!c.ids) c = narrow(c, needed, s);
  const Border border = find_border(c.x, c.w, c.n, needed, s);
  const F value = set(border.value);
  double passed = border.above;
  for (int64_t begin = 0; begin < c.n; begin += kBlock) {
    const int64_t end = least(begin + kBlock, c.n);
    F equal = zero();
    for_vectors(begin, end, [&](int64_t i, int count) {
      const F v = load_n(c.x + i, count), w = select_gt(value, v, zero(), load_n(c.w + i, count));
      const F above = select_gt(v, value, w, zero());
      equal = equal + (w - above);
      store_n(c.w + i, passed < needed ? w : above, count);
    });
    if (passed >= needed) continue;
    const double block = sum(equal);
    if (passed + block < needed) {
      passed += block;
      continue;
    }
    for (int64_t i = begin; i < end; ++i) {  // the border runs through the equals of this block
      if (c.x[i] != border.value) continue;
      if (passed >= needed) c.w[i] = 0;
      passed += c.w[i];
    }
    if (passed < needed) passed = needed;  // the two sums of the block differ by their rounding
  }
  return c;
}

int32_t choose(const SampleRow& row, const float* x, int64_t n, const Scratch& s) {
  const Peak peak = find_peak(x, n, s.maxima);
  if (peak.index < 0 || row.temperature < kGreedyBelow) return int32_t(peak.index);
  Candidates c{x, nullptr, s.w, n};
  if (row.top_k > 0 && row.top_k < n) c = keep_top_k(x, n, row.top_k, s);
  const F top = set(peak.value), sharpness = set(1.0f / row.temperature);
  for_vectors(0, c.n, [&](int64_t i, int count) {
    const F v = count == F::N ? load(c.x + i) : load_n(c.x + i, count);
    store_n(c.w + i, exp((v - top) * sharpness), count);
  });
  if (row.top_p < 1) c = keep_top_p(c, row.top_p, s);
  if (row.min_p > 0) {
    const F bar = set(row.min_p);
    for_vectors(0, c.n, [&](int64_t i, int count) {
      const F w = load_n(c.w + i, count);
      store_n(c.w + i, select_gt(bar, w, zero(), w), count);
    });
  }
  const int64_t i = draw(c.w, c.n, uniform(row.seed, row.stream, row.position));
  return c.ids ? c.ids[i] : int32_t(i);
}

// The n largest of x, falling, into values and ids.
void find_top(float* values, int32_t* ids, int64_t top_n, const float* x, int64_t n) {
  for (int64_t j = 0; j < top_n; ++j) values[j] = -kInfinity, ids[j] = -1;
  const auto insert = [&](int64_t i) {
    int64_t j = top_n - 1;
    for (; j > 0 && values[j - 1] < x[i]; --j) values[j] = values[j - 1], ids[j] = ids[j - 1];
    values[j] = x[i];
    ids[j] = int32_t(i);
  };
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = least(begin + kBlock, n);
    if (end - begin == kBlock && block_max(x + begin) <= values[top_n - 1]) continue;
    for (int64_t i = begin; i < end; ++i)
      if (x[i] > values[top_n - 1]) insert(i);
  }
}

void logprobs_row(const LogprobsArgs& a, int64_t r) {
  const float* x = a.logits + r * a.stride;
  float* top = a.top + r * a.top_n;
  int32_t* top_ids = a.top_ids + r * a.top_n;
  const Peak peak = find_peak(x, a.vocab, nullptr);
  if (peak.index < 0) {
    a.chosen[r] = __builtin_nanf("");
    a.ranks[r] = 0;
    for (int64_t j = 0; j < a.top_n; ++j) top[j] = __builtin_nanf(""), top_ids[j] = -1;
    return;
  }
  const F most = set(peak.value), mark = set(x[a.ids[r]]);
  double total = 0, larger = 0;
  for (int64_t begin = 0; begin < a.vocab; begin += kBlock) {
    // The largest, whose terms are 1, are counted apart: beside them the others would be rounded to multiples of 2^-24.
    F peaks = zero(), terms = zero(), above = zero();
    for_vectors(begin, least(begin + kBlock, a.vocab), [&](int64_t i, int count) {
      const F v = load_n(x + i, count), one = ones(count);
      peaks = peaks + select_gt(most, v, zero(), one);
      terms = terms + select_gt(most, v, exp(v - most) * one, zero());
      above = above + select_gt(v, mark, one, zero());
    });
    total += double(sum(peaks)) + double(sum(terms));
    larger += sum(above);
  }
  const double log_total = __builtin_log(total);
  const auto logprob = [&](float v) { return float(double(v) - double(peak.value) - log_total); };
  a.chosen[r] = logprob(x[a.ids[r]]);
  a.ranks[r] = int32_t(larger) + 1;
  if (a.top_n == 0) return;
  find_top(top, top_ids, a.top_n, x, a.vocab);
  for (int64_t j = 0; j < a.top_n; ++j) top[j] = logprob(top[j]);
}

}  // namespace

void sample(const SampleArgs& a, Parallel& pool) {
  parallel_for(pool, a.count, [&](int64_t r, int worker) {
    const Scratch scratch(a.workspace, a.vocab, worker);
    float* x = a.logits + r * a.stride;
    adjust(a, r, x, scratch.x);
    a.tokens[r] = choose(a.rows[r], x, a.vocab, scratch);
  });
}

void logprobs(const LogprobsArgs& a, Parallel& pool) {
  parallel_for(pool, a.count, [&](int64_t r, int) { logprobs_row(a, r); });
}

}  // namespace pyllm::PYLLM_ISA
