#include "cuda/advance.h"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"

namespace pyllm::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) advance_kernel(const __grid_constant__ AdvanceArgs a) {
  wait_for_earlier_kernels();
  let_later_kernels_start();
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.count) return;
  a.tokens[i] = a.chosen[i];
  a.positions[i] += 1;
  a.slots[i] += 1;
  a.lengths[i] += 1;
  a.rows[i].position += 1;
}

}  // namespace

cudaError_t advance(const AdvanceArgs& args, cudaStream_t stream) {
  if (args.count == 0) return cudaSuccess;
  return launch(advance_kernel, args, dim3(unsigned((args.count + kThreads - 1) / kThreads)), kThreads, 0, stream);
}

}  // namespace pyllm::cuda
