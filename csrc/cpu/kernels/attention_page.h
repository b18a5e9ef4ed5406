// Pages as the products want them: widened once for many rows, and with values that hidden tokens cannot spoil.
#pragma once
#include "cpu/kernels/attention_tile.h"

namespace pyllm::PYLLM_ISA {

// One head's page: numbers of keys, then of values, each half followed by scales in i8.
template <class T>
struct Page {
  const T* keys;
  const T* values;
};

// A bf16 or i8 half of a page in float32's layout: `rows` runs of `width` pairs become two rows each.
template <class T>
inline void widen_pairs(float* to, const T* pairs, int64_t rows, int64_t width) {
  using namespace simd;
  for (int64_t i = 0; i < rows; ++i, to += 2 * width, pairs += 2 * width) {
    for (int64_t j = 0; j < width; j += F::N) {
      F even, odd;
      if constexpr (sizeof(T) == 2)
        load_bf16_pairs(pairs + 2 * j, even, odd);
      else
        load_i8_pairs(pairs + 2 * j, even, odd);
      store(to + j, even);
      store(to + width + j, odd);
    }
  }
}

#if PYLLM_HAS_BF16_DOT
// i8 integers as bf16, which holds them exactly. Meanwhile as many of `next` are fetched.
inline void widen_integers(uint16_t* to, const int8_t* integers, int64_t count, const int8_t* next) {
  constexpr int64_t kVector = 2 * simd::F::N;
  for (int64_t i = 0; i < count; i += 2 * kVector) {
    __builtin_prefetch(next + i, 0, 2);
    simd::store_pairs(to + i, simd::load_i8_pairs(integers + i));
    simd::store_pairs(to + i + kVector, simd::load_i8_pairs(integers + i + kVector));
  }
}
#endif

// The scales behind both halves of an i8 page: of keys, then of values.
inline void widen_scales(float* to, Page<int8_t> page, int64_t numbers) {
  for (int64_t t = 0; t < kBlockTokens; t += simd::F::N) {
    simd::store(to + t, simd::load_bf16(reinterpret_cast<const uint16_t*>(page.keys + numbers) + t));
    simd::store(to + kBlockTokens + t, simd::load_bf16(reinterpret_cast<const uint16_t*>(page.values + numbers) + t));
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

// Values of tokens [begin, end), and 0 for the page's other tokens. kColumn tokens stand together.
template <class W>
void copy_tokens(W* to, const W* values, int64_t Ep, int64_t column, int64_t begin, int64_t end) {
  std::memset(to, 0, size_t(kBlockTokens * Ep) * sizeof(W));
  for (int64_t t = begin; t < end; ++t) {
    const int64_t at = t / column * column * Ep + t % column;
    for (int64_t e = 0; e < Ep; ++e) to[at + e * column] = values[at + e * column];
  }
}

}  // namespace pyllm::PYLLM_ISA
