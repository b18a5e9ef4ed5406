// The step after a step of decoding, made ready on the GPU itself.
#pragma once
#include <cuda_runtime.h>

#include "core/sampling.h"

namespace pyllm::cuda {

// Each of B sequences goes on with the token that was chosen for it, one position and one slot on, within the block that it writes to.
struct AdvanceArgs {
  int32_t* tokens;        // [B]
  int32_t* positions;     // [B]
  int64_t* slots;         // [B]
  int32_t* lengths;       // [B]
  SampleRow* rows;        // [B], of which `position` counts the draws
  const int32_t* chosen;  // [B]
  int64_t count;          // B
};
cudaError_t advance(const AdvanceArgs& args, cudaStream_t stream);

}  // namespace pyllm::cuda
