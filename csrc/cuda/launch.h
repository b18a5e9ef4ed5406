// Launching a kernel: its dynamic shared memory allowed once, its stream named, its error returned.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace pyllm::cuda {

// An attribute of the current GPU.
cudaError_t gpu_attribute(cudaDeviceAttr attribute, int* value);

// What a block may have of shared memory on the current GPU, in bytes: 227 KB on Hopper, 163 KB on A100, 99 KB on other chips of
// Ampere and Ada.
cudaError_t shared_limit(int64_t* bytes);

// Whether kernels may start while those before them still run, which is so until somebody says otherwise; for the whole process.
void let_launches_overlap(bool yes);

// Lets `kernel` be launched on the current GPU with so many bytes of dynamic shared memory, and says whether launches
// may overlap: the GPU knows programmatic dependent launch (Hopper and later). A kernel is allowed all that the GPU has at its first launch and never less, so that launches
// of one kernel by several threads do not meet.
cudaError_t prepare_launch(const void* kernel, int64_t shared_bytes, bool* programmatic);

// The kernel may start while the one before it in the stream still runs: it must wait by itself (wait_for_earlier_kernels in
// ptx.cuh). With `overlapped` false it starts when that one has ended. `cluster` neighbouring blocks run together (Hopper and later).
template <class Args>
cudaError_t launch(void (*kernel)(Args), const Args& args, dim3 grid, int threads, int64_t shared_bytes,
                   cudaStream_t stream, bool overlapped = true, int cluster = 1) {
  bool programmatic = false;
  const cudaError_t error = prepare_launch(reinterpret_cast<const void*>(kernel), shared_bytes, &programmatic);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (overlapped && programmatic) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = unsigned(cluster);
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace pyllm::cuda
