// x86-64-v2: SSE4.2, no FMA, no F16C (half precision is converted by integer arithmetic). See simd.h for the contract.
#pragma once
#include <nmmintrin.h>
#define PYLLM_HAS_BF16_DOT 0
#define PYLLM_HAS_VNNI 0

namespace pyllm::PYLLM_ISA::simd {

struct F {
  static constexpr int N = 4;
  __m128 v;
};

static inline F zero() { return {_mm_setzero_ps()}; }
static inline F set(float a) { return {_mm_set1_ps(a)}; }
static inline F load(const float* p) { return {_mm_loadu_ps(p)}; }
static inline void store(float* p, F a) { _mm_storeu_ps(p, a.v); }
static inline F load_n(const float* p, int n) {
  alignas(16) float buffer[4] = {0, 0, 0, 0};
  std::memcpy(buffer, p, size_t(n) * 4);
  return {_mm_load_ps(buffer)};
}
static inline void store_n(float* p, F a, int n) {
  alignas(16) float buffer[4];
  _mm_store_ps(buffer, a.v);
  std::memcpy(p, buffer, size_t(n) * 4);
}

static inline F operator+(F a, F b) { return {_mm_add_ps(a.v, b.v)}; }
static inline F operator-(F a, F b) { return {_mm_sub_ps(a.v, b.v)}; }
static inline F operator*(F a, F b) { return {_mm_mul_ps(a.v, b.v)}; }
static inline F operator/(F a, F b) { return {_mm_div_ps(a.v, b.v)}; }
static inline F min(F a, F b) { return {_mm_min_ps(a.v, b.v)}; }
static inline F max(F a, F b) { return {_mm_max_ps(a.v, b.v)}; }
static inline F abs(F a) { return {_mm_andnot_ps(_mm_set1_ps(-0.0f), a.v)}; }
static inline F sqrt(F a) { return {_mm_sqrt_ps(a.v)}; }
static inline F fma(F a, F b, F c) { return a * b + c; }
static inline F round(F a) { return {_mm_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
static inline F ldexp(F a, F e) {
  const __m128i bits = _mm_slli_epi32(_mm_add_epi32(_mm_cvtps_epi32(e.v), _mm_set1_epi32(127)), 23);
  return {_mm_mul_ps(a.v, _mm_castsi128_ps(bits))};
}
static inline F select_gt(F a, F b, F x, F y) { return {_mm_blendv_ps(y.v, x.v, _mm_cmpgt_ps(a.v, b.v))}; }

static inline __m128i load_u16(const uint16_t* p) { return _mm_loadl_epi64((const __m128i*)p); }
static inline __m128i load_u16_n(const uint16_t* p, int n) {
  uint16_t buffer[4] = {0, 0, 0, 0};
  std::memcpy(buffer, p, size_t(n) * 2);
  return load_u16(buffer);
}
static inline void store_u16_n(uint16_t* p, __m128i h, int n) {
  uint16_t buffer[4];
  _mm_storel_epi64((__m128i*)buffer, h);
  std::memcpy(p, buffer, size_t(n) * 2);
}

static inline F widen_bf16(__m128i h) { return {_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(h), 16))}; }
static inline F load_bf16(const uint16_t* p) { return widen_bf16(load_u16(p)); }
static inline F load_bf16_n(const uint16_t* p, int n) { return widen_bf16(load_u16_n(p, n)); }

// Exact: the exponent is rebased by a multiplication with 2^112, which also normalises denormals; inf and NaN keep theirs.
static inline F widen_f16(__m128i h) {
  const __m128i w = _mm_cvtepu16_epi32(h);
  const __m128i magnitude = _mm_and_si128(w, _mm_set1_epi32(0x7fff));
  const __m128i sign = _mm_slli_epi32(_mm_and_si128(w, _mm_set1_epi32(0x8000)), 16);
  const __m128 scaled =
      _mm_mul_ps(_mm_castsi128_ps(_mm_slli_epi32(magnitude, 13)), _mm_castsi128_ps(_mm_set1_epi32((127 + 112) << 23)));
  const __m128i special = _mm_cmpgt_epi32(magnitude, _mm_set1_epi32(0x7bff));
  const __m128i value = _mm_or_si128(_mm_castps_si128(scaled), _mm_and_si128(special, _mm_set1_epi32(0x7f800000)));
  return {_mm_castsi128_ps(_mm_or_si128(value, sign))};
}
static inline F load_f16(const uint16_t* p) { return widen_f16(load_u16(p)); }
static inline F load_f16_n(const uint16_t* p, int n) { return widen_f16(load_u16_n(p, n)); }

// Nearest even; NaN stays NaN (quieted), denormals are kept.
static inline __m128i bf16_bits(F a) {  // in the upper halves
  const __m128i bits = _mm_castps_si128(a.v);
  const __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
  const __m128i rounded = _mm_add_epi32(bits, _mm_add_epi32(odd, _mm_set1_epi32(0x7fff)));
  const __m128i quiet = _mm_or_si128(bits, _mm_set1_epi32(0x400000));
  const __m128i nan = _mm_castps_si128(_mm_cmpunord_ps(a.v, a.v));
  return _mm_blendv_epi8(rounded, quiet, nan);
}
static inline __m128i narrow_bf16(F a) {
  const __m128i high = _mm_srli_epi32(bf16_bits(a), 16);
  return _mm_packus_epi32(high, high);
}
static inline void store_bf16(uint16_t* p, F a) { _mm_storel_epi64((__m128i*)p, narrow_bf16(a)); }
static inline void store_bf16_n(uint16_t* p, F a, int n) { store_u16_n(p, narrow_bf16(a), n); }

// One value to half precision, nearest even, overflow to infinity, NaN quieted.
static inline uint16_t half_from_float(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // denormal: adding 0.5 aligns the last kept bit with the last bit of the sum
    float m;
    std::memcpy(&m, &magnitude, 4);
    m += 0.5f;
    uint32_t b;
    std::memcpy(&b, &m, 4);
    return uint16_t(sign | (b - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return uint16_t(sign | ((rounded - 0x38000000u) >> 13));
}
static inline void store_f16_n(uint16_t* p, F a, int n) {
  alignas(16) float buffer[4];
  _mm_store_ps(buffer, a.v);
  for (int i = 0; i < n; ++i) p[i] = half_from_float(buffer[i]);
}
static inline void store_f16(uint16_t* p, F a) { store_f16_n(p, a, 4); }

static inline void load_bf16_pairs(const uint16_t* p, F& even, F& odd) {
  const __m128i pairs = _mm_loadu_si128((const __m128i*)p);
  even.v = _mm_castsi128_ps(_mm_slli_epi32(pairs, 16));
  odd.v = _mm_castsi128_ps(_mm_and_si128(pairs, _mm_set1_epi32(int(0xffff0000))));
}

static inline void store_bf16_pairs(uint16_t* p, F even, F odd) {
  const __m128i high = _mm_and_si128(bf16_bits(odd), _mm_set1_epi32(int(0xffff0000)));
  _mm_storeu_si128((__m128i*)p, _mm_or_si128(high, _mm_srli_epi32(bf16_bits(even), 16)));
}

static inline float sum(F a) {
  const __m128 q = _mm_add_ps(a.v, _mm_movehl_ps(a.v, a.v));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
static inline float max(F a) {
  const __m128 q = _mm_max_ps(a.v, _mm_movehl_ps(a.v, a.v));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}

// Held as a vector of int: gcc 12 copies and spills integer accumulators of the intrinsics' own types.
typedef int Lanes __attribute__((vector_size(16)));
struct I {
  Lanes v;
};
static inline I set_bytes(int a) { return {(Lanes)_mm_set1_epi8(char(a))}; }
static inline I dot_bytes(I acc, I x, I w) {
  return {acc.v + (Lanes)_mm_madd_epi16(_mm_maddubs_epi16((__m128i)x.v, (__m128i)w.v), _mm_set1_epi16(1))};
}
static inline I dot_words(I acc, I x, I w) { return {acc.v + (Lanes)_mm_madd_epi16((__m128i)x.v, (__m128i)w.v)}; }
static inline I load_i8_words(const int8_t* p) {
  return {(Lanes)_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p))};
}
static inline void store_words(int16_t* p, F a) {
  const __m128i v = _mm_cvtps_epi32(a.v);
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi32(v, v));
}
static inline I load_bytes(const void* p) { return {(Lanes)_mm_loadu_si128((const __m128i*)p)}; }
static inline F to_float(I a) { return {_mm_cvtepi32_ps((__m128i)a.v)}; }
static inline I to_int(F a) { return {(Lanes)_mm_cvtps_epi32(a.v)}; }
static inline F load_u8(const uint8_t* p) {
  int bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return {_mm_cvtepi32_ps(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(bytes)))};
}
static inline void store_bytes(int8_t* p, F a) {
  const __m128i h = _mm_packs_epi32(_mm_cvtps_epi32(a.v), _mm_setzero_si128());
  const int bytes = _mm_cvtsi128_si32(_mm_packs_epi16(h, h));
  std::memcpy(p, &bytes, sizeof bytes);
}

// |w - 128| <= 128 times x with the sign of w - 128: two such products never exceed 16 bits.
constexpr int kByteOffset = 128;
struct OffsetBytes {
  Lanes signed_, magnitude;
};
static inline OffsetBytes load_offset_bytes(const void* p) {
  const __m128i w = _mm_xor_si128(_mm_loadu_si128((const __m128i*)p), _mm_set1_epi8(char(0x80)));
  return {(Lanes)w, (Lanes)_mm_abs_epi8(w)};
}
static inline I dot_offset(I acc, OffsetBytes w, I x) {
  return dot_bytes(acc, {w.magnitude}, {(Lanes)_mm_sign_epi8((__m128i)x.v, (__m128i)w.signed_)});
}

static inline void opaque(I& a) { __asm__ volatile("" : "+x"(a.v)); }
static inline int32_t sum(I a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }

}  // namespace pyllm::PYLLM_ISA::simd
