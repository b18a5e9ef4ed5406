// The float vector that kernels are written over, at the width of the ISA level being compiled. The only place for intrinsics.
//
// Each level's header defines, in namespace pyllm::PYLLM_ISA::simd:
//   struct F { static constexpr int N; ... }        N float32 lanes
//   F zero(), set(float), load(const float*), load_n(const float*, int n): lanes from n on are 0, n <= N, nothing past n is read
//   void store(float*, F), store_n(float*, F, int n)
//   F operator+ - * /, min(a, b), max(a, b), abs(a), fma(a, b, c) = a * b + c (fused except at the baseline), sqrt(a)
//   F round(a) to nearest even, F ldexp(a, e) = a * 2^e for integral e in [-126, 127] (a float vector)
//   F select_gt(a, b, x, y): a > b ? x : y per lane (false where a or b is NaN)
//   F load_bf16(const uint16_t*), load_bf16_n(p, n), load_f16, load_f16_n; store_bf16(uint16_t*, F), store_bf16_n, store_f16, store_f16_n
//   void load_bf16_pairs(const uint16_t* p, F& even, F& odd): p[0..2N) holds pairs; even gets p[2i], odd p[2i + 1]
//   void store_bf16_pairs(uint16_t* p, F even, F odd): its inverse, rounded as store_bf16 does
//   float sum(F), max(F): over lanes, in a fixed order
//   PYLLM_HAS_BF16_DOT 0/1, and where 1: struct B (2N bf16), B load_pairs(const uint16_t*), B set_pair(uint32_t),
//   void store_pairs(uint16_t*, B), B round_pairs(F low, F high) to nearest even, denormals to 0,
//   F dot_bf16(F acc, B x, B w): acc + x[2i+1] * w[2i+1], then + x[2i] * w[2i], as the instruction does: fused, nearest even,
//   denormals taken and given as 0; F round_bf16(F) as store_bf16 rounds, F swap_pairs(F): lanes 2i and 2i + 1 exchanged
//   class FlushDenormals(bool): with bf16 dot products, and where true: float32 takes and gives denormals as 0 while it lives
//   PYLLM_HAS_VNNI 0/1; struct I (N int32, or 4N bytes), I set_bytes(int), I dot_bytes(I acc, I x, I w): acc + the sum of four
//   products of unsigned x and signed w per lane; without VNNI the sum of two neighbouring products saturates at 16 bits
//   I dot_words(I acc, I x, I w): acc + the sum of two products of int16 per lane, exact in 32 bits; I load_i8_words(const int8_t*):
//   2N integers as int16; void store_words(int16_t*, F): N numbers of at most 32767, to the nearest integers
//   I load_bytes(const void*): 4N bytes; F to_float(I), I to_int(F) of integral values; store_bytes(int8_t*, F): N of them; F load_u8(const uint8_t*): N
//   struct OffsetBytes, OffsetBytes load_offset_bytes(const void*): 4N unsigned bytes w; I dot_offset(I acc, OffsetBytes w, I x):
//   acc + the sum of four products (w - kByteOffset) * x per lane, exact for signed x > -128
//   I multiply(I, uint32_t), I shift_down(I, int) of unsigned lanes, +, ^; I places(): 0, 1, 2, ...
//   void opaque(I&): the compiler no longer knows the value; int32_t sum(I)
//   PYLLM_HAS_AMX 0/1, and where 1 the matrix tiles of amx.h
#pragma once
#include <cstdint>
#include <cstring>

#if defined(PYLLM_ISA_BASELINE)
#define PYLLM_ISA isa_baseline
#include "cpu/simd/baseline.h"
#elif defined(PYLLM_ISA_AVX2)
#define PYLLM_ISA isa_avx2
#include "cpu/simd/avx2.h"
#elif defined(PYLLM_ISA_AVX512)
#define PYLLM_ISA isa_avx512
#include "cpu/simd/avx512.h"
#elif defined(PYLLM_ISA_AVX512_BF16)
#define PYLLM_ISA isa_avx512_bf16
#include "cpu/simd/avx512.h"
#elif defined(PYLLM_ISA_AMX_BF16)
#define PYLLM_ISA isa_amx_bf16
#include "cpu/simd/avx512.h"
#else
#error "compile through CMakeLists.txt, which names the ISA level"
#endif

#if defined(PYLLM_ISA_AMX_BF16)
#define PYLLM_HAS_AMX 1
#include "cpu/simd/amx.h"
#else
#define PYLLM_HAS_AMX 0
#endif

namespace pyllm::PYLLM_ISA::simd {

#if !PYLLM_HAS_BF16_DOT
struct FlushDenormals {
  explicit FlushDenormals(bool) {}
};
#endif

static inline I set_int(int32_t a) { return {Lanes{} + a}; }
typedef unsigned UnsignedLanes __attribute__((vector_size(sizeof(Lanes))));
static inline I multiply(I a, uint32_t b) { return {(Lanes)((UnsignedLanes)a.v * b)}; }
static inline I shift_down(I a, int n) { return {(Lanes)((UnsignedLanes)a.v >> n)}; }
static inline I operator+(I a, I b) { return {(Lanes)((UnsignedLanes)a.v + (UnsignedLanes)b.v)}; }
static inline I operator^(I a, I b) { return {a.v ^ b.v}; }
static inline I places() {
  I a;
  for (int i = 0; i < F::N; ++i) a.v[i] = i;
  return a;
}
static inline I low_nibbles(I a) { return {a.v & 0x0f0f0f0f}; }
static inline I high_nibbles(I a) { return {(a.v >> 4) & 0x0f0f0f0f}; }

}  // namespace pyllm::PYLLM_ISA::simd
