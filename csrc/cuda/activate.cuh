// Activations of one value.
#pragma once
#include "core/types.h"
#include "cuda/ptx.cuh"

namespace pyllm::cuda {

__device__ __forceinline__ float activate(float x, Activation kind) {
  switch (kind) {
    case Activation::gelu_erf:
      return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case Activation::gelu_tanh:
      return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case Activation::silu:
      return x / (1.0f + expf(-x));
    case Activation::relu:
      return x < 0.0f ? 0.0f : x;  // a NaN stays one
    case Activation::tanh:
      return tanhf(x);
    case Activation::sigmoid:
      return 1.0f / (1.0f + expf(-x));
    case Activation::quick_gelu:
      return x / (1.0f + expf(-1.702f * x));
    case Activation::relu_squared:
      return x < 0.0f ? 0.0f : x * x;
    default:
      return x;
  }
}

}  // namespace pyllm::cuda
