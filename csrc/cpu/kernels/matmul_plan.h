// Sizes that the matmul kernel and its workspace agree on, the same at every ISA level.
#pragma once
#include "core/args.h"

namespace pyllm::cpu::matmul_plan {

// x is read in blocks of at most kBlock steps (a step is one k, or one pair of k for the bf16 dot product). The copy of it has
// rows this far apart: a constant, so that a tile addresses all its rows from one pointer, and not a power of two, so that they
// do not fall into the same cache sets.
constexpr int64_t kBlock = 256;
constexpr int64_t kRowStride = kBlock + 16;  // in 4-byte elements: floats or bf16 pairs
// More rows than this are done in several passes over the weights, which bounds the workspace.
constexpr int64_t kMaxRows = 512;

constexpr int64_t pass_rows(int64_t rows) {
  const int64_t passes = (rows + kMaxRows - 1) / kMaxRows;
  return passes == 0 ? 0 : (rows + passes - 1) / passes;
}

// The workspace: the copy of x [blocks][rows][kRowStride], then for each worker its sums [2][rows][kPanel] and one widened block
// of weights [kBlock][kPanel].
constexpr int64_t x_bytes(int64_t rows, int64_t k) { return (k + kBlock - 1) / kBlock * rows * kRowStride * 4; }
constexpr int64_t sums_bytes(int64_t rows) { return 2 * rows * kPanel * 4; }
constexpr int64_t widened_bytes() { return kBlock * kPanel * 4; }
constexpr int64_t workspace_bytes(int64_t rows, int64_t k, int threads) {
  const int64_t pass = pass_rows(rows);
  return x_bytes(pass, round_up(k, 2)) + threads * (sums_bytes(pass) + widened_bytes());
}

}  // namespace pyllm::cpu::matmul_plan
