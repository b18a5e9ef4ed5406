// The register tile of the matmul over integer weights: a few rows of x against a panel's columns, group by group.
//
// Within a group the products of bytes are summed exactly in int32; the group's sum is then scaled and added to the
// float sums. So the order in which groups are added is all that a result depends on.
#pragma once
#include "cpu/kernels/kernel.h"
#include "cpu/kernels/matmul_plan.h"

namespace pyllm::PYLLM_ISA {

namespace plan = cpu::matmul_plan;

// Most rows of a tile, and the vectors of columns that go with so many rows.
#if PYLLM_HAS_VNNI
constexpr int kIntRows = 6;
constexpr int int_vectors(int) { return 4; }
#elif defined(PYLLM_ISA_AVX512)
constexpr int kIntRows = 4;
constexpr int int_vectors(int) { return 4; }
#else
constexpr int kIntRows = 4;
constexpr int int_vectors(int rows) { return rows == 1 ? 8 : 2; }
#endif

// How values are read, one struct for each layout:
//   kBytes, kQuads  bytes of a panel in a step, and the quads of k that they hold
//   kOffset         what is taken off the stored value by the product itself
//   Operand         one vector of columns of a step
//   dot(acc, w, x)  acc + the step's products; x points to its quads
struct StepI8 {
  static constexpr int64_t kBytes = 4 * kPanel, kQuads = 1;
  static constexpr int32_t kOffset = simd::kByteOffset;
  using Operand = simd::OffsetBytes;
  using X = simd::I;
  static inline Operand load(const uint8_t* w) { return simd::load_offset_bytes(w); }
  static inline X broadcast(const int32_t* x) { return simd::set_int(*x); }
  static inline simd::I dot(simd::I acc, Operand w, X x) { return simd::dot_offset(acc, w, x); }
};

struct StepI4 {  // one byte holds two values
  static constexpr int64_t kBytes = 4 * kPanel, kQuads = 2;
  static constexpr int32_t kOffset = 0;
  struct Operand {
    simd::I low, high;
  };
  struct X {
    simd::I low, high;
  };
  static inline Operand load(const uint8_t* w) {
    const simd::I both = simd::load_bytes(w);
    return {simd::low_nibbles(both), simd::high_nibbles(both)};
  }
  static inline X broadcast(const int32_t* x) { return {simd::set_int(x[0]), simd::set_int(x[1])}; }
  static inline simd::I dot(simd::I acc, Operand w, X x) {
    return simd::dot_bytes(simd::dot_bytes(acc, w.low, x.low), w.high, x.high);
  }
};

struct StepUnpackedI4 {  // [k / 4][kPanel][4] like int8, but at most 15: products fit 16 bits everywhere
  static constexpr int64_t kBytes = 4 * kPanel, kQuads = 1;
  static constexpr int32_t kOffset = 0;
  using Operand = simd::I;
  using X = simd::I;
  static inline Operand load(const uint8_t* w) { return simd::load_bytes(w); }
  static inline X broadcast(const int32_t* x) { return simd::set_int(*x); }
  static inline simd::I dot(simd::I acc, Operand w, X x) { return simd::dot_bytes(acc, w, x); }
};

// One block of K of a panel.
struct IntBlock {
  int64_t k, group;       // its padded elements, elements of a group of x
  const uint8_t* values;  // of the first group
  int64_t values_stride;  // from one group to the next
  const uint8_t* scales;  // of the first group; null where one scale holds for a row
  const uint8_t* zeros;   // of the first group, or of all; or null
  int64_t scales_stride;  // of scales and zeros, from one group to the next
  int64_t last_group;     // offset of those of the last group, where that is short
  bool half_scales;       // float16, else bfloat16
};

static inline simd::F load_scale(const uint8_t* p, bool half) {
  const auto* scale = reinterpret_cast<const uint16_t*>(p);
  return half ? simd::load_f16(scale) : simd::load_bf16(scale);
}

// N bytes as floats.
static inline simd::F load_zeros(const uint8_t* p) {
  float zeros[simd::F::N];
  for (int i = 0; i < simd::F::N; ++i) zeros[i] = float(p[i]);
  return simd::load(zeros);
}

// sums[r][v] += c[r][v], a finished group, scaled. Rows of sums are kPanel apart.
template <bool Scaled, bool Zeros, int Rows, int Vectors>
static inline void add_group(float* sums, const simd::I (&c)[Rows][Vectors], const int32_t* x, int64_t g,
                             const uint8_t* scales, const uint8_t* zeros, bool half_scales) {
  using simd::F;
  const auto* scales_of_x = reinterpret_cast<const float*>(x + plan::kIntScales);
  const auto* totals = reinterpret_cast<const float*>(x + plan::kIntTotals);
#pragma GCC unroll 16
  for (int v = 0; v < Vectors; ++v) {
    F scale, zero;
    if (Scaled) scale = load_scale(scales + 2 * v * F::N, half_scales);
    if (Zeros) zero = load_zeros(zeros + v * F::N);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      float* sum = sums + r * kPanel + v * F::N;
      F value = to_float(c[r][v]);
      if (Zeros) value = fma(zero, simd::set(totals[r * plan::kIntStride + g]), value);
      const F of_x = simd::set(scales_of_x[r * plan::kIntStride + g]);
      simd::store(sum, fma(value, Scaled ? scale * of_x : of_x, simd::load(sum)));
    }
  }
}

