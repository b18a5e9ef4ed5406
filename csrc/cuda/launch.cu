#include <atomic>
#include <mutex>
#include <set>
#include <utility>

#include "cuda/launch.h"

namespace pyllm::cuda {
namespace {

constexpr int64_t kUnasked = 48 * 1024;  // bytes that every kernel may have
std::atomic<bool> overlap{true};

}  // namespace

cudaError_t gpu_attribute(cudaDeviceAttr attribute, int* value) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? cudaDeviceGetAttribute(value, attribute, device) : error;
}

cudaError_t shared_limit(int64_t* bytes) {
  int value = 0;
  const cudaError_t error = gpu_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &value);
  *bytes = value;
  return error;
}

void let_launches_overlap(bool yes) { overlap = yes; }

cudaError_t prepare_launch(const void* kernel, int64_t shared_bytes, bool* programmatic) {
  int major = 0, device = 0;
  cudaError_t error = gpu_attribute(cudaDevAttrComputeCapabilityMajor, &major);
  *programmatic = major >= 9 && overlap;
  if (error != cudaSuccess || shared_bytes <= kUnasked) return error;
  int64_t limit = 0;
  error = shared_limit(&limit);
  if (error != cudaSuccess) return error;
  if (shared_bytes > limit) return cudaErrorInvalidValue;
  error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(limit));
  if (error == cudaSuccess) allowed.insert({kernel, device});
  return error;
}

}  // namespace pyllm::cuda
