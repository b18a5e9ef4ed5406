// The register tile of the matmul over integer weights: a few rows of x against a panel's columns, group by group.
//
// Within a group the products of bytes are summed exactly in int32; the group's sum is then scaled and added to the float
// sums of its block of K, and these, scaled by what x has been divided by, to those of all blocks. So the order in which
// groups and blocks are added is all that a result depends on.
#pragma once
#include "cpu/kernels/kernel.h"
#include "cpu/kernels/matmul_plan.h"

namespace pyllm::PYLLM_ISA {

namespace plan = cpu::matmul_plan;

// Most rows of a tile, and the vectors of columns that go with so many rows.
#if PYLLM_HAS_VNNI
constexpr int kIntRows = 6;
constexpr int kNibbleRows = 4;  // of int4 weights that are unpacked in registers
constexpr int int_vectors(int) { return 4; }
#elif defined(PYLLM_ISA_AVX512)
constexpr int kIntRows = 4;
constexpr int kNibbleRows = 4;
constexpr int int_vectors(int) { return 4; }
#else
constexpr int kIntRows = 4;
constexpr int kNibbleRows = 4;
constexpr int int_vectors(int rows) { return rows == 1 ? 8 : 2; }
#endif

// How values are read, one struct for each layout:
//   kRows           most rows of a tile
//   kBytes, kQuads  bytes of a panel in a step, and the quads of k that they hold
//   kOffset         what the product takes off a stored value
//   Operand         one vector of columns of a step
//   dot(acc, w, x)  acc + the step's products; x points to its quads
struct StepI8 {
  static constexpr int kRows = kIntRows;
  static constexpr int64_t kBytes = 4 * kPanel, kQuads = 1;
  static constexpr float kOffset = simd::kByteOffset;
  using Operand = simd::OffsetBytes;
  using X = simd::I;
  static inline Operand load(const uint8_t* w) { return simd::load_offset_bytes(w); }
  static inline X broadcast(const int32_t* x) { return simd::set_int(*x); }
  static inline simd::I dot(simd::I acc, Operand w, X x) { return simd::dot_offset(acc, w, x); }
};

struct StepI4 {  // one byte holds two values
  static constexpr int kRows = kNibbleRows;
  static constexpr int64_t kBytes = 4 * kPanel, kQuads = 2;
  static constexpr float kOffset = 0;
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
  static constexpr int kRows = kIntRows;
  static constexpr int64_t kBytes = 4 * kPanel, kQuads = 1;
  static constexpr float kOffset = 0;
  using Operand = simd::I;
  using X = simd::I;
  static inline Operand load(const uint8_t* w) { return simd::load_bytes(w); }
  static inline X broadcast(const int32_t* x) { return simd::set_int(*x); }
  static inline simd::I dot(simd::I acc, Operand w, X x) { return simd::dot_bytes(acc, w, x); }
};

// One block of K of a panel.
struct IntBlock {
  int64_t k, group;       // its padded elements, those of a group
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

// One group of some columns of a panel.
struct IntGroup {
  const uint8_t* values;
  const uint8_t* scales;  // or null: one scale holds for a row
  const uint8_t* zeros;   // or null
  int64_t steps;
  bool half_scales;
};

// What to bring into the cache while a tile works: at each step as many lines as the tile is told, then `advance` bytes
// further. One pointer, as gcc 12 would keep two in a vector, and add to them where the products are computed.
struct IntAhead {
  const char* next;
  int64_t advance;
};

static inline float scale_of_x(const int32_t* record) {
  float scale;
  std::memcpy(&scale, record + plan::kIntScale, sizeof scale);
  return scale;
}

// One group, for Rows rows and int_vectors(Rows) vectors of columns: sums[r][c] += x[r] . w[c] times the scale, where it
// has one, of the group of weights, or else that of x; what sums held is read from `before`. Rows of both are `stride`
// apart, those of x kIntStride; `x` are the quads of the group, `facts` the records moved on by its number. A function of
// its own, as gcc 12 would otherwise carry the sums of all groups in registers, and spill the accumulators.
template <class Step, int Rows, bool Scaled, int Lines>
[[gnu::noinline]] void int_tile_group(float* sums, const float* before, int64_t stride, const int32_t* x,
                                      const int32_t* facts, const IntGroup& group, IntAhead& ahead) {
  using simd::F;
  using simd::I;
  constexpr int kVectors = int_vectors(Rows);
  I c[Rows][kVectors];
  if (group.zeros) {  // products of small integers: exact in float
    const auto* totals = reinterpret_cast<const float*>(facts + plan::kIntTotals);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const F zero = simd::load_u8(group.zeros + v * F::N) - simd::set(Step::kOffset);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) c[r][v] = to_int(zero * simd::set(totals[r * plan::kIntStride]));
    }
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const I start = simd::set_int(facts[r * plan::kIntStride + plan::kIntStarts]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) c[r][v] = start;
    }
  }
  const uint8_t* w = group.values;
  const char* next = ahead.next;
  for (int64_t steps = group.steps; steps > 0; --steps, x += Step::kQuads, w += Step::kBytes) {
#pragma GCC unroll 16
    for (int line = 0; line < Lines; ++line) __builtin_prefetch(next + 64 * line, 0, 2);
    if (Lines) next += ahead.advance;
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
  if (Lines) ahead.next = next;
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    F scale;
    if (Scaled) scale = load_scale(group.scales + 2 * v * F::N, group.half_scales);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      if (!Scaled) scale = simd::set(scale_of_x(facts + r * plan::kIntStride));
      const int64_t at = r * stride + v * F::N;
      simd::store(sums + at, fma(to_float(c[r][v]), scale, simd::load(before + at)));
    }
  }
}

