// Pages as the products want them: widened once for many rows, and with values that hidden tokens cannot spoil.
#pragma once
#include "cpu/kernels/attention_rule.h"
#include "cpu/kernels/attention_tile.h"

namespace pyllm::PYLLM_ISA {

// One head's page: numbers of keys, then of values, each half followed by scales in i8.
template <class T>
struct Page {
  const T* keys;
  const T* values;
};

// A bf16 half of a page in float32's layout: `rows` runs of `width` pairs become two rows each.
inline void widen_pairs(float* to, const uint16_t* pairs, int64_t rows, int64_t width) {
  using namespace simd;
  for (int64_t i = 0; i < rows; ++i, to += 2 * width, pairs += 2 * width) {
    for (int64_t j = 0; j < width; j += F::N) {
      F even, odd;
      load_bf16_pairs(pairs + 2 * j, even, odd);
      store(to + j, even);
      store(to + width + j, odd);
    }
  }
}

// Whether a number of values, a multiple of 2 * kHeadPad, are all finite.
inline bool all_finite(const float* values, int64_t count) {
  using namespace simd;
  F wrong = zero();  // x * 0 is 0 unless x is infinite or NaN
  for (int64_t i = 0; i < count; i += F::N) wrong = fma(load(values + i), zero(), wrong);
  return sum(wrong) == 0.0f;
}
inline bool all_finite(const uint16_t* values, int64_t count) {
  using namespace simd;
  F wrong = zero();
  for (int64_t i = 0; i < count; i += 2 * F::N) {
    F even, odd;
    load_bf16_pairs(values + i, even, odd);
    wrong = fma(even, zero(), fma(odd, zero(), wrong));
  }
  return sum(wrong) == 0.0f;
}
inline bool all_finite(const int8_t*, int64_t) { return true; }

// Values of the tokens that a row sees of a page, and 0 for the others. kColumn tokens stand together.
template <class W>
void copy_tokens(W* to, const W* values, int64_t Ep, int64_t column, Seen seen) {
  std::memset(to, 0, size_t(kBlockTokens * Ep) * sizeof(W));
  for (int64_t t = 0; t < kBlockTokens; ++t) {
    if (!seen.any(t, t + 1)) continue;
    const int64_t at = t / column * column * Ep + t % column;
    for (int64_t e = 0; e < Ep; ++e) to[at + e * column] = values[at + e * column];
  }
}

}  // namespace pyllm::PYLLM_ISA
