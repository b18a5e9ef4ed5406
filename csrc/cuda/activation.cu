// Activations that no matrix product's epilogue takes, and rounding to bf16.
#include "cuda/activate.cuh"
#include "cuda/launch.h"
#include "cuda/layers.h"
#include "cuda/rows.cuh"

namespace pyllm::cuda {
namespace {

template <class X, class Y>
__global__ void __launch_bounds__(kRowThreads) activation_kernel(const __grid_constant__ ActivationArgs a) {
  const X* x = static_cast<const X*>(a.x) + int64_t(blockIdx.x) * a.x_stride;
  const X* up = a.up ? static_cast<const X*>(a.up) + int64_t(blockIdx.x) * a.up_stride : nullptr;
  Y* y = static_cast<Y*>(a.y) + int64_t(blockIdx.x) * a.y_stride;
  wait_for_earlier_kernels();
  let_later_kernels_start();
  for_columns(a.dim, [&](int64_t i) {
    const float v = activate(to_float(x[i]), a.activation);
    store(y + i, up ? v * to_float(up[i]) : v);
  });
}

}  // namespace

cudaError_t activation(const ActivationArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.dim == 0) return cudaSuccess;
  if (args.dim > kMaxRowWidth) return cudaErrorInvalidValue;
  const bool narrow = args.y_dtype == DType::bf16;
  const auto kernel = args.x_dtype == DType::f32
                          ? (narrow ? activation_kernel<float, bf16> : activation_kernel<float, float>)
                          : (narrow ? activation_kernel<bf16, bf16> : activation_kernel<bf16, float>);
  return launch(kernel, args, row_grid(args.rows, args.dim), kRowThreads, 0, stream);
}

}  // namespace pyllm::cuda
