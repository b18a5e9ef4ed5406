// AVX-512 F/BW/CD/DQ/VL, and with BF16 where the level has it. See simd.h for the contract.
#pragma once
// gcc 12 warns of the deliberately undefined vectors in its own headers.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace pyllm::PYLLM_ISA::simd {

struct F {
  static constexpr int N = 16;
  __m512 v;
};

static inline __mmask16 first(int n) { return __mmask16((1u << n) - 1u); }

static inline F zero() { return {_mm512_setzero_ps()}; }
static inline F set(float a) { return {_mm512_set1_ps(a)}; }
static inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline F load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
static inline void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
static inline void store_n(float* p, F a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }

static inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline F abs(F a) { return {_mm512_abs_ps(a.v)}; }
static inline F sqrt(F a) { return {_mm512_sqrt_ps(a.v)}; }
static inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline F round(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
static inline F ldexp(F a, F e) { return {_mm512_scalef_ps(a.v, e.v)}; }
static inline F select_gt(F a, F b, F x, F y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), y.v, x.v)};
}

static inline F widen_bf16(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
static inline F load_bf16(const uint16_t* p) { return widen_bf16(_mm256_loadu_si256((const __m256i*)p)); }
static inline F load_bf16_n(const uint16_t* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
static inline F load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
static inline F load_f16_n(const uint16_t* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))};
}

// Nearest even; NaN stays NaN (quieted), denormals are kept.
static inline __m512i bf16_bits(F a) {  // in the upper halves
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), rounded, quiet);
}
static inline __m256i narrow_bf16(F a) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_bits(a), 16)); }
static inline void store_bf16(uint16_t* p, F a) { _mm256_storeu_si256((__m256i*)p, narrow_bf16(a)); }
static inline void store_bf16_n(uint16_t* p, F a, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow_bf16(a)); }
static inline __m256i narrow_f16(F a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline void store_f16(uint16_t* p, F a) { _mm256_storeu_si256((__m256i*)p, narrow_f16(a)); }
static inline void store_f16_n(uint16_t* p, F a, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow_f16(a)); }

static inline void load_bf16_pairs(const uint16_t* p, F& even, F& odd) {
  const __m512i pairs = _mm512_loadu_si512(p);
  even.v = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  odd.v = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
}

static inline void store_bf16_pairs(uint16_t* p, F even, F odd) {
  const __m512i high = _mm512_and_si512(bf16_bits(odd), _mm512_set1_epi32(int(0xffff0000)));
  _mm512_storeu_si512(p, _mm512_or_si512(high, _mm512_srli_epi32(bf16_bits(even), 16)));
}

static inline float sum(F a) { return _mm512_reduce_add_ps(a.v); }
static inline float max(F a) { return _mm512_reduce_max_ps(a.v); }

#if defined(PYLLM_ISA_AVX512_BF16) || defined(PYLLM_ISA_AMX_BF16)
#define PYLLM_HAS_BF16_DOT 1
struct B {
  __m512i v;
};
static inline B load_pairs(const uint16_t* p) { return {_mm512_loadu_si512(p)}; }
static inline B set_pair(uint32_t pair) { return {_mm512_set1_epi32(int(pair))}; }
static inline B round_pairs(F low, F high) { return {(__m512i)_mm512_cvtne2ps_pbh(high.v, low.v)}; }
static inline void store_pairs(uint16_t* p, B a) { _mm512_storeu_si512(p, a.v); }
static inline F round_bf16(F a) { return widen_bf16(narrow_bf16(a)); }
static inline F swap_pairs(F a) { return {_mm512_permute_ps(a.v, 0xb1)}; }
static inline F dot_bf16(F acc, B x, B w) { return {_mm512_dpbf16_ps(acc.v, (__m512bh)x.v, (__m512bh)w.v)}; }
class FlushDenormals {
 public:
  explicit FlushDenormals(bool flush) : saved_(_mm_getcsr()) {
    if (flush) _mm_setcsr(saved_ | 0x8040u);  // results, operands
  }
  ~FlushDenormals() { _mm_setcsr(saved_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned saved_;
};
#else
#define PYLLM_HAS_BF16_DOT 0
#endif

// Held as a vector of int: gcc 12 copies and spills integer accumulators of the intrinsics' own types.
typedef int Lanes __attribute__((vector_size(64)));
struct I {
  Lanes v;
};
static inline I set_bytes(int a) { return {(Lanes)_mm512_set1_epi8(char(a))}; }
#if defined(PYLLM_ISA_AVX512_BF16) || defined(PYLLM_ISA_AMX_BF16)
#define PYLLM_HAS_VNNI 1
static inline I dot_bytes(I acc, I x, I w) {
  return {(Lanes)_mm512_dpbusd_epi32((__m512i)acc.v, (__m512i)x.v, (__m512i)w.v)};
}
static inline I dot_words(I acc, I x, I w) {
  return {(Lanes)_mm512_dpwssd_epi32((__m512i)acc.v, (__m512i)x.v, (__m512i)w.v)};
}
#else
#define PYLLM_HAS_VNNI 0
static inline I dot_bytes(I acc, I x, I w) {
  return {acc.v + (Lanes)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)x.v, (__m512i)w.v), _mm512_set1_epi16(1))};
}
static inline I dot_words(I acc, I x, I w) { return {acc.v + (Lanes)_mm512_madd_epi16((__m512i)x.v, (__m512i)w.v)}; }
#endif
static inline I load_i8_words(const int8_t* p) {
  return {(Lanes)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p))};
}
static inline void store_words(int16_t* p, F a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a.v)));
}
static inline I load_bytes(const void* p) { return {(Lanes)_mm512_loadu_si512(p)}; }
static inline F to_float(I a) { return {_mm512_cvtepi32_ps((__m512i)a.v)}; }
static inline I to_int(F a) { return {(Lanes)_mm512_cvtps_epi32(a.v)}; }
static inline F load_u8(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
static inline void store_bytes(int8_t* p, F a) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

#if PYLLM_HAS_VNNI
constexpr int kByteOffset = 0;
using OffsetBytes = I;
static inline OffsetBytes load_offset_bytes(const void* p) { return load_bytes(p); }
static inline I dot_offset(I acc, OffsetBytes w, I x) { return dot_bytes(acc, w, x); }
#else
// |w - 128| <= 128 times x with the sign of w - 128: two such products never exceed 16 bits.
constexpr int kByteOffset = 128;
struct OffsetBytes {
  Lanes magnitude;
  __mmask64 negative;
};
static inline OffsetBytes load_offset_bytes(const void* p) {
  const __m512i w = _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(char(0x80)));
  return {(Lanes)_mm512_abs_epi8(w), _mm512_movepi8_mask(w)};
}
static inline I dot_offset(I acc, OffsetBytes w, I x) {
  const __m512i v = (__m512i)x.v;
  return dot_bytes(acc, {w.magnitude}, {(Lanes)_mm512_mask_sub_epi8(v, w.negative, _mm512_setzero_si512(), v)});
}
#endif

static inline void opaque(I& a) { __asm__ volatile("" : "+v"(a.v)); }
static inline int32_t sum(I a) { return _mm512_reduce_add_epi32((__m512i)a.v); }

}  // namespace pyllm::PYLLM_ISA::simd
