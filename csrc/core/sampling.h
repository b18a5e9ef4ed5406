// Argument structs of the sampling kernels.
#pragma once
#include <cstdint>

namespace pyllm {

// One row's sampling parameters.
struct SampleRow {
  float temperature;  // 0: greedy
  float top_p, min_p;
  int32_t top_k;  // 0: off
  float repetition_penalty, presence_penalty, frequency_penalty;
  uint64_t seed, counter;  // of the generator: one uniform number per (seed, counter)
};

struct SampleArgs {
  int32_t* tokens;        // [R] chosen
  float* logits;          // [R, V] changed in place by penalties and biases
  const SampleRow* rows;  // [R]
  int64_t count, vocab, stride;
  void* workspace;
};

struct LogprobsArgs {
  float* chosen;         // [R] log-probability of ids
  int32_t* chosen_rank;  // [R] 1 + how many tokens have a larger one
  float* top;            // [R, top_n] rising rank
  int32_t* top_ids;      // [R, top_n]
  const float* logits;   // [R, V]
  const int32_t* ids;    // [R]
  int64_t count, vocab, stride, top_n;
};

}  // namespace pyllm
