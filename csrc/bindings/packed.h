// The packed weight matrix as Python holds it.
#pragma once
#include <memory>

#include "core/types.h"
#include "cpu/memory.h"

namespace pyllm::bindings {

struct PackedMatrix {
  explicit PackedMatrix(const PackedView& shape) : view(shape), memory(view.bytes()) { view.data = memory.data(); }

  PackedView view;
  cpu::Buffer memory;
};

}  // namespace pyllm::bindings
