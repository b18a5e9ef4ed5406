// Softmax cross-entropy with its gradient, and losses of single numbers. A row is read once for its maximum and sum, block by block, and once more when
// its gradient is written over it, from a second-level cache that holds rows of up to several 100,000 columns.
#include <math.h>

#include "cpu/kernels/attention_softmax.h"
#include "cpu/kernels/math.h"
#include "cpu/kernels/rows.h"

namespace pyllm::PYLLM_ISA {
namespace {

using namespace simd;

constexpr int64_t kLossBlock = 1024;  // columns whose maximum is taken before they are exponentiated
constexpr int kStreams = 4;           // vectors that are worked on side by side

struct RowSums {
  float max;
  double sum;    // of e^(x - max)
  double total;  // of x
};

// e^x for x <= 0, and 0 where it is below 2^-126. What is lost in the product matters least where e^x is small.
inline F exponential(F x) { return weight_of<false>(x * set(kLog2e)); }

// Blocks have sums of their own, which are added in double: 128k columns lose no digits.
template <bool kTotal>
inline RowSums row_sums(const float* x, int64_t n) {
  RowSums row{-3.4028235e38f, 0, 0};  // a finite start: -inf - -inf would be NaN
  for (int64_t begin = 0; begin < n; begin += kLossBlock) {
    const int64_t end = begin + kLossBlock < n ? begin + kLossBlock : n;
    F largest[kStreams], sums[kStreams], totals[kStreams];
    for (int v = 0; v < kStreams; ++v) largest[v] = set(row.max), sums[v] = totals[v] = zero();
    int64_t i = begin;
    for (; i + kStreams * F::N <= end; i += kStreams * F::N) {
#pragma GCC unroll 4
      for (int v = 0; v < kStreams; ++v) largest[v] = simd::max(largest[v], load(x + i + v * F::N));
    }
    float most = simd::max(simd::max(simd::max(largest[0], largest[1]), simd::max(largest[2], largest[3])));
    for (; i < end; ++i) most = x[i] > most ? x[i] : most;
    const F shift = set(most);
    for (i = begin; i + kStreams * F::N <= end; i += kStreams * F::N) {
#pragma GCC unroll 4
      for (int v = 0; v < kStreams; ++v) {
        const F value = load(x + i + v * F::N);
        sums[v] = sums[v] + exponential(value - shift);
        if (kTotal) totals[v] = totals[v] + value;
      }
    }
    for (; i < end; i += F::N) {
      const int count = int(end - i < F::N ? end - i : F::N);
      const F value = load_n(x + i, count);
      const F past = set(-kInfinity);  // nothing is added by the lanes behind the row
      sums[0] = sums[0] + exponential(select_gt(ones(count), zero(), value - shift, past));
      if (kTotal) totals[0] = totals[0] + value;
    }
    row.sum = row.sum * ::exp(double(row.max) - most) + sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    row.total += kTotal ? sum((totals[0] + totals[1]) + (totals[2] + totals[3])) : 0;
    row.max = most;
  }
  return row;
}

// x = e^(x - shift) * factor + part
inline void write_gradient(float* x, int64_t n, F shift, F factor, F part) {
  int64_t i = 0;
  for (; i + kStreams * F::N <= n; i += kStreams * F::N) {
#pragma GCC unroll 4
    for (int v = 0; v < kStreams; ++v) {
      float* at = x + i + v * F::N;
      store(at, fma(exponential(load(at) - shift), factor, part));
    }
  }
  for (; i < n; i += F::N) {
    const int count = int(n - i < F::N ? n - i : F::N);
    store_n(x + i, fma(exponential(load_n(x + i, count) - shift), factor, part), count);
  }
}

inline void loss_row(const CrossEntropyArgs& a, int64_t r) {
  float* x = a.logits + r * a.stride;
  const int32_t label = a.labels[r];
  if (label == kIgnoredLabel) {
    if (a.scale) std::memset(x, 0, size_t(a.vocab) * sizeof(float));
    a.loss[r] = 0;
    return;
  }
  const double smoothing = a.label_smoothing;
  const RowSums row = smoothing > 0 ? row_sums<true>(x, a.vocab) : row_sums<false>(x, a.vocab);
  const double log_sum = ::log(row.sum), lse = row.max + log_sum, target = x[label];
  double loss = (row.max - target) + log_sum;
  if (smoothing > 0) loss = (1 - smoothing) * loss + smoothing * (lse - row.total / double(a.vocab));
  a.loss[r] = float(loss + a.z_loss * lse * lse);
  if (!a.scale) return;
  const double scale = *a.scale;
  const F factor = set(float(scale * (1 + 2 * a.z_loss * lse) / row.sum));
  const F part = set(float(-scale * smoothing / double(a.vocab)));
  write_gradient(x, a.vocab, set(row.max), factor, part);
  // The label's own in double: where p is close to 1 the difference keeps its digits.
  x[label] =
      float(scale * ((1 + 2 * a.z_loss * lse) * ::exp(target - lse) - (1 - smoothing) - smoothing / double(a.vocab)));
}

struct ElementLoss {
  double loss, gradient;
};

// In double: they are few, one for a class or a token.
template <class Fn>
void element_losses(const ElementLossArgs& a, Parallel& pool, Fn&& of) {
  for_rows(pool, a.rows, a.dim, [&](int64_t r) {
    float* x = a.x + r * a.x_stride;
    const float* targets = a.targets + r * a.targets_stride;
    double total = 0;
    for (int64_t i = 0; i < a.dim; ++i) {
      const bool counts = targets[i] == targets[i];
      const ElementLoss one = counts ? of(x[i], targets[i]) : ElementLoss{0, 0};
      total += one.loss;
      if (a.scale) x[i] = float(one.gradient * double(*a.scale));
    }
    a.loss[r] = float(total);
  });
}

}  // namespace

void cross_entropy(const CrossEntropyArgs& a, Parallel& pool) {
  parallel_for(pool, a.rows, [&](int64_t r, int) { loss_row(a, r); });
}

void sigmoid_cross_entropy(const ElementLossArgs& a, Parallel& pool) {
  element_losses(a, pool, [](double x, double target) {
    const double e = ::exp(-::fabs(x)), sigmoid = (x > 0 ? 1 : e) / (1 + e);
    return ElementLoss{(x > 0 ? x : 0) - x * target + ::log1p(e), sigmoid - target};
  });
}

void squared_error(const ElementLossArgs& a, Parallel& pool) {
  element_losses(a, pool,
                 [](double x, double target) { return ElementLoss{(x - target) * (x - target), 2 * (x - target)}; });
}

}  // namespace pyllm::PYLLM_ISA
