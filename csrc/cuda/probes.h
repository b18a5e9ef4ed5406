// What a GPU can do at most, for figures to be held against: bench/gpu_check.py.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace pyllm::cuda {

// Reads `bytes` of x, a multiple of 16 and 16-byte aligned, once, and leaves the exclusive or of what each block read.
struct ReadArgs {
  uint32_t* out;  // [blocks]
  const void* x;
  int64_t bytes, blocks;
};
cudaError_t read_probe(const ReadArgs& args, cudaStream_t stream);

// A kernel of one block that does nothing: what an edge between two kernels costs.
cudaError_t empty_probe(bool overlapped, cudaStream_t stream);

}  // namespace pyllm::cuda
