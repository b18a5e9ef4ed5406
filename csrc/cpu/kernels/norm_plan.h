// How norm_backward cuts rows into chunks, each with sums of its own: the kernel and its workspace agree on it, at every ISA
// level and for any number of threads.
#pragma once
#include "core/types.h"

namespace pyllm::cpu {

struct NormPlan {
  NormPlan(int64_t rows, int64_t dim)
      : rows(rows),
        chunks(rows < kMaxChunks * kLeastRows ? (rows + kLeastRows - 1) / kLeastRows : kMaxChunks),
        stride(round_up(dim, 16)) {}

  int64_t begin(int64_t chunk) const { return rows * chunk / chunks; }
  int64_t workspace_bytes() const { return chunks * 2 * stride * int64_t(sizeof(float)); }

  static constexpr int64_t kLeastRows = 16, kMaxChunks = 64;
  int64_t rows, chunks, stride;  // stride: floats from one sum to the next
};

}  // namespace pyllm::cpu
