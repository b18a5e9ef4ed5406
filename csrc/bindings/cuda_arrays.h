// Arrays in the memory of a GPU, as the bindings of CUDA kernels take them. A message says which argument, what was expected and what
// came; what the memory holds cannot be checked here.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "core/types.h"

namespace pyllm::bindings {

namespace py = pybind11;

// A view; `owner` keeps the memory. The last dimension is contiguous, the others may be strided.
struct DeviceArray {
  void* data;
  std::vector<int64_t> shape, strides;  // strides in elements
  std::string dtype;
  py::object owner;

  int64_t dim(int i) const { return shape[size_t(i)]; }
  // Elements between neighbours of the dimension before the last.
  int64_t row_stride() const { return strides[strides.size() - 2]; }
  int64_t count() const;
};

// The element type of the CUDA kernels' operands: float32 or bfloat16, else TypeError.
DType float_dtype(const DeviceArray& a, const char* name);

// `object` as an array of this dtype (one of several, separated by '|') and shape (-1: any). With `contiguous` rows lie side by side.
const DeviceArray& device_array(const py::object& object, const char* name, const char* dtypes,
                                const std::vector<int64_t>& shape, bool contiguous = true);
// The data of such an array, or null for None.
void* device_data(const py::object& object, const char* name, const char* dtypes, const std::vector<int64_t>& shape);

// 16-byte pieces are copied: ValueError where the address is no multiple of 16.
void check_aligned(const DeviceArray& a, const char* name);

void bind_cuda_arrays(py::module_& module);
void bind_cuda_matmul(py::module_& module);
void bind_cuda_attention(py::module_& module);
void bind_cuda_layers(py::module_& module);
void bind_cuda_memory(py::module_& module);

}  // namespace pyllm::bindings
