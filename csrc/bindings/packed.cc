// PackedMatrix, pack and matmul.
#include "bindings/packed.h"

#include <functional>

#include "bindings/arrays.h"
#include "bindings/context.h"

namespace pyllm::bindings {
namespace {

constexpr int64_t kMaxDim = int64_t(1) << 40;

std::unique_ptr<PackedMatrix> make_packed(int64_t n, int64_t k, const std::string& dtype, bool gated) {
  if (n < 0 || k < 0 || n > kMaxDim || k > kMaxDim || (k > 0 && n > (int64_t(1) << 46) / k))
    throw py::value_error("packed matrix: sizes out of range, got " + std::to_string(n) + " x " + std::to_string(k));
  DType type;
  if (dtype == "float32")
    type = DType::f32;
  else if (dtype == "float16")
    type = DType::f16;
  else if (dtype == "bfloat16")
    type = DType::bf16;
  else
    throw py::value_error("dtype: expected float32, float16 or bfloat16, got " + dtype);
  return std::make_unique<PackedMatrix>(n, k, type, gated ? 2 : 1);
}

void pack(Context& context, PackedMatrix& dst, const py::array& src, int64_t row, int part) {
  if (src.ndim() != 2 || src.shape(1) != dst.view.k)
    throw py::value_error("src: expected [rows, " + std::to_string(dst.view.k) + "], got " + shape_text(src));
  if (row < 0 || row + src.shape(0) > dst.view.n)
    throw py::value_error("rows " + std::to_string(row) + " to " + std::to_string(row + src.shape(0)) +
                          " lie outside the packed matrix of " + std::to_string(dst.view.n));
  if (part < 0 || part >= dst.view.parts)
    throw py::value_error("part: expected 0 to " + std::to_string(dst.view.parts - 1) + ", got " +
                          std::to_string(part));
  const DType dtype = dtype_of(src, "src");
  const int64_t size = dtype_bytes(dtype);
  if (src.strides(0) % size || src.strides(1) % size) throw py::value_error("src: strides must be whole elements");
  PackArgs args{dst.view, src.data(), dtype, row, src.shape(0), src.strides(0) / size, src.strides(1) / size, part};
  if (context.recording()) throw py::value_error("pack cannot be recorded into a graph: pack weights before");
  context.submit(&cpu::KernelTable::pack, args, {});
}

// Whether two blocks of rows share memory.
template <class A, class B>
bool overlap(const Rows<A>& a, const Rows<B>& b) {
  if (a.rows == 0 || a.cols == 0 || b.rows == 0 || b.cols == 0) return false;
  const auto* a_end = a.data + (a.rows - 1) * a.stride + a.cols;
  const auto* b_end = b.data + (b.rows - 1) * b.stride + b.cols;
  return std::less<const void*>()(a.data, b_end) && std::less<const void*>()(b.data, a_end);
}

void matmul(Context& context, const py::object& y, const py::object& x, const py::object& w, const py::object& bias,
            const py::object& bias_up, const py::object& residual, int activation) {
  if (!py::isinstance<PackedMatrix>(w))
    throw py::type_error("w: expected a PackedMatrix (pack the weights first), got " +
                         std::string(py::str(py::type::of(w))));
  const PackedView& packed = w.cast<const PackedMatrix&>().view;
  const auto in = rows_of<const float>(x, "x", -1, packed.k);
  const auto out = rows_of<float>(y, "out", in.rows, packed.n);
  const auto added = residual.is_none() ? Rows<const float>{nullptr, 0, 0, 0}
                                        : rows_of<const float>(residual, "residual", in.rows, packed.n);
  if (activation < int(Activation::none) || activation > int(Activation::relu))
    throw py::value_error("activation: expected 0 to 4, got " + std::to_string(activation));
  if (!bias_up.is_none() && packed.parts != 2) throw py::value_error("bias_up: expected None, as w is not gated");
  if (overlap(out, in)) throw py::value_error("out: expected memory of its own, got an array that overlaps x");
  if (overlap(out, added) && (out.data != added.data || (in.rows > 1 && out.stride != added.stride)))
    throw py::value_error(
        "out: expected residual itself or memory of its own, got an array that overlaps residual in part");
  MatmulArgs args{out.data,
                  in.data,
                  packed,
                  vector_of<const float>(bias, "bias", packed.n, true),
                  vector_of<const float>(bias_up, "bias_up", packed.n, true),
                  added.data,
                  in.rows,
                  in.stride,
                  out.stride,
                  added.stride,
                  Activation(activation),
                  nullptr};
  context.submit(&cpu::KernelTable::matmul, args, {y, x, w, bias, bias_up, residual});
}

const char* dtype_name(DType t) { return t == DType::f32 ? "float32" : t == DType::f16 ? "float16" : "bfloat16"; }

}  // namespace

void bind_packed(py::module_& module, ContextClass& context) {
  py::class_<PackedMatrix>(module, "PackedMatrix", "A weight matrix [n, k] in the panel layout of the matmul kernel.")
      .def(py::init(&make_packed), py::arg("n"), py::arg("k"), py::arg("dtype"), py::arg("gated") = false)
      .def_property_readonly("shape", [](const PackedMatrix& p) { return py::make_tuple(p.view.n, p.view.k); })
      .def_property_readonly("dtype", [](const PackedMatrix& p) { return dtype_name(p.view.dtype); })
      .def_property_readonly("gated", [](const PackedMatrix& p) { return p.view.parts == 2; })
      .def_property_readonly("nbytes", [](const PackedMatrix& p) { return p.view.bytes(); });
  context.def("matmul", &matmul, py::arg("out"), py::arg("x"), py::arg("w"), py::arg("bias"), py::arg("bias_up"),
              py::arg("residual"), py::arg("activation"));
  context.def("pack", &pack, py::arg("dst"), py::arg("src"), py::arg("row") = 0, py::arg("part") = 0);
}

}  // namespace pyllm::bindings
