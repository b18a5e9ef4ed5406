// AVX2 + FMA + F16C. See simd.h for the contract.
#pragma once
#include <immintrin.h>
#define PYLLM_HAS_BF16_DOT 0
#define PYLLM_HAS_VNNI 0

namespace pyllm::PYLLM_ISA::simd {

struct F {
  static constexpr int N = 8;
  __m256 v;
};

static inline __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

static inline F zero() { return {_mm256_setzero_ps()}; }
static inline F set(float a) { return {_mm256_set1_ps(a)}; }
static inline F load(const float* p) { return {_mm256_loadu_ps(p)}; }
static inline F load_n(const float* p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
static inline void store(float* p, F a) { _mm256_storeu_ps(p, a.v); }
static inline void store_n(float* p, F a, int n) { _mm256_maskstore_ps(p, first(n), a.v); }

static inline F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline F operator/(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
static inline F min(F a, F b) { return {_mm256_min_ps(a.v, b.v)}; }
static inline F max(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
static inline F abs(F a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
static inline F sqrt(F a) { return {_mm256_sqrt_ps(a.v)}; }
static inline F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
static inline F round(F a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
static inline F ldexp(F a, F e) {
  const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(e.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(bits))};
}
static inline F select_gt(F a, F b, F x, F y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ))};
}

// Counted 16-bit loads and stores go through a small buffer: AVX2 has no masked ones.
static inline __m128i load_u16_n(const uint16_t* p, int n) {
  alignas(16) uint16_t buffer[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  std::memcpy(buffer, p, size_t(n) * 2);
  return _mm_load_si128((const __m128i*)buffer);
}
static inline void store_u16_n(uint16_t* p, __m128i h, int n) {
  alignas(16) uint16_t buffer[8];
  _mm_store_si128((__m128i*)buffer, h);
  std::memcpy(p, buffer, size_t(n) * 2);
}

static inline F widen_bf16(__m128i h) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))}; }
static inline F load_bf16(const uint16_t* p) { return widen_bf16(_mm_loadu_si128((const __m128i*)p)); }
static inline F load_bf16_n(const uint16_t* p, int n) { return widen_bf16(load_u16_n(p, n)); }
static inline F load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
static inline F load_f16_n(const uint16_t* p, int n) { return {_mm256_cvtph_ps(load_u16_n(p, n))}; }

// Nearest even; NaN stays NaN (quieted), denormals are kept.
static inline __m256i bf16_bits(F a) {  // in the upper halves
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, quiet, nan);
}
static inline __m128i narrow_bf16(F a) {
  const __m256i high = _mm256_srli_epi32(bf16_bits(a), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  return _mm256_castsi256_si128(packed);
}
static inline void store_bf16(uint16_t* p, F a) { _mm_storeu_si128((__m128i*)p, narrow_bf16(a)); }
static inline void store_bf16_n(uint16_t* p, F a, int n) { store_u16_n(p, narrow_bf16(a), n); }
static inline __m128i narrow_f16(F a) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline void store_f16(uint16_t* p, F a) { _mm_storeu_si128((__m128i*)p, narrow_f16(a)); }
static inline void store_f16_n(uint16_t* p, F a, int n) { store_u16_n(p, narrow_f16(a), n); }

static inline void load_bf16_pairs(const uint16_t* p, F& even, F& odd) {
  const __m256i pairs = _mm256_loadu_si256((const __m256i*)p);
  even.v = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  odd.v = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))));
}

static inline void store_bf16_pairs(uint16_t* p, F even, F odd) {
  const __m256i high = _mm256_and_si256(bf16_bits(odd), _mm256_set1_epi32(int(0xffff0000)));
  _mm256_storeu_si256((__m256i*)p, _mm256_or_si256(high, _mm256_srli_epi32(bf16_bits(even), 16)));
}

static inline float sum(F a) {
  const __m128 h = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 q = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
static inline float max(F a) {
  const __m128 h = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 q = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}

// Held as a vector of int: gcc 12 copies and spills integer accumulators of the intrinsics' own types.
typedef int Lanes __attribute__((vector_size(32)));
struct I {
  Lanes v;
};
static inline I set_bytes(int a) { return {(Lanes)_mm256_set1_epi8(char(a))}; }
static inline I dot_bytes(I acc, I x, I w) {
  return {acc.v + (Lanes)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)x.v, (__m256i)w.v), _mm256_set1_epi16(1))};
}
static inline I dot_words(I acc, I x, I w) { return {acc.v + (Lanes)_mm256_madd_epi16((__m256i)x.v, (__m256i)w.v)}; }
static inline I load_i8_words(const int8_t* p) {
  return {(Lanes)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p))};
}
static inline void store_words(int16_t* p, F a) {
  const __m256i v = _mm256_cvtps_epi32(a.v);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}
static inline I load_bytes(const void* p) { return {(Lanes)_mm256_loadu_si256((const __m256i*)p)}; }
static inline F to_float(I a) { return {_mm256_cvtepi32_ps((__m256i)a.v)}; }
static inline I to_int(F a) { return {(Lanes)_mm256_cvtps_epi32(a.v)}; }
static inline F load_u8(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
}
static inline void store_bytes(int8_t* p, F a) {
  const __m256i v = _mm256_cvtps_epi32(a.v);
  const __m128i h = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(h, h));
}

// |w - 128| <= 128 times x with the sign of w - 128: two such products never exceed 16 bits.
constexpr int kByteOffset = 128;
struct OffsetBytes {
  Lanes signed_, magnitude;
};
static inline OffsetBytes load_offset_bytes(const void* p) {
  const __m256i w = _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)p), _mm256_set1_epi8(char(0x80)));
  return {(Lanes)w, (Lanes)_mm256_abs_epi8(w)};
}
static inline I dot_offset(I acc, OffsetBytes w, I x) {
  return dot_bytes(acc, {w.magnitude}, {(Lanes)_mm256_sign_epi8((__m256i)x.v, (__m256i)w.signed_)});
}

static inline void opaque(I& a) { __asm__ volatile("" : "+x"(a.v)); }
static inline int32_t sum(I a) {
  const __m128i h = _mm_add_epi32(_mm256_castsi256_si128((__m256i)a.v), _mm256_extracti128_si256((__m256i)a.v, 1));
  const __m128i q = _mm_add_epi32(h, _mm_unpackhi_epi64(h, h));
  return _mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 1)));
}

}  // namespace pyllm::PYLLM_ISA::simd
