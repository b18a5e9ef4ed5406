// What the bindings of CUDA launchers share: ranges, streams, and errors of a launch.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>

#include "bindings/cuda_arrays.h"

namespace pyllm::bindings {

constexpr const char* kFloats = "float32|bfloat16";
constexpr int64_t kMaxGrid = 65535;            // blocks in the second and third dimension of a grid
constexpr int64_t kMaxRows = (1ll << 31) - 1;  // blocks in the first

inline void raise(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

inline void check_range(int64_t value, int64_t low, int64_t high, const char* name) {
  if (value < low || value > high)
    throw py::value_error(std::string(name) + ": expected " + std::to_string(low) + " to " + std::to_string(high) +
                          ", got " + std::to_string(value));
}

inline cudaStream_t stream_of(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

}  // namespace pyllm::bindings
