// Checked views of numpy arrays. All argument checks of the kernels live in the bindings; a message says which argument, what
// was expected and what came.
#pragma once
#include <pybind11/numpy.h>

#include <functional>
#include <string>
#include <vector>

#include "core/types.h"

namespace pyllm::bindings {

namespace py = pybind11;

// A 2-D view with a contiguous last dimension; stride is in elements between rows.
template <class T>
struct Rows {
  T* data;
  int64_t rows, cols, stride;
};

std::string shape_text(const py::array& a);            // "float32[3, 4]"
DType dtype_of(const py::array& a, const char* name);  // float32, float16 or bfloat16, else TypeError

// The checks behind the templates below; -1 in `shape` matches anything.
void check_array(const py::array& a, const char* name, const py::dtype& dtype, const std::vector<int64_t>& shape,
                 bool writable);

// Array `a` of T with exactly this shape (-1: any), last dimension contiguous, as rows. 1-D arrays count as one row.
template <class T>
Rows<T> rows_of(const py::object& object, const char* name, int64_t rows, int64_t cols) {
  if (!py::isinstance<py::array>(object))
    throw py::type_error(std::string(name) + ": expected a numpy array, got " +
                         std::string(py::str(py::type::of(object))));
  auto a = py::reinterpret_borrow<py::array>(object);
  check_array(a, name, py::dtype::of<std::remove_const_t<T>>(), {rows, cols}, !std::is_const_v<T>);
  const int64_t stride = a.shape(0) > 1 ? a.strides(0) / int64_t(sizeof(T)) : a.shape(1);
  return {static_cast<T*>(const_cast<void*>(a.data())), a.shape(0), a.shape(1), stride};
}

// Contiguous 1-D array of T with this many elements (-1: any), or null for None where `optional`.
template <class T>
T* vector_of(const py::object& object, const char* name, int64_t size, bool optional = false,
             int64_t* length = nullptr) {
  if (optional && object.is_none()) return nullptr;
  if (!py::isinstance<py::array>(object))
    throw py::type_error(std::string(name) + ": expected a numpy array, got " +
                         std::string(py::str(py::type::of(object))));
  auto a = py::reinterpret_borrow<py::array>(object);
  check_array(a, name, py::dtype::of<std::remove_const_t<T>>(), {size}, !std::is_const_v<T>);
  if (length) *length = a.shape(0);
  return static_cast<T*>(const_cast<void*>(a.data()));
}

// Whether two blocks of rows are the same elements.
template <class A, class B>
bool same(const Rows<A>& a, const Rows<B>& b) {
  return a.data == b.data && (a.rows <= 1 || a.stride == b.stride);
}

// Whether two blocks of rows share memory; columns side by side in one wider array do not.
template <class A, class B>
bool overlap(const Rows<A>& a, const Rows<B>& b) {
  static_assert(sizeof(A) == sizeof(B));
  if (a.rows == 0 || a.cols == 0 || b.rows == 0 || b.cols == 0) return false;
  if (a.stride == b.stride) {
    const int64_t apart = (intptr_t(b.data) - intptr_t(a.data)) / int64_t(sizeof(A)) % a.stride;
    const int64_t column = apart < 0 ? apart + a.stride : apart;  // of b, where a begins at 0
    if (column >= a.cols && column + b.cols <= a.stride) return false;
  }
  const auto* a_end = a.data + (a.rows - 1) * a.stride + a.cols;
  const auto* b_end = b.data + (b.rows - 1) * b.stride + b.cols;
  return std::less<const void*>()(a.data, b_end) && std::less<const void*>()(b.data, a_end);
}

// Every value of ids lies in [0, limit), else ValueError naming the first that does not.
void check_ids(const int32_t* ids, int64_t count, int64_t limit, const char* name, const char* what);

Activation activation_of(int kind);  // the enum's value, else ValueError

// (rate, seed uint64 [1], site) as attention and dropout take it; None or a rate of 0: none.
Dropout dropout_of(const py::object& object);

}  // namespace pyllm::bindings
