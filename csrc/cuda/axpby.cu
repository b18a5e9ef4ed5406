// Scaled sums.
#include "cuda/launch.h"
#include "cuda/layers.h"
#include "cuda/rows.cuh"

namespace pyllm::cuda {
namespace {

__global__ void __launch_bounds__(kRowThreads) axpby_kernel(const __grid_constant__ AxpbyArgs args) {
  const int64_t row = blockIdx.x;
  wait_for_earlier_kernels();
  let_later_kernels_start();
  for_columns(args.dim, [&](int64_t i) {
    const float x = args.x[row * args.x_stride + i];
    args.out[row * args.out_stride + i] =
        args.y ? fmaf(args.a, x, args.b * args.y[row * args.y_stride + i]) : args.a * x;
  });
}

}  // namespace

cudaError_t axpby(const AxpbyArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.dim == 0) return cudaSuccess;
  if (args.dim > kMaxRowWidth) return cudaErrorInvalidValue;
  return launch(axpby_kernel, args, row_grid(args.rows, args.dim), kRowThreads, 0, stream);
}

}  // namespace pyllm::cuda
