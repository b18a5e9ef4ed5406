// Activations of one value.
#pragma once
#include "core/types.h"
#include "cuda/ptx.cuh"

namespace pyllm::cuda {

// In few instructions, since a prompt takes one for each output; within 2^-19 of the result for |x| < 16.
__device__ __forceinline__ float sigmoid(float x) { return reciprocal_fast(1.0f + exp2_fast(-1.44269504f * x)); }
__device__ __forceinline__ float gelu_tanh(float x) {
  return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));  // (1 + tanh(u)) / 2 is the sigmoid of 2 u
}

__device__ __forceinline__ float activate(float x, Activation kind) {
  switch (kind) {
    case Activation::gelu_erf:
      return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case Activation::gelu_tanh:
      return gelu_tanh(x);
    case Activation::silu:
      return x * sigmoid(x);
    case Activation::relu:
      return x < 0.0f ? 0.0f : x;  // a NaN stays one
    case Activation::tanh:
      return tanhf(x);
    case Activation::sigmoid:
      return sigmoid(x);
    case Activation::quick_gelu:
      return x * sigmoid(1.702f * x);
    case Activation::relu_squared:
      return x < 0.0f ? 0.0f : x * x;
    default:
      return x;
  }
}

}  // namespace pyllm::cuda