// All groups of a block, for columns from `column` on: sums[r][c] += x[r] . w[c], rows of sums being kPanel apart. Where
// each step asks for as many lines as it reads, these are what follows in this panel, scales included.
template <class Step, int Rows, bool Scaled, int Lines>
void int_tile(float* sums, const int32_t* x, const IntBlock& block, int64_t column, IntAhead& ahead) {
  using simd::F;
  constexpr int64_t kColumns = int_vectors(Rows) * F::N;
  alignas(64) static constexpr float kZeros[Rows * kColumns] = {};
  alignas(64) float of_block[Rows * kColumns];
  for (int64_t k = 0, g = 0; k < block.k; k += block.group, ++g) {
    const int64_t left = block.k - k, count = left < block.group ? left : block.group;
    const int64_t steps = count / 4 / Step::kQuads;
    const int64_t at = count < block.group ? block.last_group : g * block.scales_stride;
    const IntGroup group{block.values + g * block.values_stride + 4 * column,
                         Scaled ? block.scales + at + 2 * column : nullptr,
                         block.zeros ? block.zeros + (Scaled ? at : 0) + column : nullptr, steps, block.half_scales};
    float* to = Scaled ? of_block : sums;
    int_tile_group<Step, Rows, Scaled, Lines>(to, Scaled && k == 0 ? kZeros : to, Scaled ? kColumns : kPanel, x + k / 4,
                                              x + g, group, ahead);
    if (Lines == 4 && Scaled) {
      const int64_t rest = block.values_stride - 64 * Lines * steps;
      for (int64_t line = 0; line < rest; line += 64) __builtin_prefetch(ahead.next + line, 0, 2);
      ahead.next += rest;
    }
  }
  if (!Scaled || block.k == 0) return;
  for (int r = 0; r < Rows; ++r) {
    const F of_x = simd::set(scale_of_x(x + r * plan::kIntStride));
    for (int64_t c = 0; c < kColumns; c += F::N) {
      float* sum = sums + r * kPanel + c;
      simd::store(sum, fma(simd::load(of_block + r * kColumns + c), of_x, simd::load(sum)));
    }
  }
}

}  // namespace pyllm::PYLLM_ISA
