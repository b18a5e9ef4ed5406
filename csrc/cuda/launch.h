// Launching a kernel: its dynamic shared memory allowed once, its stream named, its error returned.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace pyllm::cuda {

// What a block may have of shared memory on the current GPU, in bytes: 227 KB on Hopper, 163 KB on A100, 99 KB on other chips of
// Ampere and Ada.
cudaError_t shared_limit(int64_t* bytes);

// Lets `kernel` be launched on the current GPU with so many bytes of dynamic shared memory, and says whether the GPU knows programmatic
// dependent launch (Hopper and later). A kernel is allowed all that the GPU has at its first launch and never less, so that launches
// of one kernel by several threads do not meet.
cudaError_t prepare_launch(const void* kernel, int64_t shared_bytes, bool* programmatic);

// The kernel may start while the one before it in the stream still runs: it must wait by itself (wait_for_earlier_kernels in
// ptx.cuh). With `overlapped` false it starts when that one has ended.
template <class Args>
cudaError_t launch(void (*kernel)(Args), const Args& args, dim3 grid, int threads, int64_t shared_bytes,
                   cudaStream_t stream, bool overlapped = true) {
  bool programmatic = false;
  const cudaError_t error = prepare_launch(reinterpret_cast<const void*>(kernel), shared_bytes, &programmatic);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlapped && programmatic ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace pyllm::cuda
