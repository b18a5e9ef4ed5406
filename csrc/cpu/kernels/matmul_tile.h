// The register tile of the matmul: a few rows of x against a few vectors of one panel's columns, over a run of k.
#pragma once
#include "cpu/kernels/kernel.h"
#include "cpu/kernels/matmul_plan.h"

namespace pyllm::PYLLM_ISA {

using cpu::matmul_plan::kBlock;

// Most rows of a tile, and the vectors of columns that go with so many rows: as many accumulators as the registers
// hold.
#if defined(PYLLM_ISA_BASELINE)
constexpr int kTileRows = 4;
constexpr int tile_vectors(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : 2; }
#elif defined(PYLLM_ISA_AVX2)
constexpr int kTileRows = 6;
constexpr int tile_vectors(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : 2; }
#else
constexpr int kTileRows = 6;
constexpr int tile_vectors(int) { return 4; }
#endif

// How a step multiplies, one struct for each kind of weight:
//   X, W            elements of x and of the packed weights
//   kX, kW          how many of them a step takes: of one row of x, of one panel
//   kColumn         weight elements per column of a step
//   Operand         one vector of columns of a step
//   step(c, x, w)   c + x * w, in rising order of k
struct StepF32 {
  using X = float;
  using W = float;
  using Operand = simd::F;
  static constexpr int64_t kX = 1, kW = kPanel, kColumn = 1;
  static inline Operand load(const W* w) { return simd::load(w); }
  static inline simd::F broadcast(const X* x) { return simd::set(*x); }
  static inline simd::F step(simd::F c, simd::F x, Operand w) { return simd::fma(x, w, c); }
};

struct StepF16 : StepF32 {
  using W = uint16_t;
  static inline Operand load(const W* w) { return simd::load_f16(w); }
};

#if PYLLM_HAS_BF16_DOT
// One step is the pair (k, k + 1), which the instruction multiplies and adds.
struct StepBf16Dot {
  using X = uint32_t;  // a pair of bf16
  using W = uint16_t;
  using Operand = simd::B;
  static constexpr int64_t kX = 1, kW = 2 * kPanel, kColumn = 2;
  static inline Operand load(const W* w) { return simd::load_pairs(w); }
  static inline simd::B broadcast(const X* x) { return simd::set_pair(*x); }
  static inline simd::F step(simd::F c, simd::B x, Operand w) { return simd::dot_bf16(c, x, w); }
};
#endif

// bf16 weights widened; one step is the pair (k, k + 1), of which the second product may be added first, and then stands
// first in x: so do the bf16 dot products, which this equals if denormals are flushed.
template <bool kSecondFirst>
struct StepBf16Wide {
  using X = float;
  using W = uint16_t;
  struct Operand {
    simd::F first, second;
  };
  static constexpr int64_t kX = 2, kW = 2 * kPanel, kColumn = 2;
  static inline Operand load(const W* w) {
    Operand o;
    if (kSecondFirst)
      simd::load_bf16_pairs(w, o.second, o.first);
    else
      simd::load_bf16_pairs(w, o.first, o.second);
    return o;
  }
  static inline Operand broadcast(const X* x) { return {simd::set(x[0]), simd::set(x[1])}; }
  static inline simd::F step(simd::F c, Operand x, Operand w) {
    return simd::fma(x.second, w.second, simd::fma(x.first, w.first, c));
  }
};

// What to bring into the cache while a tile works, as hardware prefetchers stop at every page and know nothing of blocks.
enum class Fetch {
  none,
  stream,  // the lines of one step from `w` on, `w_advance` bytes further at each step: for tiles that meet their weights in memory
  next,    // a line at `w`, `x` and `y` each, which advance slowly: what the next blocks, and the epilogue, will need
};
// Given by reference: who loads a struct that was just stored, in pieces of other sizes, waits for all stores before it.
struct Ahead {
  const char* w;
  int64_t w_advance;  // per step, in bytes
  const char* x;
  int64_t x_advance;
  const char* y;  // of the first row, to be written: all at once they would keep the weights waiting
  int64_t y_stride, y_advance;
};

// sums[r][c] (+)= x[r] . w[c] for Rows rows and tile_vectors(Rows) vectors of columns; rows of sums are kPanel apart,
// those of x x_stride. Continues from what sums holds unless `first`.
template <class Step, int Rows, Fetch kFetch>
void tile(float* sums, const typename Step::X* x, int64_t x_stride, const typename Step::W* w, int64_t steps,
          bool first, const Ahead& ahead) {
  using simd::F;
  constexpr int kVectors = tile_vectors(Rows);
  F c[Rows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) c[r][v] = first ? simd::zero() : simd::load(sums + r * kPanel + v * F::N);
  }
  const char *next_w = ahead.w, *next_x = ahead.x;
  constexpr int kParts = kFetch == Fetch::next ? Rows : 1;  // of the steps: each fetches one row of y
#pragma GCC unroll 1
  for (int part = 0; part < kParts; ++part) {
    const char* y = ahead.y + part * ahead.y_stride;
    for (int64_t s = steps * (part + 1) / kParts - steps * part / kParts; s > 0; --s, x += Step::kX, w += Step::kW) {
      if (kFetch == Fetch::stream) {
#pragma GCC unroll 16
        for (int64_t line = 0; line < Step::kW * int64_t(sizeof(typename Step::W)); line += 64)
          __builtin_prefetch(next_w + line, 0, 2);
      }
      if (kFetch == Fetch::next) {
        __builtin_prefetch(next_w, 0, 2);
        __builtin_prefetch(next_x, 0, 2);
        __builtin_prefetch(y, 1, 2);
        next_x += ahead.x_advance;
        y += ahead.y_advance;
      }
      if (kFetch != Fetch::none) next_w += ahead.w_advance;
      typename Step::Operand b[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) b[v] = Step::load(w + v * F::N * Step::kColumn);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const auto a = Step::broadcast(x + r * x_stride);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) c[r][v] = Step::step(c[r][v], a, b[v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) simd::store(sums + r * kPanel + v * F::N, c[r][v]);
  }
}

}  // namespace pyllm::PYLLM_ISA
