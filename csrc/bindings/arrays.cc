#include "bindings/arrays.h"

namespace pyllm::bindings {

std::string shape_text(const py::array& a) {
  std::string text = std::string(py::str(a.dtype())) + "[";
  for (py::ssize_t i = 0; i < a.ndim(); ++i) text += (i ? ", " : "") + std::to_string(a.shape(i));
  return text + "]";
}

DType dtype_of(const py::array& a, const char* name) {
  const auto dtype = std::string(py::str(a.dtype()));
  if (dtype == "float32") return DType::f32;
  if (dtype == "float16") return DType::f16;
  if (dtype == "bfloat16") return DType::bf16;
  throw py::type_error(std::string(name) + ": expected float32, float16 or bfloat16, got " + shape_text(a));
}

void check_array(const py::array& a, const char* name, const py::dtype& dtype, const std::vector<int64_t>& shape,
                 bool writable) {
  bool ok = a.dtype().is(dtype) || a.dtype().equal(dtype);
  ok = ok && a.ndim() == py::ssize_t(shape.size());
  for (size_t i = 0; ok && i < shape.size(); ++i) ok = shape[i] < 0 || a.shape(py::ssize_t(i)) == shape[i];
  if (!ok) {
    std::string expected = std::string(py::str(dtype)) + "[";
    for (size_t i = 0; i < shape.size(); ++i)
      expected += (i ? ", " : "") + (shape[i] < 0 ? std::string("any") : std::to_string(shape[i]));
    const std::string message = std::string(name) + ": expected " + expected + "], got " + shape_text(a);
    if (!a.dtype().equal(dtype)) throw py::type_error(message);
    throw py::value_error(message);
  }
  const auto size = a.itemsize();
  const py::ssize_t last = a.ndim() - 1;
  const bool contiguous =
      a.size() == 0 || a.shape(last) <= 1 || a.strides(last) == size;  // numpy gives empty arrays any strides
  const bool whole = a.size() == 0 || a.ndim() < 2 || a.shape(0) <= 1 ||
                     (a.strides(0) % size == 0 && a.strides(0) >= size * a.shape(1));
  if (!contiguous || !whole || reinterpret_cast<uintptr_t>(a.data()) % size != 0)
    throw py::value_error(std::string(name) +
                          ": expected an aligned array whose last dimension is contiguous, got strides that are not: "
                          "pass numpy.ascontiguousarray of it");
  if (writable && !a.writeable())
    throw py::value_error(std::string(name) + ": expected a writable array, got a read-only one");
}

void check_ids(const int32_t* ids, int64_t count, int64_t limit, const char* name, const char* what) {
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= limit)
      throw py::value_error(std::string(name) + "[" + std::to_string(i) + "]: expected " + what + " in [0, " +
                            std::to_string(limit) + "), got " + std::to_string(ids[i]));
}

Activation activation_of(int kind) {
  if (kind < 0 || kind >= kActivations)
    throw py::value_error("activation: expected 0 to " + std::to_string(kActivations - 1) + ", got " +
                          std::to_string(kind));
  return Activation(kind);
}

Dropout dropout_of(const py::object& object) {
  if (object.is_none()) return {nullptr, 0, 0};
  if (!py::isinstance<py::tuple>(object) || py::len(object) != 3)
    throw py::type_error("dropout: expected (rate, seed, site) or None, got " + std::string(py::str(object)));
  const auto parts = py::reinterpret_borrow<py::tuple>(object);
  double rate;
  int64_t site;
  try {
    rate = parts[0].cast<double>(), site = parts[2].cast<int64_t>();
  } catch (const py::cast_error&) {
    throw py::type_error("dropout: expected (rate, seed, site) of a number, an array and an integer, got " +
                         std::string(py::str(object)));
  }
  const auto* seed = vector_of<const uint64_t>(parts[1], "seed", 1);
  if (!(rate >= 0 && float(rate) < 1))
    throw py::value_error("rate: expected at least 0 and below 1, got " + std::to_string(rate));
  if (site < 0 || site > INT32_MAX) throw py::value_error("site: expected 0 to 2^31 - 1, got " + std::to_string(site));
  return {rate > 0 ? seed : nullptr, float(rate), int32_t(site)};
}

}  // namespace pyllm::bindings
