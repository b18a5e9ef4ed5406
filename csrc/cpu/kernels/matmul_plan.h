// Sizes that the matmul kernel and its workspace agree on, the same at every ISA level.
#pragma once
#include "core/args.h"

namespace pyllm::cpu::matmul_plan {

// x is read in blocks of at most kBlock steps (a step is one k, or one pair of k for the bf16 dot product). The copy of
// it has rows this far apart: a constant, so that a tile addresses all its rows from one pointer, and not a power of
// two, so that they do not fall into the same cache sets.
constexpr int64_t kBlock = 128;              // a panel of float32 weights, 32 KB, then stays in the first-level cache
constexpr int64_t kRowStride = kBlock + 16;  // in 4-byte elements: floats or bf16 pairs
// More rows than kMaxRows are done in several passes, which bounds the workspace. Within a pass a worker takes up to
// kRows rows by kSlots panels at a time: one block of x and the sums then stay in its cache.
constexpr int64_t kMaxRows = 512;
constexpr int64_t kRows = 128;
constexpr int64_t kSlots = 16;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
// `n` cut into the fewest parts of at most `most`, of about equal size.
constexpr int64_t even_part(int64_t n, int64_t most) { return n == 0 ? 0 : divide_up(n, divide_up(n, most)); }

// The workspace: the copy of x [blocks][rows][kRowStride], then for each worker its sums [kSlots][rows][kPanel] and one
// widened block of weights [kBlock][kPanel].
constexpr int64_t x_bytes(int64_t rows, int64_t k) { return divide_up(k, kBlock) * rows * kRowStride * 4; }
constexpr int64_t sums_bytes(int64_t rows) { return kSlots * even_part(rows, kRows) * kPanel * 4; }
constexpr int64_t widened_bytes() { return kBlock * kPanel * 4; }
constexpr int64_t workspace_bytes(int64_t rows, int64_t k, int threads) {
  const int64_t pass = even_part(rows, kMaxRows);
  return x_bytes(pass, round_up(k, 2)) + threads * (sums_bytes(pass) + widened_bytes());
}

// Integer weights. x becomes int8, in blocks of kIntBlock elements; a row of a block is a record of kIntStride 4-byte
// elements, an odd number of cache lines: the quads of x, then for each of its groups the scale (float), what the sums
// of a group start from (int32), and the sum of x with the sign changed (float).
constexpr int64_t kIntBlock = 512;
constexpr int64_t kIntGroups = kIntBlock / 32;  // most groups of a block
constexpr int64_t kIntScales = kIntBlock / 4;   // where they begin in a record
constexpr int64_t kIntStarts = kIntScales + kIntGroups;
constexpr int64_t kIntTotals = kIntStarts + kIntGroups;
constexpr int64_t kIntStride = kIntTotals + kIntGroups;
static_assert(kIntStride % 32 == 16);

// The workspace: the records of x [blocks][rows], then for each worker its sums [kSlots][rows][kPanel] and one unpacked
// block of weights.
constexpr int64_t int_x_bytes(int64_t rows, int64_t k) { return divide_up(k, kIntBlock) * rows * kIntStride * 4; }
constexpr int64_t unpacked_bytes() { return kIntBlock * kPanel; }
constexpr int64_t int_workspace_bytes(int64_t rows, int64_t k, int threads) {
  const int64_t pass = even_part(rows, kMaxRows);
  return int_x_bytes(pass, k) + threads * (sums_bytes(pass) + unpacked_bytes());
}

// Gradients (matmul_backward.cc) take blocks of kGradientBlock steps, of rows kGradientStride apart.
constexpr int64_t kGradientBlock = 128;
constexpr int64_t kGradientStride = kGradientBlock + 16;

// dx: at most kDxRows rows of dy and kDxPanels packed panels at a time; a worker takes as many panels of dx as have kDxSums
// rows of sums. The workspace: the copy of dy [blocks][rows][kGradientStride], then for each worker its sums
// [kDxSums][kPanel], a block of transposed weights [kGradientBlock][kPanel], and one of widened weights [kPanel][kPanel].
constexpr int64_t kDxRows = 1024;
constexpr int64_t kDxPanels = 64;
constexpr int64_t kDxSums = 2048;
constexpr int64_t kBlockPanels = kGradientBlock / kPanel;
constexpr int64_t dy_bytes(int64_t rows, int64_t panels) {
  return divide_up(panels, kBlockPanels) * rows * kGradientStride * 4;
}
constexpr int64_t dx_worker_bytes() { return (kDxSums + kGradientBlock + kPanel) * kPanel * 4; }
constexpr int64_t dx_workspace_bytes(int64_t rows, int64_t panels, int threads) {
  return dy_bytes(even_part(rows, kDxRows), panels < kDxPanels ? panels : kDxPanels) + threads * dx_worker_bytes();
}

// dW: at most kDwTokens rows of x at a time. The workspace: x transposed [blocks][k][kGradientStride], then for each worker
// a strip of dy [kGradientBlock][kPanel].
constexpr int64_t kDwTokens = 512;
constexpr int64_t strip_bytes() { return kGradientBlock * kPanel * 4; }
constexpr int64_t transposed_bytes(int64_t tokens, int64_t k) {
  return divide_up(tokens, kGradientBlock) * k * kGradientStride * 4;
}
constexpr int64_t dw_workspace_bytes(int64_t tokens, int64_t k, int threads) {
  return transposed_bytes(even_part(tokens, kDwTokens), k) + threads * strip_bytes();
}

}  // namespace pyllm::cpu::matmul_plan
