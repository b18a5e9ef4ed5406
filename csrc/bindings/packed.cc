// PackedMatrix, pack, pack_quantized, unpack and matmul.
#include "bindings/packed.h"

#include "bindings/arrays.h"
#include "bindings/context.h"

namespace pyllm::bindings {
namespace {

constexpr int64_t kMaxDim = int64_t(1) << 40;

struct Name {
  const char* name;
  DType dtype;
};
constexpr Name kNames[] = {{"float32", DType::f32},
                           {"float16", DType::f16},
                           {"bfloat16", DType::bf16},
                           {"int8", DType::i8},
                           {"int4", DType::i4}};

DType packed_dtype(const std::string& name) {
  for (const Name& n : kNames)
    if (name == n.name) return n.dtype;
  throw py::value_error("dtype: expected float32, float16, bfloat16, int8 or int4, got " + name);
}

// A matrix that has no memory yet.
PackedView packed_view(int64_t n, int64_t k, const std::string& dtype, bool gated, int64_t group_size,
                       const std::string& scale_dtype, bool zeros) {
  if (n < 0 || k < 0 || n > kMaxDim || k > kMaxDim || (k > 0 && n > (int64_t(1) << 46) / k))
    throw py::value_error("packed matrix: sizes out of range, got " + std::to_string(n) + " x " + std::to_string(k));
  PackedView view{nullptr, n, k, gated ? 2 : 1, packed_dtype(dtype)};
  if (!view.integers()) {
    if (group_size != 0 || zeros)
      throw py::value_error("group_size, zeros: expected none for " + dtype + ", they belong to int8 and int4");
    return view;
  }
  if (group_size != 0 && group_size != 32 && group_size != 64 && group_size != 128)
    throw py::value_error("group_size: expected 32, 64, 128 or 0 for one scale a row, got " +
                          std::to_string(group_size));
  view.group = group_size;
  view.has_zeros = zeros;
  view.scale_dtype = group_size == 0 ? DType::f32 : packed_dtype(scale_dtype);
  if (group_size != 0 && view.scale_dtype != DType::f16 && view.scale_dtype != DType::bf16)
    throw py::value_error("scale_dtype: expected float16 or bfloat16 for groups, got " + scale_dtype);
  return view;
}

std::unique_ptr<PackedMatrix> make_packed(int64_t n, int64_t k, const std::string& dtype, bool gated,
                                          int64_t group_size, const std::string& scale_dtype, bool zeros,
                                          const py::object& memory) {
  const PackedView view = packed_view(n, k, dtype, gated, group_size, scale_dtype, zeros);
  if (memory.is_none()) return std::make_unique<PackedMatrix>(view);
  if (!py::isinstance<py::array>(memory))
    throw py::type_error("memory: expected a numpy array, got " + std::string(py::str(py::type::of(memory))));
  const auto a = py::reinterpret_borrow<py::array>(memory);
  if (a.dtype().kind() != 'f' && a.dtype().kind() != 'u')
    throw py::type_error("memory: expected float32 or uint8, got " + shape_text(a));
  if (a.nbytes() != view.bytes())
    throw py::value_error("memory: expected " + std::to_string(view.bytes()) + " bytes, got " +
                          std::to_string(a.nbytes()));
  if (a.ndim() != 1 || !(a.flags() & py::array::c_style) || !a.writeable() ||
      reinterpret_cast<uintptr_t>(a.data()) % 64 != 0)
    throw py::value_error(
        "memory: expected one dimension, contiguous, writable and aligned to 64 bytes, as _cpu.allocate gives it");
  return std::make_unique<PackedMatrix>(view, const_cast<void*>(a.data()), a);
}

// The panels of a float32 matrix, which keep it alive.
py::array_t<float> flat(const py::object& matrix) {
  const PackedView& view = matrix.cast<const PackedMatrix&>().view;
  if (view.dtype != DType::f32)
    throw py::value_error("flat: expected a matrix of float32, got one of " + std::string(dtype_name(view.dtype)));
  auto* data = static_cast<float*>(const_cast<void*>(view.data));
  return py::array_t<float>({view.bytes() / int64_t(sizeof(float))}, {int64_t(sizeof(float))}, data, matrix);
}

int64_t packed_bytes(int64_t n, int64_t k, const std::string& dtype, bool gated, int64_t group_size,
                     const std::string& scale_dtype, bool zeros) {
  return packed_view(n, k, dtype, gated, group_size, scale_dtype, zeros).bytes();
}

// Rows [row, row + rows) of one part of dst exist.
void check_place(const PackedMatrix& dst, int64_t row, int64_t rows, int part) {
  if (row < 0 || row + rows > dst.view.n)
    throw py::value_error("rows " + std::to_string(row) + " to " + std::to_string(row + rows) +
                          " lie outside the packed matrix of " + std::to_string(dst.view.n));
  if (part < 0 || part >= dst.view.parts)
    throw py::value_error("part: expected 0 to " + std::to_string(dst.view.parts - 1) + ", got " +
                          std::to_string(part));
}

void pack(Context& context, PackedMatrix& dst, const py::array& src, int64_t row, int part) {
  if (src.ndim() != 2 || src.shape(1) != dst.view.k)
    throw py::value_error("src: expected [rows, " + std::to_string(dst.view.k) + "], got " + shape_text(src));
  check_place(dst, row, src.shape(0), part);
  if (dst.view.has_zeros) throw py::value_error("dst: expected a matrix without zeros, got one that takes integers");
  const DType dtype = dtype_of(src, "src");
  const int64_t size = dtype_bytes(dtype);
  if (src.strides(0) % size || src.strides(1) % size) throw py::value_error("src: strides must be whole elements");
  PackArgs args{dst.view, src.data(), dtype, row, src.shape(0), src.strides(0) / size, src.strides(1) / size, part};
  if (context.recording()) throw py::value_error("pack cannot be recorded into a graph: pack weights before");
  context.submit(&cpu::KernelTable::pack, args, {});
}

void pack_quantized(Context& context, PackedMatrix& dst, const py::object& values, const py::array& scales,
                    const py::object& zeros, int64_t row, int part) {
  const PackedView& w = dst.view;
  if (!w.integers())
    throw py::value_error("dst: expected a matrix of int8 or int4, got " + std::string(dtype_name(w.dtype)));
  const auto from = rows_of<const uint8_t>(values, "values", -1, w.dtype == DType::i4 ? (w.k + 1) / 2 : w.k);
  check_place(dst, row, from.rows, part);
  const DType scale_dtype = dtype_of(scales, "scales");
  if (scale_dtype != w.scale_dtype && w.scale_dtype != DType::f32)
    throw py::type_error("scales: expected " + std::string(dtype_name(w.scale_dtype)) + ", got " + shape_text(scales));
  check_array(scales, "scales", scales.dtype(), {from.rows, w.groups()}, false);
  if (zeros.is_none() == w.has_zeros)
    throw py::value_error(w.has_zeros ? "zeros: expected uint8, as the matrix has them, got None"
                                      : "zeros: expected None, as the matrix has none");
  const auto offsets = w.has_zeros ? rows_of<const uint8_t>(zeros, "zeros", from.rows, w.groups())
                                   : Rows<const uint8_t>{nullptr, 0, 0, 0};
  const int64_t scales_stride = scales.shape(0) > 1 ? scales.strides(0) / scales.itemsize() : w.groups();
  PackQuantizedArgs args{w,         from.data,   scales.data(), offsets.data,   scale_dtype, row,
                         from.rows, from.stride, scales_stride, offsets.stride, part};
  if (context.recording()) throw py::value_error("pack_quantized cannot be recorded into a graph: pack weights before");
  context.submit(&cpu::KernelTable::pack_quantized, args, {});
}

void unpack(Context& context, const py::object& out, const py::object& packed) {
  const PackedView& src = packed_of(packed, "packed");
  if (src.integers())
    throw py::value_error("packed: expected a matrix of floats, got one of " + std::string(dtype_name(src.dtype)));
  const auto rows = rows_of<float>(out, "out", src.parts * src.n, src.k);
  UnpackArgs args{rows.data, src, rows.stride};
  context.submit(&cpu::KernelTable::unpack, args, {out, packed});
}

void matmul(Context& context, const py::object& y, const py::object& x, const py::object& w, const py::object& bias,
            const py::object& bias_up, const py::object& residual, int activation, const py::object& pre) {
  const PackedView& packed = packed_of(w, "w");
  const auto in = rows_of<const float>(x, "x", -1, packed.k);
  const auto out = rows_of<float>(y, "out", in.rows, packed.n);
  const auto added = residual.is_none() ? Rows<const float>{nullptr, 0, 0, 0}
                                        : rows_of<const float>(residual, "residual", in.rows, packed.n);
  const auto stored =
      pre.is_none() ? Rows<float>{nullptr, 0, 0, 0} : rows_of<float>(pre, "pre", in.rows, packed.n * packed.parts);
  if (!bias_up.is_none() && packed.parts != 2) throw py::value_error("bias_up: expected None, as w is not gated");
  if (overlap(out, in)) throw py::value_error("out: expected memory of its own, got an array that overlaps x");
  if (overlap(out, added) && (out.data != added.data || (in.rows > 1 && out.stride != added.stride)))
    throw py::value_error(
        "out: expected residual itself or memory of its own, got an array that overlaps residual in part");
  if (overlap(stored, in) || overlap(stored, out) || overlap(stored, added))
    throw py::value_error("pre: expected memory of its own, got an array that overlaps x, out or residual");
  MatmulArgs args{out.data,
                  in.data,
                  packed,
                  vector_of<const float>(bias, "bias", packed.n, true),
                  vector_of<const float>(bias_up, "bias_up", packed.n, true),
                  added.data,
                  stored.data,
                  in.rows,
                  in.stride,
                  out.stride,
                  added.stride,
                  stored.stride,
                  activation_of(activation),
                  nullptr};
  context.submit(&cpu::KernelTable::matmul, args, {y, x, w, bias, bias_up, residual, pre});
}

}  // namespace

const PackedView& packed_of(const py::object& object, const char* name) {
  if (!py::isinstance<PackedMatrix>(object))
    throw py::type_error(std::string(name) + ": expected a PackedMatrix (pack the weights first), got " +
                         std::string(py::str(py::type::of(object))));
  return object.cast<const PackedMatrix&>().view;
}

const char* dtype_name(DType dtype) {
  for (const Name& n : kNames)
    if (n.dtype == dtype) return n.name;
  return "";
}

void bind_packed(py::module_& module, ContextClass& context) {
  py::class_<PackedMatrix>(module, "PackedMatrix", "A weight matrix [n, k] in the panel layout of the matmul kernel.")
      .def(py::init(&make_packed), py::arg("n"), py::arg("k"), py::arg("dtype"), py::arg("gated") = false,
           py::arg("group_size") = 0, py::arg("scale_dtype") = "bfloat16", py::arg("zeros") = false,
           py::arg("memory") = py::none())
      .def_property_readonly("flat", &flat)
      .def_property_readonly("shape", [](const PackedMatrix& p) { return py::make_tuple(p.view.n, p.view.k); })
      .def_property_readonly("dtype", [](const PackedMatrix& p) { return dtype_name(p.view.dtype); })
      .def_property_readonly("gated", [](const PackedMatrix& p) { return p.view.parts == 2; })
      .def_property_readonly("group_size", [](const PackedMatrix& p) { return p.view.group; })
      .def_property_readonly("symmetric", [](const PackedMatrix& p) { return !p.view.has_zeros; })
      .def_property_readonly("nbytes", [](const PackedMatrix& p) { return p.view.bytes(); });
  module.def("packed_bytes", &packed_bytes, py::arg("n"), py::arg("k"), py::arg("dtype"), py::arg("gated") = false,
             py::arg("group_size") = 0, py::arg("scale_dtype") = "bfloat16", py::arg("zeros") = false);
  context.def("matmul", &matmul, py::arg("out"), py::arg("x"), py::arg("w"), py::arg("bias"), py::arg("bias_up"),
              py::arg("residual"), py::arg("activation"), py::arg("pre"));
  context.def("unpack", &unpack, py::arg("out"), py::arg("packed"));
  context.def("pack", &pack, py::arg("dst"), py::arg("src"), py::arg("row") = 0, py::arg("part") = 0);
  context.def("pack_quantized", &pack_quantized, py::arg("dst"), py::arg("values"), py::arg("scales"), py::arg("zeros"),
              py::arg("row") = 0, py::arg("part") = 0);
}

}  // namespace pyllm::bindings
