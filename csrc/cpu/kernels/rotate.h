// The rotation shared by rope and kv_write, so that both round alike.
#pragma once
#include "cpu/kernels/kernel.h"

namespace pyllm::PYLLM_ISA {

// y[i] = x[i] cos[i] - x[i + half] sin[i];  y[i + half] = x[i + half] cos[i] + x[i] sin[i], i < half, of one head of E
// channels; the channels from 2 * half on are copied. Inverse: with -sin. y may be x. Products are rounded before they
// are added, as the published models do.
template <bool inverse = false>
static inline void rotate(float* y, const float* x, const float* cos, const float* sin, int64_t half, int64_t E) {
  using namespace simd;
  const auto turn = [](F a, F b) { return inverse ? a + b : a - b; };
  const auto turn_back = [](F a, F b) { return inverse ? a - b : a + b; };
  const auto step = [&](int64_t i, int n) {
    const F a = load_n(x + i, n), b = load_n(x + half + i, n), c = load_n(cos + i, n), s = load_n(sin + i, n);
    store_n(y + i, turn(a * c, b * s), n);
    store_n(y + half + i, turn_back(b * c, a * s), n);
  };
  int64_t i = 0;
  for (; i + F::N <= half; i += F::N) {
    const F a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(y + i, turn(a * c, b * s));
    store(y + half + i, turn_back(b * c, a * s));
  }
  if (i < half) step(i, int(half - i));
  if (y != x) std::memcpy(y + 2 * half, x + 2 * half, size_t(E - 2 * half) * sizeof(float));
}

}  // namespace pyllm::PYLLM_ISA
