// What is beside the kernels: how much memory a GPU has, and arrays shared with other libraries through DLPack (dmlc/dlpack, the
// unversioned capsule, which every consumer takes).
#include <pybind11/stl.h>

#include <array>
#include <memory>

#include "bindings/cuda_launch.h"
#include "cuda/probes.h"

namespace pyllm::bindings {
namespace {

struct DLDevice {
  int32_t type, id;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: contiguous
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* manager;
  void (*deleter)(DLManagedTensor*);
};

struct Named {
  const char* name;
  DLDataType type;
};
constexpr std::array<Named, 6> kTypes{{{"float32", {2, 32, 1}},
                                       {"bfloat16", {4, 16, 1}},
                                       {"int32", {0, 32, 1}},
                                       {"uint32", {1, 32, 1}},
                                       {"int64", {0, 64, 1}},
                                       {"uint8", {1, 8, 1}}}};

// What a capsule that was given away keeps until its deleter is called.
struct Given {
  DLManagedTensor managed{};
  std::vector<int64_t> shape, strides;
  py::object owner;
};

// A capsule of this array in memory of DLPack's device kind `kind`.
py::capsule to_dlpack(const DeviceArray& a, int kind, int device) {
  auto given = std::make_unique<Given>();
  given->shape = a.shape;
  given->strides = a.strides;
  given->owner = a.owner;
  DLTensor& t = given->managed.tensor;
  t.data = a.data;
  t.device = {kind, device};
  t.ndim = int32_t(a.shape.size());
  for (const Named& named : kTypes)
    if (a.dtype == named.name) t.dtype = named.type;
  t.shape = given->shape.data();
  t.strides = given->strides.data();
  given->managed.manager = given.get();
  given->managed.deleter = [](DLManagedTensor* managed) {
    py::gil_scoped_acquire gil;
    delete static_cast<Given*>(managed->manager);
  };
  return py::capsule(&given.release()->managed, "dltensor", [](PyObject* object) {
    if (!PyCapsule_IsValid(object, "dltensor")) return;  // somebody took it
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(object, "dltensor"));
    managed->deleter(managed);
  });
}

// The array in a capsule, which is taken; its memory must be of kind `kind` and on device `device`.
std::unique_ptr<DeviceArray> from_dlpack(const py::object& capsule, int kind, int device) {
  if (!PyCapsule_IsValid(capsule.ptr(), "dltensor"))
    throw py::type_error("capsule: expected an unused DLPack capsule named dltensor, got " +
                         std::string(py::str(py::type::of(capsule))));
  auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  const DLTensor& t = managed->tensor;
  if (t.device.type != kind || t.device.id != device)
    throw py::value_error("capsule: expected memory of DLPack's device kind " + std::to_string(kind) + ", number " +
                          std::to_string(device) + ", got kind " + std::to_string(t.device.type) + ", number " +
                          std::to_string(t.device.id));
  auto a = std::make_unique<DeviceArray>();
  for (const Named& named : kTypes)
    if (t.dtype.code == named.type.code && t.dtype.bits == named.type.bits && t.dtype.lanes == 1) a->dtype = named.name;
  if (a->dtype.empty())
    throw py::type_error("capsule: expected float32, bfloat16, int32, uint32, int64 or uint8, got type code " +
                         std::to_string(t.dtype.code) + " of " + std::to_string(t.dtype.bits) + " bits");
  a->data = static_cast<char*>(t.data) + t.byte_offset;
  a->shape.assign(t.shape, t.shape + t.ndim);
  a->strides.resize(a->shape.size());
  int64_t step = 1;
  for (size_t i = a->shape.size(); i-- > 0; step *= a->shape[i]) a->strides[i] = t.strides ? t.strides[i] : step;
  PyCapsule_SetName(capsule.ptr(), "used_dltensor");
  a->owner = py::capsule(managed, [](void* p) {
    auto* taken = static_cast<DLManagedTensor*>(p);
    if (taken->deleter) taken->deleter(taken);
  });
  return a;
}

void read_probe(const py::object& out, const py::object& x, uintptr_t stream) {
  const auto& blocks = device_array(out, "out", "uint32", {-1});
  const auto& bytes = device_array(x, "x", "uint8", {-1});
  check_aligned(bytes, "x");
  if (bytes.dim(0) % 16)
    throw py::value_error("x: expected a multiple of 16 bytes, got " + std::to_string(bytes.dim(0)));
  check_range(blocks.dim(0), 0, kMaxRows, "out");
  py::gil_scoped_release release;
  raise(cuda::read_probe({static_cast<uint32_t*>(blocks.data), bytes.data, bytes.dim(0), blocks.dim(0)},
                         stream_of(stream)),
        "read_probe");
}

void empty_probe(bool overlapped, uintptr_t stream) {
  py::gil_scoped_release release;
  raise(cuda::empty_probe(overlapped, stream_of(stream)), "empty_probe");
}

}  // namespace

void bind_cuda_memory(py::module_& module) {
  module.def(
      "memory_info",
      [] {
        size_t free = 0, total = 0;
        raise(cudaMemGetInfo(&free, &total), "memory_info");
        return std::make_pair(free, total);
      },
      "Bytes of the current GPU that are free, and all.");
  module.def("read_probe", &read_probe, py::arg("out"), py::arg("x"), py::arg("stream"));
  module.def("empty_probe", &empty_probe, py::arg("overlapped"), py::arg("stream"));
  module.def("to_dlpack", &to_dlpack, py::arg("array"), py::arg("kind"), py::arg("device"));
  module.def("from_dlpack", &from_dlpack, py::arg("capsule"), py::arg("kind"), py::arg("device"));
}

}  // namespace pyllm::bindings
