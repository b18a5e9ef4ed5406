// Gradients of matmul and of activations, column sums, and the optimizer.
#include <cmath>

#include "bindings/arrays.h"
#include "bindings/context.h"
#include "bindings/packed.h"

namespace pyllm::bindings {
namespace {

void matmul_dx(Context& context, const py::object& dx, const py::object& dy, const py::object& w, bool add) {
  const PackedView& packed = packed_of(w, "w");
  if (packed.integers())
    throw py::value_error("w: expected a matrix of floats, got one of " + std::string(dtype_name(packed.dtype)));
  const auto in = rows_of<const float>(dy, "dy", -1, packed.parts * packed.n);
  const auto out = rows_of<float>(dx, "out", in.rows, packed.k);
  if (overlap(out, in)) throw py::value_error("out: expected memory of its own, got an array that overlaps dy");
  MatmulDxArgs args{out.data, in.data, packed, in.rows, out.stride, in.stride, add, nullptr};
  context.submit(&cpu::KernelTable::matmul_dx, args, {dx, dy, w});
}

void matmul_dw(Context& context, const py::object& dw, const py::object& dy, const py::object& x) {
  const PackedView& packed = packed_of(dw, "dw");
  if (packed.dtype != DType::f32)
    throw py::value_error("dw: expected a matrix of float32, got one of " + std::string(dtype_name(packed.dtype)));
  const auto gradient = rows_of<const float>(dy, "dy", -1, packed.parts * packed.n);
  const auto in = rows_of<const float>(x, "x", gradient.rows, packed.k);
  MatmulDwArgs args{packed, gradient.data, in.data, in.rows, gradient.stride, in.stride, nullptr};
  context.submit(&cpu::KernelTable::matmul_dw, args, {dw, dy, x});
}

void column_sum(Context& context, const py::object& out, const py::object& x) {
  const auto in = rows_of<const float>(x, "x", -1, -1);
  ColumnSumArgs args{vector_of<float>(out, "out", in.cols), in.data, in.rows, in.cols, in.stride};
  context.submit(&cpu::KernelTable::column_sum, args, {out, x});
}

void activation_backward(Context& context, const py::object& dpre, const py::object& dy, const py::object& pre,
                         int kind, bool gated) {
  const auto gradient = rows_of<const float>(dy, "dy", -1, -1);
  const int64_t width = gradient.cols * (gated ? 2 : 1);
  const auto in = rows_of<const float>(pre, "pre", gradient.rows, width);
  const auto out = rows_of<float>(dpre, "out", gradient.rows, width);
  if (overlap(out, in) && !same(out, in))
    throw py::value_error("out: expected pre itself or memory of its own, got an array that overlaps pre in part");
  if (overlap(out, gradient) && (gated || !same(out, gradient)))
    throw py::value_error("out: expected memory that is not that of dy" + std::string(gated ? "" : ", or dy itself") +
                          ", got an array that overlaps it");
  ActivationBackwardArgs args{out.data,   gradient.data,   in.data,   gradient.rows,       gradient.cols,
                              out.stride, gradient.stride, in.stride, activation_of(kind), gated};
  context.submit(&cpu::KernelTable::activation_backward, args, {dpre, dy, pre});
}

// What changes from step to step.
void check_values(const AdamWArgs& a) {
  const double *h = a.hyper, rate = h[0], eps = h[3];
  if (!(rate >= 0 && std::isfinite(rate)))
    throw py::value_error("hyper[0]: expected a finite rate >= 0, got " + std::to_string(rate));
  for (int i = 1; i <= 2; ++i)
    if (!(h[i] >= 0 && h[i] < 1))
      throw py::value_error("hyper[" + std::to_string(i) + "]: expected beta in [0, 1), got " + std::to_string(h[i]));
  if (!(float(eps) > 0 && std::isfinite(eps)))  // of 0, the columns that pad a panel would become 0 / 0
    throw py::value_error("hyper[3]: expected a finite eps > 0, got " + std::to_string(eps));
  for (int i = 4; i <= 5; ++i)
    if (!(h[i] > 0 && h[i] <= 1))
      throw py::value_error("hyper[" + std::to_string(i) + "]: expected 1 - beta^t in (0, 1], got " +
                            std::to_string(h[i]));
}

void adamw(Context& context, const py::object& params, const py::object& grads, const py::object& m,
           const py::object& v, const py::object& hyper, double weight_decay, const py::object& narrow, bool clear) {
  AdamWArgs args{};
  args.params = vector_of<float>(params, "params", -1, false, &args.count);
  args.grads = vector_of<float>(grads, "grads", args.count);
  args.m = vector_of<float>(m, "m", args.count);
  args.v = vector_of<float>(v, "v", args.count);
  args.hyper = vector_of<const double>(hyper, "hyper", 7);
  if (!(weight_decay >= 0 && std::isfinite(weight_decay)))
    throw py::value_error("weight_decay: expected a finite number >= 0, got " + std::to_string(weight_decay));
  args.decay = weight_decay;
  args.clear = clear;
  if (!narrow.is_none()) {
    args.narrow = packed_of(narrow, "narrow");
    if (args.narrow.dtype != DType::bf16)
      throw py::value_error("narrow: expected a matrix of bfloat16, got one of " +
                            std::string(dtype_name(args.narrow.dtype)));
    const int64_t count = args.narrow.panels() * args.narrow.parts * args.narrow.k * kPanel;
    if (count != args.count)
      throw py::value_error("params: expected the " + std::to_string(count) +
                            " elements of the panels of narrow, got " + std::to_string(args.count));
  }
  context.submit(&cpu::KernelTable::adamw, args, {params, grads, m, v, hyper, narrow}, &check_values);
}

void square_norm(Context& context, const py::object& out, const py::object& x) {
  SquareNormArgs args{vector_of<double>(out, "out", 1), nullptr, 0, nullptr};
  args.x = vector_of<const float>(x, "x", -1, false, &args.count);
  context.submit(&cpu::KernelTable::square_norm, args, {out, x});
}

}  // namespace

void bind_training_weights(py::module_&, ContextClass& context) {
  context.def("matmul_dx", &matmul_dx, py::arg("out"), py::arg("dy"), py::arg("w"), py::arg("add"))
      .def("matmul_dw", &matmul_dw, py::arg("dw"), py::arg("dy"), py::arg("x"))
      .def("column_sum", &column_sum, py::arg("out"), py::arg("x"))
      .def("activation_backward", &activation_backward, py::arg("out"), py::arg("dy"), py::arg("pre"),
           py::arg("activation"), py::arg("gated"))
      .def("adamw", &adamw, py::arg("params"), py::arg("grads"), py::arg("m"), py::arg("v"), py::arg("hyper"),
           py::arg("weight_decay"), py::arg("narrow"), py::arg("clear"))
      .def("square_norm", &square_norm, py::arg("out"), py::arg("x"));
}

}  // namespace pyllm::bindings
