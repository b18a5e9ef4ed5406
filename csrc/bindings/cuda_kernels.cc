// The launchers of csrc/cuda/matmul.h and attention.h: every argument is checked here, and every launch's error raised.
#include "bindings/cuda_launch.h"
#include "cuda/attention.h"
#include "cuda/matmul.h"

namespace pyllm::bindings {
namespace {

cuda::MatmulArgs matmul_args(const py::object& y, const py::object& x, const py::object& w, const py::object& bias,
                             const py::object& residual, int activation, bool gated) {
  cuda::MatmulArgs a{};
  const auto& weights = device_array(w, "w", kFloats, {-1, -1});
  a.n = weights.dim(0);
  a.k = weights.dim(1);
  if (gated && a.n % 2)
    throw py::value_error("w: expected an even number of rows of gate and up in turn, got " + std::to_string(a.n));
  const int64_t columns = gated ? a.n / 2 : a.n;
  const auto& input = device_array(x, "x", kFloats, {-1, a.k}, false);
  a.rows = input.dim(0);
  const auto& output = device_array(y, "y", kFloats, {a.rows, columns}, false);
  a.y = output.data;
  a.x = input.data;
  a.w = weights.data;
  a.bias = static_cast<const float*>(device_data(bias, "bias", "float32", {a.n}));
  if (!residual.is_none()) {
    const auto& r = device_array(residual, "residual", "float32", {a.rows, columns}, false);
    a.residual = static_cast<const float*>(r.data);
    a.residual_stride = r.row_stride();
  }
  a.x_stride = input.row_stride();
  a.y_stride = output.row_stride();
  check_range(activation, 0, int(Activation::relu), "activation");
  a.activation = Activation(activation);
  a.gated = gated;
  a.x_dtype = float_dtype(input, "x");
  a.w_dtype = float_dtype(weights, "w");
  a.y_dtype = float_dtype(output, "y");
  return a;
}

// What the tensor cores' kernels ask of w and x.
void check_pieces(const cuda::MatmulArgs& a, const py::object& x, const py::object& w) {
  check_aligned(w.cast<const DeviceArray&>(), "w");
  if (a.w_dtype != DType::bf16) throw py::type_error("w: expected bfloat16, got float32");
  if (a.k % 8) throw py::value_error("w: expected a number of columns that 8 divides, got " + std::to_string(a.k));
  check_aligned(x.cast<const DeviceArray&>(), "x");
}

void skinny_matmul(const py::object& y, const py::object& x, const py::object& w, const py::object& bias,
                   const py::object& residual, int activation, bool gated, const py::object& norm_weight,
                   const py::object& norm_bias, int norm, float eps, int64_t multiprocessors, bool overlapped,
                   uintptr_t stream) {
  cuda::MatmulArgs a = matmul_args(y, x, w, bias, residual, activation, gated);
  check_pieces(a, x, w);
  a.norm_weight = static_cast<const float*>(device_data(norm_weight, "norm_weight", "float32", {a.k}));
  a.norm_bias = static_cast<const float*>(device_data(norm_bias, "norm_bias", "float32", {a.k}));
  if (a.norm_bias && !a.norm_weight) throw py::value_error("norm_bias: expected None where norm_weight is None");
  check_range(norm, 0, int(NormKind::rms), "norm");
  check_range(multiprocessors, 1, 1 << 16, "multiprocessors");
  a.norm = NormKind(norm);
  a.eps = eps;
  const cuda::SkinnyPlan plan = cuda::skinny_plan(a.rows, a.n, a.k, multiprocessors);
  if (a.rows > 0 && a.n > 0 && (!plan.fits || a.k == 0))
    throw py::value_error("x: expected at most 16 rows, of which a block's shared memory holds all, got " +
                          std::to_string(a.rows) + " of " + std::to_string(a.k));
  py::gil_scoped_release release;
  raise(cuda::skinny_matmul(a, multiprocessors, overlapped, stream_of(stream)), "skinny_matmul");
}

void mma_matmul(const py::object& y, const py::object& x, const py::object& w, const py::object& bias,
                const py::object& residual, int activation, bool gated, uintptr_t stream) {
  const cuda::MatmulArgs a = matmul_args(y, x, w, bias, residual, activation, gated);
  check_pieces(a, x, w);
  if (a.x_dtype != DType::bf16) throw py::type_error("x: expected bfloat16, got float32");
  if (a.rows > 1 && a.x_stride % 8)
    throw py::value_error("x: expected rows that lie a multiple of 8 elements apart, got " +
                          std::to_string(a.x_stride));
  py::gil_scoped_release release;
  raise(cuda::mma_matmul(a, stream_of(stream)), "mma_matmul");
}

void plain_matmul(const py::object& y, const py::object& x, const py::object& w, const py::object& bias,
                  const py::object& residual, int activation, bool gated, uintptr_t stream) {
  const cuda::MatmulArgs a = matmul_args(y, x, w, bias, residual, activation, gated);
  if (a.x_dtype != a.w_dtype) throw py::type_error("x: expected the dtype of w, got another");
  check_range(a.rows, 0, kMaxGrid * 16, "x: rows");
  py::gil_scoped_release release;
  raise(cuda::plain_matmul(a, stream_of(stream)), "plain_matmul");
}

cuda::AttentionArgs attention_args(const py::object& out, const py::object& q, const py::object& cache,
                                   const py::object& starts, const py::object& lengths, const py::object& tables,
                                   int64_t head_size, float scale, int64_t window, int64_t most_queries,
                                   const char* dtype) {
  check_range(head_size, 1, kMaxHead, "head_size");
  check_range(window, 0, int64_t(1) << 40, "window");
  cuda::AttentionArgs a{};
  const auto& blocks = device_array(cache, "cache", dtype, {-1, -1, 2, kBlockTokens, round_up(head_size, kHeadPad)});
  a.cache = {blocks.data, blocks.dim(0), blocks.dim(1), head_size, float_dtype(blocks, "cache")};
  const auto& queries = device_array(q, "q", dtype, {-1, -1, head_size}, false);
  const int64_t rows = queries.dim(0);
  a.heads = queries.dim(1);
  if (a.cache.kv_heads == 0 || a.heads % a.cache.kv_heads)
    throw py::value_error("q: expected a multiple of the cache's " + std::to_string(a.cache.kv_heads) + " heads, got " +
                          std::to_string(a.heads));
  const auto& output = device_array(out, "out", dtype, {rows, a.heads, head_size}, false);
  for (const auto* array : {&queries, &output})
    if (array->dim(1) > 1 && array->row_stride() != head_size)
      throw py::value_error("q, out: expected heads side by side");
  a.out = output.data;
  a.q = queries.data;
  const auto& table = device_array(tables, "tables", "int32", {-1, -1});
  a.sequences = table.dim(0);
  a.table_width = table.dim(1);
  a.tables = static_cast<const int32_t*>(table.data);
  a.starts = static_cast<const int32_t*>(device_array(starts, "starts", "int32", {a.sequences + 1}).data);
  a.lengths = static_cast<const int32_t*>(device_array(lengths, "lengths", "int32", {a.sequences}).data);
  a.q_stride = queries.strides[0];
  a.out_stride = output.strides[0];
  a.window = window;
  check_range(most_queries, 0, rows, "most_queries");
  check_range(a.sequences, 0, kMaxGrid, "tables: sequences");
  check_range(a.cache.kv_heads, 1, kMaxGrid, "cache: heads");
  a.most_queries = most_queries;
  a.scale = scale;
  return a;
}

void check_attention_pieces(const cuda::AttentionArgs& a, const py::object& q, const py::object& cache) {
  if (a.cache.head_size % 8 || a.q_stride % 8 || a.out_stride % 2)
    throw py::value_error("q: expected a head size and a distance of rows that 8 divides, got " +
                          std::to_string(a.cache.head_size) + " and " + std::to_string(a.q_stride));
  check_aligned(q.cast<const DeviceArray&>(), "q");
  check_aligned(cache.cast<const DeviceArray&>(), "cache");
}

void prompt_attention(const py::object& out, const py::object& q, const py::object& cache, const py::object& starts,
                      const py::object& lengths, const py::object& tables, int64_t head_size, float scale,
                      int64_t window, int64_t most_queries, uintptr_t stream) {
  const cuda::AttentionArgs a =
      attention_args(out, q, cache, starts, lengths, tables, head_size, scale, window, most_queries, "bfloat16");
  check_attention_pieces(a, q, cache);
  py::gil_scoped_release release;
  raise(cuda::prompt_attention(a, stream_of(stream)), "prompt_attention");
}

void split_attention(const py::object& out, const py::object& q, const py::object& cache, const py::object& starts,
                     const py::object& lengths, const py::object& tables, int64_t head_size, float scale,
                     int64_t window, int64_t most_queries, int64_t split_blocks, const py::object& partial,
                     const py::object& tickets, uintptr_t stream) {
  cuda::AttentionArgs a =
      attention_args(out, q, cache, starts, lengths, tables, head_size, scale, window, most_queries, "bfloat16");
  check_attention_pieces(a, q, cache);
  check_range(most_queries * (a.heads / a.cache.kv_heads), 0, cuda::kSplitRows, "most_queries times heads of a group");
  check_range(split_blocks, 1, int64_t(1) << 31, "split_blocks");
  const int64_t splits = (a.table_width + split_blocks - 1) / split_blocks;
  a.split_blocks = split_blocks;
  a.partial = static_cast<float*>(device_array(partial, "partial", "float32",
                                               {a.sequences, a.cache.kv_heads, splits, cuda::kSplitRows, head_size + 2})
                                      .data);
  a.tickets = static_cast<uint32_t*>(device_array(tickets, "tickets", "uint32", {a.sequences, a.cache.kv_heads}).data);
  py::gil_scoped_release release;
  raise(cuda::split_attention(a, stream_of(stream)), "split_attention");
}

void plain_attention(const py::object& out, const py::object& q, const py::object& cache, const py::object& starts,
                     const py::object& lengths, const py::object& tables, int64_t head_size, float scale,
                     int64_t window, int64_t most_queries, uintptr_t stream) {
  const cuda::AttentionArgs a =
      attention_args(out, q, cache, starts, lengths, tables, head_size, scale, window, most_queries, "float32");
  py::gil_scoped_release release;
  raise(cuda::plain_attention(a, stream_of(stream)), "plain_attention");
}

}  // namespace

void bind_cuda_kernels(py::module_& module) {
  using py::arg;
  module.def(
      "skinny_fits",
      [](int64_t rows, int64_t k) { return k % 8 == 0 && k > 0 && cuda::skinny_plan(rows, 1, k, 1).fits; },
      "Whether skinny_matmul takes so many rows of this inner dimension.", arg("rows"), arg("k"));
  module.def("skinny_matmul", &skinny_matmul, arg("y"), arg("x"), arg("w"), arg("bias"), arg("residual"),
             arg("activation"), arg("gated"), arg("norm_weight"), arg("norm_bias"), arg("norm"), arg("eps"),
             arg("multiprocessors"), arg("overlapped"), arg("stream"));
  module.def("mma_matmul", &mma_matmul, arg("y"), arg("x"), arg("w"), arg("bias"), arg("residual"), arg("activation"),
             arg("gated"), arg("stream"));
  module.def("plain_matmul", &plain_matmul, arg("y"), arg("x"), arg("w"), arg("bias"), arg("residual"),
             arg("activation"), arg("gated"), arg("stream"));
  module.def("prompt_attention", &prompt_attention, arg("out"), arg("q"), arg("cache"), arg("starts"), arg("lengths"),
             arg("tables"), arg("head_size"), arg("scale"), arg("window"), arg("most_queries"), arg("stream"));
  module.def("split_attention", &split_attention, arg("out"), arg("q"), arg("cache"), arg("starts"), arg("lengths"),
             arg("tables"), arg("head_size"), arg("scale"), arg("window"), arg("most_queries"), arg("split_blocks"),
             arg("partial"), arg("tickets"), arg("stream"));
  module.def("plain_attention", &plain_attention, arg("out"), arg("q"), arg("cache"), arg("starts"), arg("lengths"),
             arg("tables"), arg("head_size"), arg("scale"), arg("window"), arg("most_queries"), arg("stream"));
}

}  // namespace pyllm::bindings
