// Sizes that the matmul kernel and its workspace agree on, the same at every ISA level.
#pragma once
#include "core/args.h"

namespace pyllm::cpu::matmul_plan {

// x is read in blocks of at most kBlock steps (a step is one k, or one pair of k for the bf16 dot product): the block of a
// panel, 256 KB, is read from the second-level cache as fast as it is used up, and a chain over K is hardly ever
// interrupted. A copy of x has rows this far apart: an odd number of cache lines, so that they do not fall into the same
// cache sets. AMX needs weights in the first-level cache.
constexpr int64_t kBlock = 1024, kAmxBlock = 128;
constexpr int64_t kRowStride = kBlock + 16, kAmxRowStride = kAmxBlock + 16;  // in 4-byte elements: floats or bf16 pairs
// More rows than kMaxRows are done in several passes, which bounds the workspace. Within a pass a worker takes up to
// kFloatRows rows by, where K has several blocks, kFloatSlots panels at a time: one block of x and the sums then stay in
// its second-level cache.
constexpr int64_t kMaxRows = 512;
constexpr int64_t kFloatRows = 256;
constexpr int64_t kFloatSlots = 4;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
// `n` cut into the fewest parts of at most `most`, of about equal size.
constexpr int64_t even_part(int64_t n, int64_t most) { return n == 0 ? 0 : divide_up(n, divide_up(n, most)); }

// The workspace: the copy of x [blocks][rows][kRowStride], then for each worker its sums [kFloatSlots][rows][kPanel] and
// one widened block of weights [kBlock][kPanel].
constexpr int64_t x_bytes(int64_t rows, int64_t k) {
  const int64_t amx = divide_up(k, kAmxBlock) * kAmxRowStride, plain = divide_up(k, kBlock) * kRowStride;
  return rows * (amx > plain ? amx : plain) * 4;
}
constexpr int64_t float_sums_bytes(int64_t rows) { return kFloatSlots * even_part(rows, kFloatRows) * kPanel * 4; }
constexpr int64_t widened_bytes() { return kBlock * kPanel * 4; }
constexpr int64_t workspace_bytes(int64_t rows, int64_t k, int threads) {
  const int64_t pass = even_part(rows, kMaxRows);
  return x_bytes(pass, round_up(k, 2)) + threads * (float_sums_bytes(pass) + widened_bytes());
}

// Integer weights. x becomes int8, in blocks of kIntBlock elements that share a scale; a row of a block is a record of
// kIntStride 4-byte elements, an odd number of cache lines: the quads of x, then for each group of the weights what its
// sums start from (int32) and the sum of x with the sign changed (float), then the scale (float).
constexpr int64_t kIntBlock = 256;
constexpr int64_t kIntGroups = kIntBlock / 32;  // most groups of a block
constexpr int64_t kIntStarts = kIntBlock / 4;   // where they begin in a record
constexpr int64_t kIntTotals = kIntStarts + kIntGroups;
constexpr int64_t kIntScale = kIntTotals + kIntGroups;
constexpr int64_t kIntStride = round_up(kIntScale + 1 - 16, 32) + 16;
static_assert(kIntStride % 32 == 16);

// A worker takes up to kIntRows rows by kIntSlots panels at a time, so that weights are read once for all those rows; a
// block of x (224 KB) and the sums (512 KB) then stay in its second-level cache. More rows are done in several passes.
constexpr int64_t kIntRows = 512;
constexpr int64_t kIntSlots = 4;

// The workspace: the records of x [blocks][rows], then for each worker its sums [kIntSlots][rows][kPanel] and one
// unpacked block of weights.
constexpr int64_t int_x_bytes(int64_t rows, int64_t k) { return divide_up(k, kIntBlock) * rows * kIntStride * 4; }
constexpr int64_t int_sums_bytes(int64_t rows) { return kIntSlots * rows * kPanel * 4; }
constexpr int64_t unpacked_bytes() { return kIntBlock * kPanel; }
constexpr int64_t int_workspace_bytes(int64_t rows, int64_t k, int threads) {
  const int64_t pass = even_part(rows, kIntRows);
  return int_x_bytes(pass, k) + threads * (int_sums_bytes(pass) + unpacked_bytes());
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
