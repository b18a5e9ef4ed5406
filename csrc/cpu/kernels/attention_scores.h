// What becomes of scores before the softmax: see AttentionScores in core/args.h.
#pragma once
#include "cpu/kernels/attention_softmax.h"
#include "cpu/kernels/math.h"

namespace pyllm::PYLLM_ISA {

// Of the scores of one query row, in units of ln 2, with the keys of one page.
class ScoreChange {
 public:
  // `distance` is from the query to the page's first key.
  ScoreChange(const AttentionScores& scores, int64_t head, int64_t distance)
      : bias_(scores.bias ? scores.bias + head * (2 * scores.reach + 1) + scores.reach : nullptr),
        slope_(scores.slopes ? scores.slopes[head] * kLog2e : 0.0f),
        distance_(distance),
        reach_(scores.reach),
        softcap_(scores.softcap * kLog2e) {}

  // The scores of places [j, j + F::N) of the page.
  F operator()(int64_t j, F score) const {
    if (capped()) score = tanh(score / simd::set(softcap_)) * simd::set(softcap_);
    if (bias_) score = fma(bias_at(distance_ + j), simd::set(kLog2e), score);
    if (slope_ != 0) {
      const F distance = simd::to_float(simd::places()) + simd::set(float(distance_ + j));
      score = fma(distance, simd::set(slope_), score);
    }
    return score;
  }

  bool capped() const { return softcap_ > 0; }

  // The slope of the soft cap, which is all that is not linear in a score.
  F slope(F score) const { return apply_with_slope<Activation::tanh>(score / simd::set(softcap_)).slope; }

 private:
  // The bias at distances [d, d + F::N).
  F bias_at(int64_t d) const {
    if (d >= -reach_ && d + F::N - 1 <= reach_) return simd::load(bias_ + d);
    if (d >= reach_) return simd::set(bias_[reach_]);
    if (d + F::N - 1 <= -reach_) return simd::set(bias_[-reach_]);
    alignas(64) float values[F::N];
    for (int64_t i = 0; i < F::N; ++i) values[i] = bias_[max_of(-reach_, min_of(reach_, d + i))];
    return simd::load(values);
  }

  const float* bias_;  // of distance 0
  float slope_;
  int64_t distance_, reach_;
  float softcap_;
};

// The gradient of one head's bias, from those of one sequence's scores. What lies beyond the reach, which may be most of
// them, is summed in double.
class BiasGradient {
 public:
  // dbias [2 * reach + 1] is cleared, and receives its outer columns in `finish`; null: there is none.
  BiasGradient(float* dbias, int64_t reach) : dbias_(dbias ? dbias + reach : nullptr), reach_(reach) {
    if (dbias) std::memset(dbias, 0, size_t(2 * reach + 1) * sizeof(float));
  }

  // Gradients of the scores at distances [d, d + F::N).
  void add(int64_t d, F dscores) {
    if (!dbias_) return;
    if (d >= -reach_ && d + F::N - 1 <= reach_) {
      simd::store(dbias_ + d, simd::load(dbias_ + d) + dscores);
    } else if (d > reach_ || d + F::N - 1 < -reach_) {
      beyond_[d > reach_] += simd::sum(dscores);
    } else {
      alignas(64) float values[F::N];
      simd::store(values, dscores);
      for (int64_t i = 0; i < F::N; ++i) dbias_[max_of(-reach_, min_of(reach_, d + i))] += values[i];
    }
  }

  void finish() const {
    if (!dbias_) return;
    dbias_[-reach_] = float(dbias_[-reach_] + beyond_[0]);
    dbias_[reach_] = float(dbias_[reach_] + beyond_[1]);
  }

 private:
  float* dbias_;  // of distance 0
  int64_t reach_;
  double beyond_[2] = {0, 0};
};

}  // namespace pyllm::PYLLM_ISA
