// pyllm._cuda: the CUDA kernels for Python. It imports on a machine without a GPU or a driver; then every launch is an error.
#include <cuda_runtime.h>

#include "bindings/cuda_arrays.h"
#include "cuda/launch.h"

namespace pyllm::bindings {

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "Compiled CUDA kernels of pyllm; pyllm.device is the way to the memory that they work on.";
  module.attr("RUNTIME_VERSION") = CUDART_VERSION;
  module.attr("ARCHITECTURES") = PYLLM_CUDA_ARCHITECTURES;
  module.def(
      "driver_version",
      [] {
        int version = 0;
        return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
      },
      "The CUDA version that the driver supports, 1000 * major + 10 * minor; 0 where there is no driver.");
  module.def("let_launches_overlap", &cuda::let_launches_overlap, py::arg("yes"),
             "Whether kernels may start while those before them still run; for the whole process.");
  bind_cuda_arrays(module);
  bind_cuda_matmul(module);
  bind_cuda_attention(module);
  bind_cuda_layers(module);
  bind_cuda_memory(module);
}

}  // namespace pyllm::bindings
