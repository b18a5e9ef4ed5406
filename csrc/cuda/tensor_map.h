// What Hopper's kernels are launched with: whether there is Hopper, and descriptions of matrices for its copy engine.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace pyllm::cuda {

// Whether the current GPU has wgmma, and this build code for it.
cudaError_t has_wgmma(bool* yes);

// Describes m [rows, columns] of bf16, rows `stride` elements apart, to be read in boxes of `box` rows, at most 256, by 64 columns; what
// lies past the ends is 0. m is 16-byte aligned, stride a multiple of 8.
cudaError_t make_tensor_map(CUtensorMap* map, const void* m, int64_t rows, int64_t columns, int64_t stride, int box);

}  // namespace pyllm::cuda
