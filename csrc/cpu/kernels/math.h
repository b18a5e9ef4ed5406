// Elementary functions and activations over the float vector. Every lane is computed by the same operations, so a
// value's bits do not depend on where in a vector, or in a counted tail, it stands.
//
// The polynomials are minimax fits of the relative error, found with the Remez exchange in 50-digit arithmetic and
// rounded to float32; the error named beside each is that of the polynomial, before rounding.
#pragma once
#include "cpu/kernels/kernel.h"

namespace pyllm::PYLLM_ISA {

using simd::F;

static inline F load_up_to(const float* p, int n) { return n == F::N ? simd::load(p) : simd::load_n(p, n); }
static inline void store_up_to(float* p, F v, int n) { n == F::N ? simd::store(p, v) : simd::store_n(p, v, n); }

// 1 in the first n lanes, 0 in the others: keeps a counted tail out of a sum.
constexpr float kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
static_assert(F::N <= 16);
static inline F ones(int n) { return simd::load_n(kOnes, n); }

// e^x = 2^n (1 + rest): n = round(x / ln 2), rest = e^r - 1 for |r| <= ln 2 / 2, of small relative error itself;
// e^r = 1 + r + r^2 q(r), q of degree 4 (3.1e-9).
struct SplitExp {
  F n, rest;
};
static inline SplitExp split_exp(F x) {
  const F n = round(x * simd::set(1.44269504f));
  // ln 2 in two parts, the first short enough that n times it is exact.
  const F r = fma(n, simd::set(2.12194440e-4f), fma(n, simd::set(-0.693359375f), x));
  F q = simd::set(0x1.6a2434p-10f);
  q = fma(q, r, simd::set(0x1.1239e2p-7f));
  q = fma(q, r, simd::set(0x1.5558f2p-5f));
  q = fma(q, r, simd::set(0x1.555492p-3f));
  q = fma(q, r, simd::set(0x1.fffffcp-2f));
  return {n, fma(r * r, q, r)};
}

// e^x within about 1 ulp; exact 0 below -104, denormals above it, inf above 88.73, NaN stays.
static inline F exp(F x) {
  x = max(simd::set(-105.0f),
          min(simd::set(89.0f), x));  // constants first: min and max return the second operand for NaN
  const auto [n, rest] = split_exp(x);
  const F e = rest + simd::set(1.0f);
  // 2^n in two steps, for n runs from -151 to 128: past the exponents of float32 at both ends.
  const F half = round(n * simd::set(0.5f));
  return ldexp(ldexp(e, half), n - half);
}

// x / (1 + e^-z), computed from e^-|z|, which cannot overflow: relative error stays small on both sides.
static inline F logistic_times(F x, F z) {
  const F e = exp(simd::zero() - abs(z));
  return select_gt(simd::zero(), z, x * e, x) / (simd::set(1.0f) + e);
}

static inline F relu(F x) { return max(simd::zero(), x); }

// Of the normal distribution at -a, a = |x| held at 12.5: bell = e^(-a^2/2), and tail, the distribution function, as
// bell p(u) / (a + 2.5), u = (a - 2.5) / (a + 2.5), p of degree 7 fitted for a <= 8 (5.9e-8); its relative error is below
// 8e-7 up to 5. From 12.5 on both are 0: they are below 2e-34, and a little further products would become denormal, which
// are slow.
struct Normal {
  F a, tail, bell;
};
static inline Normal normal(F x) {
  const F one = simd::set(1.0f), end = simd::set(12.5f), a = min(end, abs(x));
  const F w = one / (a + simd::set(2.5f)), u = fma(w, simd::set(-5.0f), one);
  F p = simd::set(0x1.897a56p-11f);
  p = fma(p, u, simd::set(0x1.33ed92p-9f));
  p = fma(p, u, simd::set(-0x1.b561fcp-10f));
  p = fma(p, u, simd::set(-0x1.0beedep-6f));
  p = fma(p, u, simd::set(0x1.2f086ap-7f));
  p = fma(p, u, simd::set(0x1.0e4dfep-3f));
  p = fma(p, u, simd::set(-0x1.bc19e2p-2f));
  p = fma(p, u, simd::set(0x1.69cee8p-1f));
  // bell = 2^n 2^r with n + r = -a^2 log2(e) / 2, whose factor is in two parts; adding and taking off 1.5 * 2^23 rounds
  // to n. 2^r as in attention_softmax.h, but of degree 5 (1.1e-7).
  const F square = a * a, shift = simd::set(0x1.8p23f), shifted = fma(square, simd::set(-0.72134752f), shift);
  const F n = shifted - shift;
  const F r = fma(square, simd::set(-9.629815e-9f), fma(square, simd::set(-0.72134752f), shift - shifted));
  F power = simd::set(0x1.5bba14p-10f);
  power = fma(power, r, simd::set(0x1.3cea88p-7f));
  power = fma(power, r, simd::set(0x1.c6b752p-5f));
  power = fma(power, r, simd::set(0x1.ebf9bcp-3f));
  power = fma(power, r, simd::set(0x1.62e42ap-1f));
  power = fma(power, r, one);
  const F bell = select_gt(end, a, ldexp(power, n), simd::zero());
  return {a, bell * (p * w), bell};
}

// x times the distribution function: x or 0, less a times the tail.
static inline F gelu_erf(F x) {
  const Normal n = normal(x);
  return fma(simd::zero() - n.a, n.tail, relu(x));
}

// 0.5 x (1 + tanh(z / 2)) = x / (1 + e^-z) with z = 2 sqrt(2 / pi) (x + 0.044715 x^3).
static inline F gelu_tanh(F x) {
  x = max(simd::set(-30.0f), x);
  return logistic_times(x, x * fma(x * x, simd::set(0.0713548163f), simd::set(1.59576912f)));
}

static inline F silu(F x) {
  x = max(simd::set(-120.0f), x);
  return logistic_times(x, x);
}

static inline F quick_gelu(F x) {
  x = max(simd::set(-120.0f), x);
  return logistic_times(x, x * simd::set(1.702f));
}

static inline F relu_squared(F x) { return relu(x) * relu(x); }

static inline F sigmoid(F x) { return logistic_times(simd::set(1.0f), x); }

// With d = e^-2|x| - 1, whose relative error is small: -d / (2 + d), and the sign of x. It is 1 from 12 on.
static inline F tanh(F x) {
  const auto [n, rest] = split_exp(min(simd::set(12.0f), abs(x)) * simd::set(-2.0f));
  const F power = ldexp(simd::set(1.0f), n), d = fma(power, rest, power - simd::set(1.0f));
  const F t = d / (simd::set(2.0f) + d);
  return select_gt(x, simd::zero(), simd::zero() - t, t);
}

// For inner loops; with_activation below turns the argument into the parameter.
template <Activation activation>
static inline F apply(F x) {
  if constexpr (activation == Activation::gelu_erf) return gelu_erf(x);
  if constexpr (activation == Activation::gelu_tanh) return gelu_tanh(x);
  if constexpr (activation == Activation::silu) return silu(x);
  if constexpr (activation == Activation::relu) return relu(x);
  if constexpr (activation == Activation::tanh) return tanh(x);
  if constexpr (activation == Activation::sigmoid) return sigmoid(x);
  if constexpr (activation == Activation::quick_gelu) return quick_gelu(x);
  if constexpr (activation == Activation::relu_squared) return relu_squared(x);
  return x;
}

static inline F apply(Activation activation, F x) {
  switch (activation) {
    case Activation::gelu_erf:
      return gelu_erf(x);
    case Activation::gelu_tanh:
      return gelu_tanh(x);
    case Activation::silu:
      return silu(x);
    case Activation::relu:
      return relu(x);
    case Activation::tanh:
      return tanh(x);
    case Activation::sigmoid:
      return sigmoid(x);
    case Activation::quick_gelu:
      return quick_gelu(x);
    case Activation::relu_squared:
      return relu_squared(x);
    case Activation::none:
      break;
  }
  return x;
}

// act(x), with the same bits as above, and its slope act'(x). Where act'(x) is 0 or 1 in float32 x is held, so that
// infinities do not become NaN.
struct Slope {
  F y, slope;
};
template <Activation activation>
static inline Slope apply_with_slope(F x) {
  using namespace simd;
  if constexpr (activation == Activation::gelu_erf) {
    const Normal n = normal(x);
    const F cdf = select_gt(x, zero(), set(1.0f) - n.tail, n.tail), inside = max(set(-30.0f), min(set(30.0f), x));
    return {gelu_erf(x), fma(inside * set(0.398942280f), n.bell, cdf)};  // 1 / sqrt(2 pi)
  }
  if constexpr (activation == Activation::gelu_tanh || activation == Activation::silu ||
                activation == Activation::quick_gelu) {
    constexpr bool cubic = activation == Activation::gelu_tanh;
    const F held = max(set(cubic ? -30.0f : -120.0f), x), inside = min(set(cubic ? 30.0f : 120.0f), held);
    // y = x s(z) with the logistic function s: y' = s (1 + x s(-z) z').
    F z = held, slope = set(1.0f);
    if constexpr (cubic) {
      z = held * fma(held * held, set(0.0713548163f), set(1.59576912f));
      slope = fma(inside * inside, set(0.214064449f), set(1.59576912f));
    } else if constexpr (activation == Activation::quick_gelu) {
      slope = set(1.702f);
      z = held * slope;
    }
    const F e = exp(zero() - abs(z)), all = set(1.0f) + e;
    const F near = select_gt(zero(), z, e, set(1.0f)) / all, far = select_gt(zero(), z, set(1.0f), e) / all;
    return {select_gt(zero(), z, held * e, held) / all, near * fma(inside * slope, far, set(1.0f))};
  }
  if constexpr (activation == Activation::sigmoid || activation == Activation::tanh) {
    // s' = e^-|x| / (1 + e^-|x|)^2, and tanh x = 2 s(2x) - 1.
    constexpr bool is_tanh = activation == Activation::tanh;
    const F e = exp(abs(x) * set(is_tanh ? -2.0f : -1.0f)), all = set(1.0f) + e;
    return {apply<activation>(x), set(is_tanh ? 4.0f : 1.0f) * e / (all * all)};
  }
  if constexpr (activation == Activation::relu) return {relu(x), select_gt(x, zero(), set(1.0f), zero())};
  if constexpr (activation == Activation::relu_squared) return {relu_squared(x), relu(x) + relu(x)};
  return {x, set(1.0f)};
}

// Calls fn(tag), where tag.value is the activation as a constant: with_activation(a, [&](auto tag) {
// apply<tag.value>(x); }).
template <Activation activation>
struct ActivationTag {
  static constexpr Activation value = activation;
};
template <class Fn>
static inline void with_activation(Activation activation, Fn&& fn) {
  switch (activation) {
    case Activation::gelu_erf:
      return fn(ActivationTag<Activation::gelu_erf>{});
    case Activation::gelu_tanh:
      return fn(ActivationTag<Activation::gelu_tanh>{});
    case Activation::silu:
      return fn(ActivationTag<Activation::silu>{});
    case Activation::relu:
      return fn(ActivationTag<Activation::relu>{});
    case Activation::tanh:
      return fn(ActivationTag<Activation::tanh>{});
    case Activation::sigmoid:
      return fn(ActivationTag<Activation::sigmoid>{});
    case Activation::quick_gelu:
      return fn(ActivationTag<Activation::quick_gelu>{});
    case Activation::relu_squared:
      return fn(ActivationTag<Activation::relu_squared>{});
    case Activation::none:
      return fn(ActivationTag<Activation::none>{});
  }
}

}  // namespace pyllm::PYLLM_ISA
