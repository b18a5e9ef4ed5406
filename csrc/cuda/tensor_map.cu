#include "cuda/launch.h"
#include "cuda/tensor_map.h"

namespace pyllm::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

struct Found {
  Encode encode;
  cudaError_t error;
};

// The driver's function, which a machine without a driver has nothing to link against.
Found find_encode() {
  void* address = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &address, cudaEnableDefault, &result);
#endif
  if (error == cudaSuccess && result != cudaDriverEntryPointSuccess) return {nullptr, cudaErrorNotSupported};
  return {reinterpret_cast<Encode>(address), error};
}

}  // namespace

cudaError_t has_wgmma(bool* yes) {
  *yes = false;
#if defined(PYLLM_WGMMA)
  int major = 0, minor = 0;
  cudaError_t error = gpu_attribute(cudaDevAttrComputeCapabilityMajor, &major);
  if (error == cudaSuccess) error = gpu_attribute(cudaDevAttrComputeCapabilityMinor, &minor);
  *yes = major == 9 && minor == 0;
  return error;
#else
  return cudaSuccess;
#endif
}

cudaError_t make_tensor_map(CUtensorMap* map, const void* m, int64_t rows, int64_t columns, int64_t stride, int box) {
  static const Found found = find_encode();  // once, whichever thread comes first
  if (found.error != cudaSuccess) return found.error;
  const cuuint64_t size[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(stride) * 2};
  const cuuint32_t boxes[2] = {64, cuuint32_t(box)}, steps[2] = {1, 1};
  const CUresult result = found.encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(m), size, strides,
                                       boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                       CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace pyllm::cuda
