// Launching a kernel: its dynamic shared memory allowed once, its stream named, its error returned.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace pyllm::cuda {

// `overlapped`: the kernel may start while the one before it in the stream still runs; it must wait by itself
// (wait_for_earlier_kernels in ptx.cuh).
template <class Args>
cudaError_t launch(void (*kernel)(Args), const Args& args, dim3 grid, int threads, int64_t shared_bytes,
                   bool overlapped, cudaStream_t stream) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlapped ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace pyllm::cuda
