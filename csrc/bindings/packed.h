// The packed weight matrix as Python holds it.
#pragma once
#include <memory>

#include "core/types.h"
#include "cpu/memory.h"

namespace pyllm::bindings {

struct PackedMatrix {
  PackedMatrix(int64_t n, int64_t k, DType dtype, int parts) : view{nullptr, n, k, parts, dtype}, memory(view.bytes()) {
    view.data = memory.data();
  }

  PackedView view;
  cpu::Buffer memory;
};

}  // namespace pyllm::bindings
