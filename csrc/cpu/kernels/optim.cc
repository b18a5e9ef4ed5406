// AdamW, and the norm of gradients: streams over flat arrays.
#include <cmath>

#include "cpu/kernels/math.h"

namespace pyllm::PYLLM_ISA {
namespace {

constexpr int64_t kChunk = 16384;  // parameters that a worker takes at a time

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The scalars of a step, as the vectors that the update multiplies with.
struct Step {
  F keep, rate, beta1, beta2, one_less_beta1, one_less_beta2, correction, eps, scale;

  Step(const double* hyper, double decay)
      : keep(simd::set(float(1.0 - hyper[0] * decay))),
        rate(simd::set(float(hyper[0] / hyper[4]))),
        beta1(simd::set(float(hyper[1]))),
        beta2(simd::set(float(hyper[2]))),
        one_less_beta1(simd::set(float(1.0 - hyper[1]))),
        one_less_beta2(simd::set(float(1.0 - hyper[2]))),
        correction(simd::set(float(1.0 / std::sqrt(hyper[5])))),
        eps(simd::set(float(hyper[3]))),
        scale(simd::set(float(hyper[6]))) {}
};

// Moments of parameters that get no gradient would sink into denormals and stay there, which cost tens of times as much.
inline F without_denormals(F x) { return select_gt(simd::set(0x1p-126f), abs(x), simd::zero(), x); }

// Parameters [i, i + n), n <= F::N; returns their new values.
inline F update(const AdamWArgs& a, const Step& s, int64_t i, int n) {
  const F g = load_up_to(a.grads + i, n) * s.scale;
  const F m = without_denormals(fma(s.beta1, load_up_to(a.m + i, n), s.one_less_beta1 * g));
  const F v = without_denormals(fma(s.beta2, load_up_to(a.v + i, n), s.one_less_beta2 * g * g));
  const F p = fma(s.keep, load_up_to(a.params + i, n), simd::zero() - s.rate * (m / fma(sqrt(v), s.correction, s.eps)));
  store_up_to(a.m + i, m, n);
  store_up_to(a.v + i, v, n);
  store_up_to(a.params + i, p, n);
  if (a.clear) store_up_to(a.grads + i, simd::zero(), n);
  return p;
}

void update_flat(const AdamWArgs& a, const Step& s, Parallel& pool) {
  parallel_for(pool, (a.count + kChunk - 1) / kChunk, [&](int64_t chunk, int) {
    const int64_t end = least(a.count, (chunk + 1) * kChunk);
    for (int64_t i = chunk * kChunk; i < end; i += F::N) update(a, s, i, int(least(F::N, end - i)));
  });
}

// Panel by panel, each in pairs of inner elements, which stand together in the narrow one.
void update_panels(const AdamWArgs& a, const Step& s, Parallel& pool) {
  constexpr int64_t kPairs = kChunk / (2 * kPanel);
  const int64_t k = a.narrow.k, pairs = (k + 1) / 2, chunks = (pairs + kPairs - 1) / kPairs;
  auto* narrow = static_cast<uint16_t*>(const_cast<void*>(a.narrow.data));
  parallel_for(pool, a.narrow.panels() * a.narrow.parts * chunks, [&](int64_t chunk, int) {
    const int64_t panel = chunk / chunks, end = least(pairs, (chunk % chunks + 1) * kPairs);
    for (int64_t pair = chunk % chunks * kPairs; pair < end; ++pair) {
      const int64_t at = (panel * k + 2 * pair) * kPanel;
      uint16_t* out = narrow + (panel * pairs + pair) * 2 * kPanel;
      for (int64_t c = 0; c < kPanel; c += F::N) {
        const F even = update(a, s, at + c, F::N);
        const F odd = 2 * pair + 1 < k ? update(a, s, at + kPanel + c, F::N) : simd::zero();
        simd::store_bf16_pairs(out + 2 * c, even, odd);
      }
    }
  });
}

}  // namespace

void adamw(const AdamWArgs& a, Parallel& pool) {
  const Step step(a.hyper, a.decay);
  a.narrow.data ? update_panels(a, step, pool) : update_flat(a, step, pool);
}

void square_norm(const SquareNormArgs& a, Parallel& pool) {
  const int64_t chunks = (a.count + kSquareChunk - 1) / kSquareChunk;
  auto* partial = static_cast<double*>(a.workspace);
  parallel_for(pool, chunks, [&](int64_t chunk, int) {
    const int64_t end = least(a.count, (chunk + 1) * kSquareChunk);
    double total = 0;
    for (int64_t i = chunk * kSquareChunk; i < end; i += kSquareBlock) {
      const float* x = a.x + i;
      const int64_t count = least(kSquareBlock, end - i);
      F s0 = simd::zero(), s1 = simd::zero(), s2 = simd::zero(), s3 = simd::zero();
      int64_t j = 0;
      for (; j + 4 * F::N <= count; j += 4 * F::N) {
        const F v0 = simd::load(x + j), v1 = simd::load(x + j + F::N);
        const F v2 = simd::load(x + j + 2 * F::N), v3 = simd::load(x + j + 3 * F::N);
        s0 = fma(v0, v0, s0);
        s1 = fma(v1, v1, s1);
        s2 = fma(v2, v2, s2);
        s3 = fma(v3, v3, s3);
      }
      for (; j < count; j += F::N) {
        const F v = load_up_to(x + j, int(least(F::N, count - j)));
        s0 = fma(v, v, s0);
      }
      total += double(simd::sum((s0 + s1) + (s2 + s3)));
    }
    partial[chunk] = total;
  });
  double total = a.out[0];
  for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial[chunk];
  a.out[0] = total;
}

}  // namespace pyllm::PYLLM_ISA
