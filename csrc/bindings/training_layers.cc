// dropout and losses.
#include <cmath>

#include "bindings/arrays.h"
#include "bindings/context.h"

namespace pyllm::bindings {
namespace {

void dropout(Context& context, const py::object& y, const py::object& x, const py::object& residual,
             const py::object& dropout) {
  const auto in = rows_of<const float>(x, "x", -1, -1);
  const auto out = rows_of<float>(y, "out", in.rows, in.cols);
  DropoutArgs args{};
  args.y = out.data, args.y_stride = out.stride;
  args.x = in.data, args.x_stride = in.stride;
  args.rows = in.rows, args.dim = in.cols;
  if (overlap(out, in) && !same(out, in))
    throw py::value_error("out: expected x itself or memory of its own, got an array that overlaps x in part");
  if (!residual.is_none()) {
    const auto view = rows_of<const float>(residual, "residual", in.rows, in.cols);
    if (overlap(out, view) && !same(out, view))
      throw py::value_error(
          "out: expected residual itself or memory of its own, got an array that overlaps it in part");
    args.residual = view.data, args.residual_stride = view.stride;
  }
  args.dropout = dropout_of(dropout);
  context.submit(&cpu::KernelTable::dropout, args, {y, x, residual, dropout});
}

void check_values(const CrossEntropyArgs& a) {
  for (int64_t r = 0; r < a.rows; ++r)
    if (a.labels[r] != kIgnoredLabel && (a.labels[r] < 0 || a.labels[r] >= a.vocab))
      throw py::value_error("labels[" + std::to_string(r) + "]: expected a column of logits in [0, " +
                            std::to_string(a.vocab) + "), or " + std::to_string(kIgnoredLabel) + " to ignore, got " +
                            std::to_string(a.labels[r]));
}

void cross_entropy(Context& context, const py::object& logits, const py::object& loss, const py::object& labels,
                   const py::object& scale, double z_loss, double label_smoothing) {
  const auto in = rows_of<float>(logits, "logits", -1, -1);
  if (!(z_loss >= 0 && std::isfinite(float(z_loss))))
    throw py::value_error("z_loss: expected a finite number >= 0, got " + std::to_string(z_loss));
  if (!(label_smoothing >= 0 && label_smoothing <= 1))
    throw py::value_error("label_smoothing: expected 0 to 1, got " + std::to_string(label_smoothing));
  CrossEntropyArgs args{in.data,
                        vector_of<float>(loss, "loss", in.rows),
                        vector_of<const int32_t>(labels, "labels", in.rows),
                        vector_of<const float>(scale, "scale", 1, true),
                        in.rows,
                        in.cols,
                        in.stride,
                        float(z_loss),
                        float(label_smoothing)};
  context.submit(&cpu::KernelTable::cross_entropy, args, {logits, loss, labels, scale}, &check_values);
}

template <cpu::Kernel<ElementLossArgs> cpu::KernelTable::* kernel>
void element_loss(Context& context, const py::object& x, const py::object& loss, const py::object& targets,
                  const py::object& scale) {
  const auto in = rows_of<float>(x, "x", -1, -1);
  const auto wanted = rows_of<const float>(targets, "targets", in.rows, in.cols);
  if (overlap(in, wanted)) throw py::value_error("targets: expected memory of its own, got an array that overlaps x");
  ElementLossArgs args{in.data,     vector_of<float>(loss, "loss", in.rows),
                       wanted.data, vector_of<const float>(scale, "scale", 1, true),
                       in.rows,     in.cols,
                       in.stride,   wanted.stride};
  context.submit(kernel, args, {x, loss, targets, scale});
}

}  // namespace

void bind_training_layers(py::module_&, ContextClass& context) {
  context.def("dropout", &dropout, py::arg("y"), py::arg("x"), py::arg("residual"), py::arg("dropout"));
  context.def("cross_entropy", &cross_entropy, py::arg("logits"), py::arg("loss"), py::arg("labels"), py::arg("scale"),
              py::arg("z_loss"), py::arg("label_smoothing"));
  context.def("sigmoid_cross_entropy", &element_loss<&cpu::KernelTable::sigmoid_cross_entropy>, py::arg("x"),
              py::arg("loss"), py::arg("targets"), py::arg("scale"));
  context.def("squared_error", &element_loss<&cpu::KernelTable::squared_error>, py::arg("x"), py::arg("loss"),
              py::arg("targets"), py::arg("scale"));
}

}  // namespace pyllm::bindings
