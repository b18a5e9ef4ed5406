// norm, activation, embedding and gather.
#include "bindings/arrays.h"
#include "bindings/context.h"
#include "bindings/packed.h"

namespace pyllm::bindings {
namespace {

void gather(Context& context, const py::object& y, const py::object& x, const py::object& index) {
  const auto in = rows_of<const float>(x, "x", -1, -1);
  const auto out = rows_of<float>(y, "y", -1, in.cols);
  const int32_t* rows = vector_of<const int32_t>(index, "index", out.rows);
  if (!context.recording()) check_ids(rows, out.rows, in.rows, "index", "a row of x");
  GatherArgs args{out.data, in.data, rows, out.rows, in.cols, in.stride, out.stride};
  context.submit(&cpu::KernelTable::gather, args, {y, x, index});
}

}  // namespace

void bind_layers(py::module_&, ContextClass& context) {
  context.def("gather", &gather, py::arg("y"), py::arg("x"), py::arg("index"));
}

}  // namespace pyllm::bindings
