// The matrix product without tensor cores, for float32 and for sizes that the others refuse: tiles of 16 by 32 through shared memory,
// each thread one pair of columns, chains of multiply-adds over rising k.
#include "cuda/epilogue.cuh"
#include "cuda/launch.h"
#include "cuda/matmul.h"

namespace pyllm::cuda {
namespace {

constexpr int kThreads = 256, kRows = 16, kColumns = 32, kDepth = 32, kPitch = kDepth + 1;

template <class T>
__global__ void __launch_bounds__(kThreads) plain_matmul_kernel(const __grid_constant__ MatmulArgs a) {
  float* xs = reinterpret_cast<float*>(shared_memory());
  float* ws = xs + kRows * kPitch;
  const int64_t row0 = int64_t(blockIdx.y) * kRows, column0 = int64_t(blockIdx.x) * kColumns;
  const int row = threadIdx.x / (kColumns / 2), column = threadIdx.x % (kColumns / 2) * 2;
  const T* x = static_cast<const T*>(a.x);
  const T* w = static_cast<const T*>(a.w);
  float v0 = 0.0f, v1 = 0.0f;
  wait_for_earlier_kernels();
  let_later_kernels_start();
  for (int64_t k0 = 0; k0 < a.k; k0 += kDepth) {
    for (int i = threadIdx.x; i < (kRows + kColumns) * kDepth; i += kThreads) {
      const int r = i / kDepth, c = i % kDepth;
      const int64_t k = k0 + c, m = r < kRows ? row0 + r : column0 + r - kRows;
      const bool valid = k < a.k && m < (r < kRows ? a.rows : a.n);
      xs[r * kPitch + c] = !valid ? 0.0f : to_float(r < kRows ? x[m * a.x_stride + k] : w[m * a.k + k]);
    }
    __syncthreads();
    for (int c = 0; c < kDepth; ++c) {
      v0 = fmaf(xs[row * kPitch + c], ws[column * kPitch + c], v0);
      v1 = fmaf(xs[row * kPitch + c], ws[(column + 1) * kPitch + c], v1);
    }
    __syncthreads();
  }
  finish_pair(a, row0 + row, column0 + column, v0, v1);
}

}  // namespace

cudaError_t plain_matmul(const MatmulArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.n == 0) return cudaSuccess;
  if (args.norm_weight || args.x_dtype != args.w_dtype) return cudaErrorInvalidValue;
  const dim3 grid(unsigned((args.n + kColumns - 1) / kColumns), unsigned((args.rows + kRows - 1) / kRows));
  return launch(args.w_dtype == DType::f32 ? plain_matmul_kernel<float> : plain_matmul_kernel<bf16>, args, grid,
                kThreads, int64_t(kRows + kColumns) * kPitch * 4, stream);
}

}  // namespace pyllm::cuda
