// The packed weight matrix as Python holds it.
#pragma once
#include <pybind11/pybind11.h>

#include <memory>

#include "core/types.h"
#include "cpu/memory.h"

namespace pyllm::bindings {

struct PackedMatrix {
  explicit PackedMatrix(const PackedView& shape) : view(shape), memory(std::make_unique<cpu::Buffer>(view.bytes())) {
    view.data = memory->data();
  }
  // Over memory of `owner`.
  PackedMatrix(const PackedView& shape, void* data, pybind11::object owner) : view(shape), owner(std::move(owner)) {
    view.data = data;
  }

  PackedView view;
  std::unique_ptr<cpu::Buffer> memory;
  pybind11::object owner;
};

// The packed matrix that an argument is, else TypeError.
const PackedView& packed_of(const pybind11::object& object, const char* name);
const char* dtype_name(DType dtype);

}  // namespace pyllm::bindings
