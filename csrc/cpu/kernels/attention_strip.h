// A strip of rows that see the same places of a float32 page, from the first one on: scores stay in registers until they
// are weights. All sums are the chains of page_tile and weigh_scores, so that both ways give the same bits.
//
// For levels whose registers hold the scores of kTileRows rows by a page.
#pragma once
#include "cpu/kernels/attention_softmax.h"
#include "cpu/kernels/attention_tile.h"

namespace pyllm::PYLLM_ISA {

constexpr int kPageVectors = kBlockTokens / simd::F::N;
constexpr bool kStripsFit = kPageVectors <= tile_vectors(kTileRows);

// The rows, and what the key block has given them so far.
struct UniformStrip {
  const float* q;  // [rows][Ep], scaled
  float* max;      // [rows]
  float* lanes;    // [rows][kSumLanes]
  float* o;        // [rows][Ep]
  int64_t steps;   // over channels of q and keys
  int64_t Ep;
  int64_t places;  // of the page, that they see
};

// Multiplies with keys and turns scores into weights p[R][kBlockTokens]; V vectors of them. As many bytes as are read are
// asked for from `ahead` on.
template <int R, int V>
PYLLM_NOINLINE void weigh_strip(float* p, const UniformStrip& strip, const PageOperand<float>& keys,
                                const char* ahead) {
  using namespace simd;
  constexpr int kGroupVectors = kKeyGroup / F::N;
  const int64_t q_stride = strip.Ep;
  const float *q = strip.q, *key = keys.data;
  F score[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) score[r][v] = zero();
  }
  for (int64_t s = 0; s < strip.steps; ++s, ++q, key += kKeyGroup, ahead += V * 64) {
    F k[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      __builtin_prefetch(ahead + v * 64, 0, 2);
      k[v] = load(key + v / kGroupVectors * keys.group + v % kGroupVectors * F::N);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const F x = set(q[r * q_stride]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) score[r][v] = fma(x, k[v], score[r][v]);
    }
  }
  const int64_t last = (V - 1) * F::N;
  if (strip.places < last + F::N) {
    const F end = set(float(strip.places - last) - 0.5f);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) score[r][V - 1] = select_gt(end, to_float(places()), score[r][V - 1], set(-kInfinity));
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    F largest = set(-kInfinity);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) largest = simd::max(largest, score[r][v]);
    float* lanes = strip.lanes + r * cpu::kSumLanes;
    const F max = set(raise_max(simd::max(largest), strip.max + r, lanes, strip.o + r * strip.Ep, strip.Ep));
    F sum = load(lanes);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const F weight = weight_of<false>(score[r][v] - max);
      sum = sum + weight;
      store(p + r * kBlockTokens + v * F::N, weight);
    }
    store(lanes, sum);
  }
}

// o[R][C vectors] += weights p[R][kBlockTokens] x values, rows of `stride`.
template <int R, int C>
PYLLM_NOINLINE void add_values(float* o, const float* p, const float* values, int64_t stride, int64_t count,
                               const char* ahead) {
  using namespace simd;
  F sum[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) sum[r][c] = load(o + r * stride + c * F::N);
  }
  for (int64_t t = 0; t < count; ++t, ++p, values += stride, ahead += C * 64) {
    F value[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      __builtin_prefetch(ahead + c * 64, 0, 2);
      value[c] = load(values + c * F::N);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const F weight = set(p[r * kBlockTokens]);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) sum[r][c] = fma(weight, value[c], sum[r][c]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) store(o + r * stride + c * F::N, sum[r][c]);
  }
}

// One page for up to kTileRows rows; `ahead_keys` and `ahead_values` are what will be read next, or these again.
inline void attend_uniform(int rows, const UniformStrip& strip, const PageOperand<float>& keys, const float* values,
                           const char* ahead_keys, const char* ahead_values) {
  constexpr int kColumns = tile_vectors(kTileRows);
  alignas(64) float p[kTileRows * kBlockTokens];
  with_constant<kTileRows>(rows, [&](auto rows_tag) {
    constexpr int R = decltype(rows_tag)::value;
    with_constant<kPageVectors>(int((strip.places + F::N - 1) / F::N), [&](auto vectors) {
      weigh_strip<R, decltype(vectors)::value>(p, strip, keys, ahead_keys);
    });
    for (int64_t e = 0; e < strip.Ep; e += kColumns * F::N) {
      with_constant<kColumns>(int(min_of(kColumns, (strip.Ep - e) / F::N)), [&](auto columns) {
        add_values<R, decltype(columns)::value>(strip.o + e, p, values + e, strip.Ep, strip.places, ahead_values);
      });
      ahead_values += kColumns * 64 * strip.places;
    }
  });
}

}  // namespace pyllm::PYLLM_ISA
