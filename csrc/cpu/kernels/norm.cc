// Layer norm and RMS norm, with the residual addition before them.
#include "cpu/kernels/math.h"
#include "cpu/kernels/rows.h"

namespace pyllm::PYLLM_ISA {
namespace {

using namespace simd;

// Sum over i < n of term(i, count), where count is how many lanes stand before n; term gives 0 in the others.
// Four partial sums hide the latency of the addition; they are added in a fixed order.
template <class Term>
inline float sum_terms(int64_t n, Term&& term) {
  F a = zero(), b = zero(), c = zero(), d = zero();
  int64_t i = 0;
  for (; i + 4 * F::N <= n; i += 4 * F::N) {
    a = a + term(i, F::N);
    b = b + term(i + F::N, F::N);
    c = c + term(i + 2 * F::N, F::N);
    d = d + term(i + 3 * F::N, F::N);
  }
  for (; i + F::N <= n; i += F::N) a = a + term(i, F::N);
  if (i < n) b = b + term(i, int(n - i));
  return sum((a + b) + (c + d));
}

template <class Fn>
inline void for_vectors(int64_t n, Fn&& fn) {
  int64_t i = 0;
  for (; i + F::N <= n; i += F::N) fn(i, F::N);
  if (i < n) fn(i, int(n - i));
}

// y = (v - mean) * scale * weight + bias, v read through `value`. Any of the pointers may be the ones that `value`
// reads.
template <class Value>
inline void write_row(float* y, const float* weight, const float* bias, int64_t n, F mean, F scale, Value&& value) {
  for_vectors(n, [&](int64_t i, int count) {
    F v = (value(i, count) - mean) * scale;
    if (weight) v = v * load_up_to(weight + i, count);
    if (bias) v = v + load_up_to(bias + i, count);
    store_up_to(y + i, v, count);
  });
}

template <class Value>
inline void norm_row(const NormArgs& a, float* y, Value&& value) {
  const int64_t n = a.dim;
  const F one = set(1.0f), eps = set(a.eps), size = set(float(n));
  if (a.kind == NormKind::rms) {
    const float squares = sum_terms(n, [&](int64_t i, int count) {
      const F v = value(i, count);
      return v * v;
    });
    write_row(y, a.weight, a.bias, n, zero(), one / sqrt(set(squares) / size + eps), value);
  } else {
    const F mean = set(sum_terms(n, value)) / size;
    const float squares = sum_terms(n, [&](int64_t i, int count) {
      const F v = (value(i, count) - mean) * ones(count);
      return v * v;
    });
    write_row(y, a.weight, a.bias, n, mean, one / sqrt(set(squares) / size + eps), value);
  }
}

}  // namespace

void norm(const NormArgs& a, Parallel& pool) {
  for_rows(pool, a.rows * a.heads, a.dim, [&](int64_t r) {
    const int64_t t = r / a.heads, offset = r % a.heads * a.dim;
    const float* x = a.x + t * a.x_stride + offset;
    float* y = a.y + t * a.y_stride + offset;
    if (!a.residual) return norm_row(a, y, [=](int64_t i, int count) { return load_up_to(x + i, count); });
    const float* residual = a.residual + t * a.residual_stride + offset;
    const auto added = [=](int64_t i, int count) { return load_up_to(x + i, count) + load_up_to(residual + i, count); };
    if (!a.sum) return norm_row(a, y, added);
    float* sum = a.sum + t * a.sum_stride + offset;
    for_vectors(a.dim, [&](int64_t i, int count) { store_up_to(sum + i, added(i, count), count); });
    norm_row(a, y, [=](int64_t i, int count) { return load_up_to(sum + i, count); });
  });
}

}  // namespace pyllm::PYLLM_ISA
