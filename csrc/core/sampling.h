// Argument structs of the sampling kernels. R rows of logits, V vocabulary.
#pragma once
#include <cstdint>

namespace pyllm {

// Temperatures below this choose the token with the largest logit.
constexpr float kGreedyBelow = 1e-5f;

// One row's sampling parameters; pyllm/sampling.py declares the same layout for numpy.
struct SampleRow {
  uint64_t seed, position;  // the draw is uniform(seed, stream, position) of core/random.h
  uint32_t stream;
  int32_t top_k;  // 0: off
  float temperature, top_p, min_p;
  float repetition_penalty, presence_penalty, frequency_penalty;
};
static_assert(sizeof(SampleRow) == 48);

// One list of ids for each row, one after the other: row r has ids[starts[r]] to ids[starts[r + 1] - 1].
struct RowLists {
  const int64_t* starts;  // [R + 1], or null where no row has a list
  const int32_t* ids;
};

// Chooses a token for each row. In this order:
//   history   each distinct token of prompt and output, with how often it stands in the output: repetition penalty on
//   all,
//             frequency times count and presence penalties on those with a count above 0
//   bias      added; -inf forbids
//   allowed   a row with a list keeps only its ids
//   temperature; top-k, ties at the k-th value kept; top-p, a token staying while the tokens before it, by falling
//   logit and then rising id, hold less than top_p of what top-k left; min-p, relative to the largest probability; a
//   draw.
// Greedy rows choose the largest logit, the lowest id among equals. A logit of -inf is never chosen. A row that has a
// NaN or +inf logit, or nothing but -inf, gets token -1.
struct SampleArgs {
  int32_t* tokens;        // [R]
  float* logits;          // [R, V], changed in place by history, bias and allowed
  const SampleRow* rows;  // [R]
  RowLists history;
  const int32_t* history_counts;
  RowLists bias;
  const float* bias_values;
  RowLists allowed;
  int64_t count, vocab, stride;
  void* workspace;
};

// The scratch that one thread needs for a row.
constexpr int64_t kMaximaBlock = 64;  // logits whose maximum is kept
constexpr int64_t sample_floats(int64_t vocab) {
  return ((vocab + kMaximaBlock - 1) / kMaximaBlock + 5 * vocab + 15) / 16 * 16;
}

// Log-softmax of each row at one id and at the top_n largest logits (falling, lowest id first among equals). A row that
// has a NaN or +inf logit, or nothing but -inf, gets NaN, rank 0 and ids -1; places past the last finite logit get -inf
// and -1.
struct LogprobsArgs {
  float* chosen;        // [R] log-probability of ids
  int32_t* ranks;       // [R] 1 + how many tokens have a larger one
  float* top;           // [R, top_n]
  int32_t* top_ids;     // [R, top_n]
  const float* logits;  // [R, V]
  const int32_t* ids;   // [R]
  int64_t count, vocab, stride, top_n;
};

}  // namespace pyllm
