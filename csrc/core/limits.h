// Argument struct of the kernel that runs a machine at one of its limits.
#pragma once
#include <cstdint>

namespace pyllm {

enum class Limit : int32_t { read = 0, f32 = 1, bf16 = 2, int8 = 3 };

// Reads `data` once (read), or runs independent chains of multiply-adds in registers (the others). The caller takes the
// time.
struct LimitsArgs {
  int64_t* work;      // [threads] bytes read or operations done by each thread, added to; a multiply-add counts as two
  float* sink;        // [threads] keeps the results alive
  const float* data;  // [size], read only
  int64_t size;       // a multiple of kLimitsChunk
  int64_t streams;    // read only: 1, or 4 places of a chunk read in turn
  int64_t rounds;     // compute only: steps of every chain, per chunk
  int64_t chunks;     // compute only
  Limit limit;
};

constexpr int64_t kLimitsChunk = int64_t(1) << 20;  // floats of `data` that a thread reads at a time

}  // namespace pyllm
