#include "bindings/cuda_arrays.h"

#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <utility>

namespace pyllm::bindings {
namespace {

constexpr std::array<std::pair<const char*, int64_t>, 6> kDtypes{
    {{"float32", 4}, {"bfloat16", 2}, {"int32", 4}, {"uint32", 4}, {"int64", 8}, {"uint8", 1}}};

int64_t item_bytes(const std::string& dtype) {
  for (const auto& [name, bytes] : kDtypes)
    if (dtype == name) return bytes;
  throw py::type_error("dtype: expected float32, bfloat16, int32, uint32, int64 or uint8, got " + dtype);
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + (shape[i] < 0 ? "any" : std::to_string(shape[i]));
  return text + "]";
}

bool listed(const std::string& dtype, const std::string& dtypes) {
  return ("|" + dtypes + "|").find("|" + dtype + "|") != std::string::npos;
}

std::unique_ptr<DeviceArray> make_array(uintptr_t pointer, const std::vector<int64_t>& shape, const std::string& dtype,
                                        const py::object& strides, const py::object& owner) {
  auto a = std::make_unique<DeviceArray>();
  a->data = reinterpret_cast<void*>(pointer);
  a->shape = shape;
  a->dtype = dtype;
  a->owner = owner;
  if (pointer % uintptr_t(item_bytes(dtype)))
    throw py::value_error("pointer: expected a multiple of the size of " + dtype + ", got " + std::to_string(pointer));
  int64_t step = 1;
  a->strides.resize(shape.size());
  for (size_t i = shape.size(); i-- > 0; step *= shape[i]) {
    if (shape[i] < 0) throw py::value_error("shape: expected sizes of at least 0, got " + shape_text(shape));
    if (shape[i] > 0 && step > (int64_t(1) << 60) / shape[i])
      throw py::value_error("shape: expected at most 2^60 elements, got " + shape_text(shape));
    a->strides[i] = step;
  }
  if (!strides.is_none()) a->strides = strides.cast<std::vector<int64_t>>();
  if (a->strides.size() != shape.size())
    throw py::value_error("strides: expected " + std::to_string(shape.size()) + ", got " +
                          std::to_string(a->strides.size()));
  for (const int64_t stride : a->strides)
    if (stride < 0) throw py::value_error("strides: expected at least 0, got " + std::to_string(stride));
  return a;
}

}  // namespace

int64_t DeviceArray::count() const {
  int64_t n = 1;
  for (const int64_t size : shape) n *= size;
  return n;
}

DType float_dtype(const DeviceArray& a, const char* name) {
  if (a.dtype == "float32") return DType::f32;
  if (a.dtype == "bfloat16") return DType::bf16;
  throw py::type_error(std::string(name) + ": expected float32 or bfloat16, got " + a.dtype);
}

const DeviceArray& device_array(const py::object& object, const char* name, const char* dtypes,
                                const std::vector<int64_t>& shape, bool contiguous) {
  if (!py::isinstance<DeviceArray>(object))
    throw py::type_error(std::string(name) + ": expected a pyllm._cuda.Array, got " +
                         std::string(py::str(py::type::of(object))));
  const auto& a = object.cast<const DeviceArray&>();
  if (!listed(a.dtype, dtypes)) throw py::type_error(std::string(name) + ": expected " + dtypes + ", got " + a.dtype);
  bool fits = a.shape.size() == shape.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] < 0 || shape[i] == a.shape[i];
  if (!fits)
    throw py::value_error(std::string(name) + ": expected shape " + shape_text(shape) + ", got " + shape_text(a.shape));
  int64_t step = 1;
  for (size_t i = a.shape.size(); i-- > 0; step *= a.shape[i]) {
    const bool last = i + 1 == a.shape.size();
    if (a.shape[i] > 1 && a.strides[i] != step && (contiguous || last))
      throw py::value_error(std::string(name) + ": expected " +
                            (contiguous ? "contiguous memory" : "a contiguous last dimension") + ", got strides " +
                            shape_text(a.strides) + " for shape " + shape_text(a.shape));
    if (!contiguous && !last && a.shape[i] > 1 && a.strides[i] < a.shape.back())
      throw py::value_error(std::string(name) + ": expected rows that do not overlap, got strides " +
                            shape_text(a.strides) + " for shape " + shape_text(a.shape));
  }
  if (a.count() > 0 && a.data == nullptr) throw py::value_error(std::string(name) + ": its address is 0");
  return a;
}

void* device_data(const py::object& object, const char* name, const char* dtypes, const std::vector<int64_t>& shape) {
  return object.is_none() ? nullptr : device_array(object, name, dtypes, shape).data;
}

void check_aligned(const DeviceArray& a, const char* name) {
  if (reinterpret_cast<uintptr_t>(a.data) % 16)
    throw py::value_error(std::string(name) + ": expected an address that is a multiple of 16, got one that is " +
                          std::to_string(reinterpret_cast<uintptr_t>(a.data) % 16) + " past one");
}

void bind_cuda_arrays(py::module_& module) {
  // Of this module alone: the tests load a second build of it, which runs on the host, beside it.
  py::class_<DeviceArray>(module, "Array", "A view of device memory, which `owner` keeps.", py::module_local())
      .def(py::init(&make_array), py::arg("pointer"), py::arg("shape"), py::arg("dtype"), py::kw_only(),
           py::arg("strides") = py::none(), py::arg("owner") = py::none())
      .def_property_readonly("pointer", [](const DeviceArray& a) { return reinterpret_cast<uintptr_t>(a.data); })
      .def_property_readonly("shape", [](const DeviceArray& a) { return py::tuple(py::cast(a.shape)); })
      .def_property_readonly("strides", [](const DeviceArray& a) { return py::tuple(py::cast(a.strides)); })
      .def_readonly("dtype", &DeviceArray::dtype)
      .def_readonly("owner", &DeviceArray::owner)
      .def_property_readonly("nbytes", [](const DeviceArray& a) { return a.count() * item_bytes(a.dtype); });
}

}  // namespace pyllm::bindings
