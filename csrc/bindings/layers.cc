// norm, activation, axpby, clamp, embedding and gather, and the backward passes of norm, clamp, embedding and gather.
#include <cmath>

#include "bindings/arrays.h"
#include "bindings/context.h"
#include "bindings/packed.h"

namespace pyllm::bindings {
namespace {

// [R, D], or [R, heads, D] with adjacent heads.
template <class T>
struct Heads {
  T* data;
  int64_t rows, heads, dim, stride;
};

template <class T>
Heads<T> heads_of(const py::object& object, const char* name, int64_t rows, int64_t heads, int64_t dim) {
  if (!py::isinstance<py::array>(object) || py::reinterpret_borrow<py::array>(object).ndim() != 3) {
    const auto view = rows_of<T>(object, name, rows, dim);
    if (heads > 1) throw py::value_error(std::string(name) + ": expected three dimensions like x, got two");
    return {view.data, view.rows, 1, view.cols, view.stride};
  }
  const auto a = py::reinterpret_borrow<py::array>(object);
  check_array(a, name, py::dtype::of<std::remove_const_t<T>>(), {rows, heads, dim}, !std::is_const_v<T>);
  const int64_t size = sizeof(T), width = a.shape(1) * a.shape(2);
  const bool apart =
      (a.shape(1) > 1 && a.strides(1) != size * a.shape(2)) || (a.shape(0) > 1 && a.strides(0) < size * width);
  if (a.size() > 0 && apart)
    throw py::value_error(std::string(name) +
                          ": expected adjacent heads, got strides that part them: pass numpy.ascontiguousarray of it");
  return {static_cast<T*>(const_cast<void*>(a.data())), a.shape(0), a.shape(1), a.shape(2),
          a.shape(0) > 1 ? a.strides(0) / size : width};
}

void check_norm(double eps, int kind) {
  if (!(eps >= 0 && std::isfinite(eps)))
    throw py::value_error("eps: expected a finite number >= 0, got " + std::to_string(eps));
  if (kind != int(NormKind::layer) && kind != int(NormKind::rms))
    throw py::value_error("kind: expected 0 (layer) or 1 (rms), got " + std::to_string(kind));
}

void norm(Context& context, const py::object& y, const py::object& x, const py::object& weight, const py::object& bias,
          const py::object& residual, const py::object& sum, double eps, int kind) {
  check_norm(eps, kind);
  const auto in = heads_of<const float>(x, "x", -1, -1, -1);
  const auto out = heads_of<float>(y, "out", in.rows, in.heads, in.dim);
  NormArgs args{};
  args.y = out.data;
  args.x = in.data;
  args.weight = vector_of<const float>(weight, "weight", in.dim, true);
  args.bias = vector_of<const float>(bias, "bias", in.dim, true);
  if (!residual.is_none()) {
    const auto view = heads_of<const float>(residual, "residual", in.rows, in.heads, in.dim);
    args.residual = view.data, args.residual_stride = view.stride;
  }
  if (!sum.is_none()) {
    const auto view = heads_of<float>(sum, "sum_out", in.rows, in.heads, in.dim);
    if (residual.is_none())
      throw py::value_error("sum_out: expected a residual with it, got none: without one the sum is x");
    if (view.data == out.data && in.rows * in.dim > 0)
      throw py::value_error("sum_out: expected an array of its own, got that of the output");
    args.sum = view.data, args.sum_stride = view.stride;
  }
  args.rows = in.rows, args.heads = in.heads, args.dim = in.dim;
  args.y_stride = out.stride, args.x_stride = in.stride;
  args.eps = float(eps);
  args.kind = NormKind(kind);
  context.submit(&cpu::KernelTable::norm, args, {y, x, weight, bias, residual, sum});
}

void norm_backward(Context& context, const py::object& dx, const py::object& dweight, const py::object& dbias,
                   const py::object& dy, const py::object& x, const py::object& weight, const py::object& residual,
                   double eps, int kind) {
  check_norm(eps, kind);
  const auto in = heads_of<const float>(x, "x", -1, -1, -1);
  const auto gradient = heads_of<const float>(dy, "dy", in.rows, in.heads, in.dim);
  const auto out = heads_of<float>(dx, "out", in.rows, in.heads, in.dim);
  NormBackwardArgs args{};
  args.dx = out.data, args.dy = gradient.data, args.x = in.data;
  const auto rows = [](const auto& a) { return Rows<const float>{a.data, a.rows, a.heads * a.dim, a.stride}; };
  const auto check = [&](const auto& read, const char* name) {
    if (overlap(rows(out), rows(read)) && !same(rows(out), rows(read)))
      throw py::value_error("out: expected memory of its own, or dy or residual itself, got an array that overlaps " +
                            std::string(name) + " in part");
  };
  if (overlap(rows(out), rows(in)))
    throw py::value_error("out: expected memory of its own, or dy or residual itself, got an array that overlaps x");
  check(gradient, "dy");
  args.dweight = vector_of<float>(dweight, "dweight", in.dim, true);
  args.dbias = vector_of<float>(dbias, "dbias", in.dim, true);
  args.weight = vector_of<const float>(weight, "weight", in.dim, true);
  if (!residual.is_none()) {
    const auto view = heads_of<const float>(residual, "residual", in.rows, in.heads, in.dim);
    check(view, "residual");
    args.residual = view.data, args.residual_stride = view.stride;
  }
  args.rows = in.rows, args.heads = in.heads, args.dim = in.dim;
  args.dx_stride = out.stride, args.dy_stride = gradient.stride, args.x_stride = in.stride;
  args.eps = float(eps);
  args.kind = NormKind(kind);
  context.submit(&cpu::KernelTable::norm_backward, args, {dx, dweight, dbias, dy, x, weight, residual});
}

void activation(Context& context, const py::object& y, const py::object& x, const py::object& up, int kind) {
  const auto in = rows_of<const float>(x, "x", -1, -1);
  const auto out = rows_of<float>(y, "out", in.rows, in.cols);
  ActivationArgs args{out.data, in.data, nullptr, in.rows, in.cols, in.stride, 0, out.stride, activation_of(kind)};
  if (!up.is_none()) {
    const auto view = rows_of<const float>(up, "up", in.rows, in.cols);
    args.up = view.data, args.up_stride = view.stride;
  }
  context.submit(&cpu::KernelTable::activation, args, {y, x, up});
}

void axpby(Context& context, const py::object& out, const py::object& x, float a, const py::object& y, float b) {
  const auto in = rows_of<const float>(x, "x", -1, -1);
  const auto result = rows_of<float>(out, "out", in.rows, in.cols);
  const auto check = [&](const auto& view, const char* name) {
    if (overlap(result, view) && !same(result, view))
      throw py::value_error(std::string("out: expected ") + name +
                            " itself or memory of its own, got an array that overlaps " + name + " in part");
  };
  check(in, "x");
  for (const auto& [value, name] : {std::pair{a, "a"}, std::pair{b, "b"}})
    if (!std::isfinite(value))
      throw py::value_error(std::string(name) + ": expected a finite number, got " + std::to_string(value));
  AxpbyArgs args{};
  if (!y.is_none()) {
    const auto view = rows_of<const float>(y, "y", in.rows, in.cols);
    check(view, "y");
    args.y = view.data, args.y_stride = view.stride;
  }
  args.out = result.data, args.out_stride = result.stride;
  args.x = in.data, args.x_stride = in.stride;
  args.rows = in.rows, args.dim = in.cols;
  args.a = a, args.b = b;
  context.submit(&cpu::KernelTable::axpby, args, {out, x, y});
}

void check_limit(float limit) {
  if (!(limit > 0 && std::isfinite(limit)))
    throw py::value_error("limit: expected a finite number above 0, got " + std::to_string(limit));
}

void clamp(Context& context, const py::object& x, float limit) {
  const auto in = rows_of<float>(x, "x", -1, -1);
  check_limit(limit);
  ClampArgs args{in.data, in.rows, in.cols, in.stride, limit};
  context.submit(&cpu::KernelTable::clamp, args, {x});
}

void clamp_backward(Context& context, const py::object& dx, const py::object& x, float limit) {
  const auto in = rows_of<const float>(x, "x", -1, -1);
  const auto out = rows_of<float>(dx, "dx", in.rows, in.cols);
  if (overlap(out, in)) throw py::value_error("dx: expected memory of its own, got an array that overlaps x");
  check_limit(limit);
  ClampBackwardArgs args{out.data, in.data, in.rows, in.cols, out.stride, in.stride, limit};
  context.submit(&cpu::KernelTable::clamp_backward, args, {dx, x});
}

// The table of embedding: a packed matrix, or an array whose rows are contiguous but may lie at any address.
void set_table(EmbeddingArgs& args, const py::object& table) {
  if (py::isinstance<PackedMatrix>(table)) {
    const PackedView view = py::cast<const PackedMatrix&>(table).view;
    if (view.parts != 1) throw py::value_error("table: expected a matrix of one part, got a gated one");
    if (view.k != args.dim)
      throw py::value_error("table: expected width " + std::to_string(args.dim) + " like the output, got " +
                            std::to_string(view.k));
    args.packed = view;
    args.vocab = view.n;
    return;
  }
  if (!py::isinstance<py::array>(table))
    throw py::type_error("table: expected a PackedMatrix or a numpy array, got " +
                         std::string(py::str(py::type::of(table))));
  const auto a = py::reinterpret_borrow<py::array>(table);
  args.table_dtype = dtype_of(a, "table");
  if (a.ndim() != 2 || a.shape(1) != args.dim)
    throw py::value_error("table: expected [any, " + std::to_string(args.dim) + "], got " + shape_text(a));
  const int64_t size = dtype_bytes(args.table_dtype);
  if (a.size() > 0 && ((a.shape(1) > 1 && a.strides(1) != size) || a.strides(0) % size))
    throw py::value_error(
        "table: expected rows that are contiguous, got strides that are not: pass numpy.ascontiguousarray of it");
  args.table = a.data();
  args.table_stride = a.strides(0) / size;
  args.vocab = a.shape(0);
}

void check_values(const EmbeddingArgs& a) {
  check_ids(a.tokens, a.rows, a.vocab, "tokens", "a row of table");
  if (a.positions) check_ids(a.positions, a.rows, a.position_rows, "positions", "a row of position_table");
  if (a.types) check_ids(a.types, a.rows, a.type_rows, "types", "a row of type_table");
}

void check_values(const EmbeddingBackwardArgs& a) {
  check_ids(a.tokens, a.rows, a.vocab, "tokens", "a row of dtable");
  if (a.positions) check_ids(a.positions, a.rows, a.position_rows, "positions", "a row of dposition_table");
  if (a.types) check_ids(a.types, a.rows, a.type_rows, "types", "a row of d_type_table");
}

void check_values(const GatherBackwardArgs& a) { check_ids(a.index, a.rows, a.x_rows, "index", "a row of dx"); }

void check_values(const GatherColumnsArgs& a) { check_ids(a.index, a.columns, a.x_columns, "index", "a column of x"); }

void check_values(const GatherColumnsBackwardArgs& a) {
  check_ids(a.index, a.columns, a.x_columns, "index", "a column of dx");
}

void check_values(const GatherArgs& a) { check_ids(a.index, a.rows, a.x_rows, "index", "a row of x"); }

void embedding(Context& context, const py::object& y, const py::object& tokens, const py::object& table,
               const py::object& positions, const py::object& position_table, const py::object& types,
               const py::object& type_table) {
  const auto out = rows_of<float>(y, "out", -1, -1);
  EmbeddingArgs args{};
  args.y = out.data, args.y_stride = out.stride, args.rows = out.rows, args.dim = out.cols;
  args.tokens = vector_of<const int32_t>(tokens, "tokens", out.rows);
  set_table(args, table);
  if (!position_table.is_none()) {
    const auto view = rows_of<const float>(position_table, "position_table", -1, out.cols);
    args.positions = vector_of<const int32_t>(positions, "positions", out.rows);
    args.position_table = view.data, args.position_stride = view.stride, args.position_rows = view.rows;
  }
  if (!type_table.is_none()) {
    const auto view = rows_of<const float>(type_table, "type_table", -1, out.cols);
    args.types = vector_of<const int32_t>(types, "types", out.rows);
    args.type_table = view.data, args.type_stride = view.stride, args.type_rows = view.rows;
  }
  context.submit(&cpu::KernelTable::embedding, args, {y, tokens, table, positions, position_table, types, type_table},
                 &check_values);
}

void embedding_backward(Context& context, const py::object& dtable, const py::object& dposition_table,
                        const py::object& d_type_table, const py::object& dy, const py::object& tokens,
                        const py::object& positions, const py::object& types) {
  const auto in = rows_of<const float>(dy, "dy", -1, -1);
  EmbeddingBackwardArgs args{};
  args.dy = in.data, args.dy_stride = in.stride, args.rows = in.rows, args.dim = in.cols;
  args.tokens = vector_of<const int32_t>(tokens, "tokens", in.rows);
  if (py::isinstance<PackedMatrix>(dtable)) {
    const PackedView view = py::cast<const PackedMatrix&>(dtable).view;
    if (view.parts != 1 || view.dtype != DType::f32 || view.k != in.cols)
      throw py::value_error("dtable: expected a float32 matrix of one part and width " + std::to_string(in.cols) +
                            ", got one of another kind");
    args.packed = view;
    args.vocab = view.n;
  } else {
    const auto view = rows_of<float>(dtable, "dtable", -1, in.cols);
    args.dtable = view.data, args.table_stride = view.stride, args.vocab = view.rows;
  }
  if (!dposition_table.is_none()) {
    const auto view = rows_of<float>(dposition_table, "dposition_table", -1, in.cols);
    args.positions = vector_of<const int32_t>(positions, "positions", in.rows);
    args.dposition_table = view.data, args.position_stride = view.stride, args.position_rows = view.rows;
  }
  if (!d_type_table.is_none()) {
    const auto view = rows_of<float>(d_type_table, "d_type_table", -1, in.cols);
    args.types = vector_of<const int32_t>(types, "types", in.rows);
    args.d_type_table = view.data, args.type_stride = view.stride, args.type_rows = view.rows;
  }
  context.submit(&cpu::KernelTable::embedding_backward, args,
                 {dtable, dposition_table, d_type_table, dy, tokens, positions, types}, &check_values);
}

void gather(Context& context, const py::object& y, const py::object& x, const py::object& index) {
  const auto in = rows_of<const float>(x, "x", -1, -1);
  const auto out = rows_of<float>(y, "y", -1, in.cols);
  const int32_t* rows = vector_of<const int32_t>(index, "index", out.rows);
  GatherArgs args{out.data, in.data, rows, out.rows, in.cols, in.stride, out.stride, in.rows};
  context.submit(&cpu::KernelTable::gather, args, {y, x, index}, &check_values);
}

void gather_backward(Context& context, const py::object& dx, const py::object& dy, const py::object& index) {
  const auto in = rows_of<const float>(dy, "dy", -1, -1);
  const auto out = rows_of<float>(dx, "dx", -1, in.cols);
  if (overlap(out, in)) throw py::value_error("dx: expected memory of its own, got an array that overlaps dy");
  const int32_t* rows = vector_of<const int32_t>(index, "index", in.rows);
  GatherBackwardArgs args{out.data, in.data, rows, in.rows, in.cols, out.stride, in.stride, out.rows};
  context.submit(&cpu::KernelTable::gather_backward, args, {dx, dy, index}, &check_values);
}

template <class Args>
void check_starts(const Args& a) {
  const auto expect = [](int64_t i, const std::string& expected, int32_t got) {
    throw py::value_error("starts[" + std::to_string(i) + "]: expected " + expected + ", got " + std::to_string(got));
  };
  if (a.starts[0] != 0) expect(0, "0", a.starts[0]);
  for (int64_t b = 0; b < a.sequences; ++b)
    if (a.starts[b + 1] < a.starts[b])
      expect(b + 1, "at least " + std::to_string(a.starts[b]) + ", the one before", a.starts[b + 1]);
  if (a.starts[a.sequences] != a.x_rows)
    expect(a.sequences, std::to_string(a.x_rows) + ", the rows of x", a.starts[a.sequences]);
}

Pooling pooling_of(int kind) {
  if (kind < int(Pooling::last) || kind > int(Pooling::max))
    throw py::value_error("pooling: expected 0 (last), 1 (first), 2 (mean) or 3 (max), got " + std::to_string(kind));
  return Pooling(kind);
}

void pool(Context& context, const py::object& y, const py::object& x, const py::object& starts, int pooling) {
  const auto in = rows_of<const float>(x, "x", -1, -1);
  const auto out = rows_of<float>(y, "out", -1, in.cols);
  if (overlap(out, in)) throw py::value_error("out: expected memory of its own, got an array that overlaps x");
  PoolArgs args{out.data,  in.data, vector_of<const int32_t>(starts, "starts", out.rows + 1),
                out.rows,  in.cols, out.stride,
                in.stride, in.rows, pooling_of(pooling)};
  context.submit(&cpu::KernelTable::pool, args, {y, x, starts}, &check_starts<PoolArgs>);
}

void pool_backward(Context& context, const py::object& dx, const py::object& dy, const py::object& x,
                   const py::object& starts, int pooling) {
  const auto in = rows_of<const float>(dy, "dy", -1, -1);
  const auto out = rows_of<float>(dx, "dx", -1, in.cols);
  if (overlap(out, in)) throw py::value_error("dx: expected memory of its own, got an array that overlaps dy");
  PoolBackwardArgs args{};
  args.pooling = pooling_of(pooling);
  args.dx = out.data, args.dx_stride = out.stride, args.x_rows = out.rows;
  args.dy = in.data, args.dy_stride = in.stride, args.sequences = in.rows, args.dim = in.cols;
  args.starts = vector_of<const int32_t>(starts, "starts", in.rows + 1);
  if (args.pooling == Pooling::max) {
    const auto view = rows_of<const float>(x, "x", out.rows, in.cols);
    if (overlap(out, view)) throw py::value_error("dx: expected memory of its own, got an array that overlaps x");
    args.x = view.data, args.x_stride = view.stride;
  }
  context.submit(&cpu::KernelTable::pool_backward, args, {dx, dy, x, starts}, &check_starts<PoolBackwardArgs>);
}

void gather_columns(Context& context, const py::object& y, const py::object& x, const py::object& index) {
  const auto in = rows_of<const float>(x, "x", -1, -1);
  const auto out = rows_of<float>(y, "y", in.rows, -1);
  const int32_t* columns = vector_of<const int32_t>(index, "index", out.cols);
  GatherColumnsArgs args{out.data, in.data, columns, in.rows, out.cols, in.cols, out.stride, in.stride};
  context.submit(&cpu::KernelTable::gather_columns, args, {y, x, index}, &check_values);
}

void gather_columns_backward(Context& context, const py::object& dx, const py::object& dy, const py::object& index) {
  const auto in = rows_of<const float>(dy, "dy", -1, -1);
  const auto out = rows_of<float>(dx, "dx", in.rows, -1);
  const int32_t* columns = vector_of<const int32_t>(index, "index", in.cols);
  GatherColumnsBackwardArgs args{out.data, in.data, columns, in.rows, in.cols, out.cols, out.stride, in.stride};
  context.submit(&cpu::KernelTable::gather_columns_backward, args, {dx, dy, index}, &check_values);
}

}  // namespace

void bind_layers(py::module_&, ContextClass& context) {
  context.def("norm", &norm, py::arg("y"), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("residual"),
              py::arg("sum"), py::arg("eps"), py::arg("kind"));
  context.def("norm_backward", &norm_backward, py::arg("dx"), py::arg("dweight"), py::arg("dbias"), py::arg("dy"),
              py::arg("x"), py::arg("weight"), py::arg("residual"), py::arg("eps"), py::arg("kind"));
  context.def("activation", &activation, py::arg("y"), py::arg("x"), py::arg("up"), py::arg("activation"));
  context.def("axpby", &axpby, py::arg("out"), py::arg("x"), py::arg("a"), py::arg("y"), py::arg("b"));
  context.def("clamp", &clamp, py::arg("x"), py::arg("limit"));
  context.def("clamp_backward", &clamp_backward, py::arg("dx"), py::arg("x"), py::arg("limit"));
  context.def("embedding", &embedding, py::arg("y"), py::arg("tokens"), py::arg("table"), py::arg("positions"),
              py::arg("position_table"), py::arg("types"), py::arg("type_table"));
  context.def("embedding_backward", &embedding_backward, py::arg("dtable"), py::arg("dposition_table"),
              py::arg("d_type_table"), py::arg("dy"), py::arg("tokens"), py::arg("positions"), py::arg("types"));
  context.def("gather", &gather, py::arg("y"), py::arg("x"), py::arg("index"));
  context.def("gather_backward", &gather_backward, py::arg("dx"), py::arg("dy"), py::arg("index"));
  context.def("pool", &pool, py::arg("y"), py::arg("x"), py::arg("starts"), py::arg("pooling"));
  context.def("pool_backward", &pool_backward, py::arg("dx"), py::arg("dy"), py::arg("x"), py::arg("starts"),
              py::arg("pooling"));
  context.def("gather_columns", &gather_columns, py::arg("y"), py::arg("x"), py::arg("index"));
  context.def("gather_columns_backward", &gather_columns_backward, py::arg("dx"), py::arg("dy"), py::arg("index"));
}

}  // namespace pyllm::bindings
