// The choice of tokens on an NVIDIA GPU: argument structs and meaning as in core/sampling.h.
//
// Probabilities are taken as integers, so sums have one value in any order: equal logits give equal tokens on every chip and in every
// batch, and, but where a draw falls within rounding of the border between two tokens, those of the CPU.
#pragma once
#include <cuda_runtime.h>

#include "core/sampling.h"

namespace pyllm::cuda {

constexpr int64_t kMaxVocab = int64_t(1) << 23;  // sums of probabilities, in units of 2^-40 of the largest, fit 64 bits

// `workspace`: float, one for each of allowed.ids; unused without. An id of history stands once in its row.
cudaError_t sample(const SampleArgs& args, cudaStream_t stream);

// top_n is at most kMaxTop. A row whose id is outside the vocabulary gives NaN and rank 0 for it.
constexpr int64_t kMaxTop = 256;
cudaError_t logprobs(const LogprobsArgs& args, cudaStream_t stream);

}  // namespace pyllm::cuda
