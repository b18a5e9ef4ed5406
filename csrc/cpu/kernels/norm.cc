// Layer norm and RMS norm, with the residual addition before them.
#include "cpu/kernels/math.h"
#include "cpu/kernels/norm_plan.h"
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

// Of one row: what is taken off each value, and what the rest is then multiplied with.
struct Statistics {
  F mean, scale;
};

template <class Value>
inline Statistics statistics(NormKind kind, float eps, int64_t n, Value&& value) {
  const F one = set(1.0f), size = set(float(n));
  const F mean = kind == NormKind::rms ? zero() : set(sum_terms(n, value)) / size;
  const float squares = kind == NormKind::rms ? sum_terms(n,
                                                          [&](int64_t i, int count) {
                                                            const F v = value(i, count);
                                                            return v * v;
                                                          })
                                              : sum_terms(n, [&](int64_t i, int count) {
                                                  const F v = (value(i, count) - mean) * ones(count);
                                                  return v * v;
                                                });
  return {mean, one / sqrt(set(squares) / size + set(eps))};
}

template <class Value>
inline void norm_row(const NormArgs& a, float* y, Value&& value) {
  const Statistics row = statistics(a.kind, a.eps, a.dim, value);
  write_row(y, a.weight, a.bias, a.dim, row.mean, row.scale, value);
}

// dx = scale (g - mean(g) - xhat mean(g xhat)) + residual with xhat = (x - mean) scale, g = dy weight; rms: without mean(g).
// dweight += dy xhat, dbias += dy.
inline void norm_row_backward(const NormBackwardArgs& a, float* dx, const float* dy, const float* x,
                              const float* residual, float* dweight, float* dbias) {
  const int64_t n = a.dim;
  const Statistics row = statistics(a.kind, a.eps, n, [=](int64_t i, int count) { return load_up_to(x + i, count); });
  const F size = set(float(n));
  const auto normal = [=](int64_t i, int count) { return (load_up_to(x + i, count) - row.mean) * row.scale; };
  const auto gradient = [&](int64_t i, int count) {
    const F g = load_up_to(dy + i, count);
    return a.weight ? g * load_up_to(a.weight + i, count) : g;
  };
  const F along = set(sum_terms(n, [&](int64_t i, int count) { return gradient(i, count) * normal(i, count); })) / size;
  const F mean = a.kind == NormKind::rms ? zero() : set(sum_terms(n, gradient)) / size;
  for_vectors(n, [&](int64_t i, int count) {
    const F xhat = normal(i, count), g = load_up_to(dy + i, count);
    if (dweight) store_up_to(dweight + i, load_up_to(dweight + i, count) + g * xhat, count);
    if (dbias) store_up_to(dbias + i, load_up_to(dbias + i, count) + g, count);
    F d = (gradient(i, count) - mean - xhat * along) * row.scale;
    if (residual) d = d + load_up_to(residual + i, count);
    store_up_to(dx + i, d, count);
  });
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

void norm_backward(const NormBackwardArgs& a, Parallel& pool) {
  if (a.dim == 0) return;
  const cpu::NormPlan plan(a.rows * a.heads, a.dim);
  float* partials = static_cast<float*>(a.workspace);  // [chunks][2][padded dim]
  parallel_for(pool, plan.chunks, [&](int64_t chunk, int) {
    float *dweight = partials + 2 * chunk * plan.stride, *dbias = dweight + plan.stride;
    if (a.dweight) std::memset(dweight, 0, size_t(a.dim) * sizeof(float));
    if (a.dbias) std::memset(dbias, 0, size_t(a.dim) * sizeof(float));
    for (int64_t r = plan.begin(chunk); r < plan.begin(chunk + 1); ++r) {
      const int64_t t = r / a.heads, offset = r % a.heads * a.dim;
      norm_row_backward(a, a.dx + t * a.dx_stride + offset, a.dy + t * a.dy_stride + offset,
                        a.x + t * a.x_stride + offset,
                        a.residual ? a.residual + t * a.residual_stride + offset : nullptr,
                        a.dweight ? dweight : nullptr, a.dbias ? dbias : nullptr);
    }
  });
  const auto add_partials = [&](float* to, const float* from) {
    for_vectors(a.dim, [&](int64_t i, int count) {
      F total = zero();
      for (int64_t chunk = 0; chunk < plan.chunks; ++chunk)
        total = total + load_up_to(from + 2 * chunk * plan.stride + i, count);
      store_up_to(to + i, load_up_to(to + i, count) + total, count);
    });
  };
  if (a.dweight) add_partials(a.dweight, partials);
  if (a.dbias) add_partials(a.dbias, partials + plan.stride);
}

}  // namespace pyllm::PYLLM_ISA