// sums[r][c] += the groups of x[r] . w[c], for Rows rows and int_vectors(Rows) vectors of columns from `column` on.
// Rows of sums are kPanel apart, those of x kIntStride. Each step asks for `Lines` lines from `ahead` on.
template <class Step, int Rows, int Lines>
void int_tile(float* sums, const int32_t* x, const IntBlock& block, int64_t column, const char* ahead) {
  using simd::F;
  using simd::I;
  constexpr int kVectors = int_vectors(Rows);
  const int32_t *record = x, *starts = x + plan::kIntStarts;
  int64_t g = 0;
  for (int64_t k = 0; k < block.k; k += block.group, ++g) {
    const int64_t left = block.k - k, count = left < block.group ? left : block.group;
    const uint8_t* w = block.values + g * block.values_stride + 4 * column;
    I c[Rows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) c[r][v] = simd::set_int(starts[r * plan::kIntStride + g]);
    }
    for (int64_t steps = count / 4 / Step::kQuads; steps > 0; --steps, x += Step::kQuads, w += Step::kBytes) {
#pragma GCC unroll 16
      for (int line = 0; line < Lines; ++line) __builtin_prefetch(ahead + 64 * line, 0, 2);
      ahead += 64 * Lines;
      if (Rows == 1) {
        const typename Step::X a = Step::broadcast(x);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) c[0][v] = Step::dot(c[0][v], Step::load(w + v * F::N * 4), a);
      } else {
        typename Step::Operand b[kVectors];
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) b[v] = Step::load(w + v * F::N * 4);
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
          const typename Step::X a = Step::broadcast(x + r * plan::kIntStride);
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; ++v) c[r][v] = Step::dot(c[r][v], b[v], a);
        }
      }
    }
    const int64_t at = count < block.group ? block.last_group : g * block.scales_stride;
    const uint8_t* scales = block.scales ? block.scales + at + 2 * column : nullptr;
    if (!block.zeros) {
      if (scales)
        add_group<true, false>(sums, c, record, g, scales, nullptr, block.half_scales);
      else
        add_group<false, false>(sums, c, record, g, nullptr, nullptr, false);
    } else {
      if (scales)
        add_group<true, true>(sums, c, record, g, scales, block.zeros + at + column, block.half_scales);
      else
        add_group<false, true>(sums, c, record, g, nullptr, block.zeros + column, false);
    }
  }
}

}  // namespace pyllm::PYLLM_ISA
