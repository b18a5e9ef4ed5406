// The launchers of csrc/cuda/matmul.h: every argument is checked here, and every launch's error raised.
#include <string>

#include "bindings/cuda_launch.h"
#include "cuda/launch.h"
#include "cuda/matmul.h"
#include "cuda/tensor_map.h"

namespace pyllm::bindings {
namespace {

// What a product is made of: x [T, K], w [N, K] and a bias [N].
cuda::MatmulArgs input_args(const py::object& x, const py::object& w, const py::object& bias) {
  cuda::MatmulArgs a{};
  const auto& weights = device_array(w, "w", kFloats, {-1, -1});
  a.n = weights.dim(0);
  a.k = weights.dim(1);
  const auto& input = device_array(x, "x", kFloats, {-1, a.k}, false);
  a.rows = input.dim(0);
  a.x = input.data;
  a.w = weights.data;
  a.bias = static_cast<const float*>(device_data(bias, "bias", "float32", {a.n}));
  a.x_stride = input.row_stride();
  a.x_dtype = float_dtype(input, "x");
  a.w_dtype = float_dtype(weights, "w");
  return a;
}

cuda::MatmulArgs matmul_args(const py::object& y, const py::object& x, const py::object& w, const py::object& bias,
                             const py::object& residual, int activation, bool gated) {
  cuda::MatmulArgs a = input_args(x, w, bias);
  if (gated && a.n % 2)
    throw py::value_error("w: expected an even number of rows of gate and up in turn, got " + std::to_string(a.n));
  const int64_t columns = gated ? a.n / 2 : a.n;
  const auto& output = device_array(y, "y", kFloats, {a.rows, columns}, false);
  a.y = output.data;
  if (!residual.is_none()) {
    const auto& r = device_array(residual, "residual", "float32", {a.rows, columns}, false);
    a.residual = static_cast<const float*>(r.data);
    a.residual_stride = r.row_stride();
  }
  a.y_stride = output.row_stride();
  check_range(activation, 0, kActivations - 1, "activation");
  a.activation = Activation(activation);
  a.gated = gated;
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

void check_rows_of_pieces(const cuda::MatmulArgs& a) {
  if (a.rows > 1 && a.x_stride % 8)
    throw py::value_error("x: expected rows that lie a multiple of 8 elements apart, got " +
                          std::to_string(a.x_stride));
}

// What the kernels of decoding take besides: a norm of x, and few rows.
void add_norm(cuda::MatmulArgs& a, const py::object& norm_weight, const py::object& norm_bias, int norm, float eps,
              int64_t multiprocessors) {
  a.norm_weight = static_cast<const float*>(device_data(norm_weight, "norm_weight", "float32", {a.k}));
  a.norm_bias = static_cast<const float*>(device_data(norm_bias, "norm_bias", "float32", {a.k}));
  if (a.norm_bias && !a.norm_weight) throw py::value_error("norm_bias: expected None where norm_weight is None");
  check_range(a.rows, 0, cuda::kSkinnyRows, "x: rows");
  check_range(a.k, 1, int64_t(1) << 30, "w: columns");
  check_range(norm, 0, int(NormKind::rms), "norm");
  check_range(multiprocessors, 1, 1 << 16, "multiprocessors");
  a.norm = NormKind(norm);
  a.eps = eps;
}

cuda::SkinnyPlan plan_of(int64_t rows, int64_t n, int64_t k, bool whole, int64_t multiprocessors) {
  int64_t limit = 0;
  raise(cuda::shared_limit(&limit), "skinny_matmul");
  return cuda::skinny_plan(rows, n, k, whole, multiprocessors, limit);
}

// Whether the current GPU has room for x: the last check before a launch.
void check_fits(const cuda::MatmulArgs& a, int64_t multiprocessors) {
  if (a.rows == 0 || a.n == 0) return;
  const bool whole = a.x_dtype != DType::bf16 || a.norm_weight;
  const cuda::SkinnyPlan plan = plan_of(a.rows, a.n, a.k, whole, multiprocessors);
  if (!plan.fits)
    throw py::value_error("x: expected what a block's shared memory has room for, got " + std::to_string(a.rows) +
                          " rows of " + std::to_string(a.k) + (whole ? ", float32 or with a norm" : ""));
  if (plan.streamed) check_rows_of_pieces(a);
}

void skinny_matmul(const py::object& y, const py::object& x, const py::object& w, const py::object& bias,
                   const py::object& residual, int activation, bool gated, const py::object& norm_weight,
                   const py::object& norm_bias, int norm, float eps, int64_t multiprocessors, uintptr_t stream) {
  cuda::MatmulArgs a = matmul_args(y, x, w, bias, residual, activation, gated);
  check_pieces(a, x, w);
  add_norm(a, norm_weight, norm_bias, norm, eps, multiprocessors);
  check_fits(a, multiprocessors);
  py::gil_scoped_release release;
  raise(cuda::skinny_matmul(a, multiprocessors, stream_of(stream)), "skinny_matmul");
}

void skinny_qkv(const py::object& q, const py::object& cache, const py::object& x, const py::object& w,
                const py::object& bias, const py::object& cos, const py::object& sin, const py::object& slots,
                int64_t head_size, const py::object& norm_weight, const py::object& norm_bias, int norm, float eps,
                int64_t multiprocessors, uintptr_t stream) {
  check_range(head_size, 1, kMaxHead, "head_size");
  if (head_size % 2) throw py::value_error("head_size: expected an even number, got " + std::to_string(head_size));
  cuda::QkvArgs a{};
  a.matmul = input_args(x, w, bias);
  check_pieces(a.matmul, x, w);
  add_norm(a.matmul, norm_weight, norm_bias, norm, eps, multiprocessors);
  const auto& blocks = device_array(cache, "cache", kFloats, {-1, -1, 2, kBlockTokens, round_up(head_size, kHeadPad)});
  a.cache = {blocks.data, blocks.dim(0), blocks.dim(1), head_size, float_dtype(blocks, "cache")};
  const auto& queries = device_array(q, "q", kFloats, {a.matmul.rows, -1}, false);
  a.heads = queries.dim(1) / head_size;
  if (queries.dim(1) % head_size || a.matmul.n != (a.heads + 2 * a.cache.kv_heads) * head_size)
    throw py::value_error("w: expected rows for the heads of q and twice those of the cache, of " +
                          std::to_string(head_size) + ", got " + std::to_string(a.matmul.n) + " for " +
                          std::to_string(queries.dim(1)) + " columns of q and " + std::to_string(a.cache.kv_heads) +
                          " heads of the cache");
  a.matmul.y = queries.data;
  a.matmul.y_stride = queries.row_stride();
  a.matmul.y_dtype = float_dtype(queries, "q");
  a.slots = static_cast<const int64_t*>(device_array(slots, "slots", "int64", {a.matmul.rows}).data);
  if (cos.is_none() != sin.is_none()) throw py::value_error("cos, sin: expected both or neither");
  if (!cos.is_none()) {
    const auto& angles = device_array(cos, "cos", "float32", {a.matmul.rows, -1});
    a.half = angles.dim(1);
    check_range(2 * a.half, 0, head_size, "cos: twice its columns");
    a.cos = static_cast<const float*>(angles.data);
    a.sin = static_cast<const float*>(device_array(sin, "sin", "float32", {a.matmul.rows, a.half}).data);
  }
  check_fits(a.matmul, multiprocessors);
  py::gil_scoped_release release;
  raise(cuda::skinny_qkv(a, multiprocessors, stream_of(stream)), "skinny_qkv");
}

void skinny_argmax(const py::object& tokens, const py::object& x, const py::object& w, const py::object& bias,
                   const py::object& norm_weight, const py::object& norm_bias, int norm, float eps,
                   const py::object& partial, const py::object& ticket, int64_t multiprocessors, uintptr_t stream) {
  cuda::ArgmaxArgs a{};
  a.matmul = input_args(x, w, bias);
  check_pieces(a.matmul, x, w);
  add_norm(a.matmul, norm_weight, norm_bias, norm, eps, multiprocessors);
  check_range(a.matmul.n, 1, int64_t(1) << 31, "w: rows");
  a.tokens = static_cast<int32_t*>(device_array(tokens, "tokens", "int32", {a.matmul.rows}).data);
  a.partial = static_cast<unsigned long long*>(
      device_array(partial, "partial", "int64", {multiprocessors, a.matmul.rows}).data);
  a.ticket = static_cast<uint32_t*>(device_array(ticket, "ticket", "uint32", {1}).data);
  check_fits(a.matmul, multiprocessors);
  py::gil_scoped_release release;
  raise(cuda::skinny_argmax(a, multiprocessors, stream_of(stream)), "skinny_argmax");
}

// What the kernels that take x as it is ask of it besides.
void check_rounded(const cuda::MatmulArgs& a) {
  if (a.x_dtype != DType::bf16) throw py::type_error("x: expected bfloat16, got float32");
  check_rows_of_pieces(a);
}

void split_matmul(const py::object& y, const py::object& x, const py::object& w, const py::object& bias,
                  const py::object& residual, int activation, bool gated, const py::object& partial,
                  const py::object& tickets, uintptr_t stream) {
  cuda::SplitMatmulArgs a{};
  a.matmul = matmul_args(y, x, w, bias, residual, activation, gated);
  check_pieces(a.matmul, x, w);
  check_rounded(a.matmul);
  check_range(a.matmul.rows, 0, cuda::kSplitMatmulRows, "x: rows");
  check_range(a.matmul.k, 1, int64_t(1) << 30, "w: columns");
  a.partial = static_cast<float*>(device_array(partial, "partial", "float32", {cuda::kSplitMatmulFloats}).data);
  a.tickets = static_cast<uint32_t*>(device_array(tickets, "tickets", "uint32", {cuda::kSplitMatmulBlocks}).data);
  py::gil_scoped_release release;
  raise(cuda::split_matmul(a, stream_of(stream)), "split_matmul");
}

void wgmma_matmul(const py::object& y, const py::object& x, const py::object& w, const py::object& bias,
                  const py::object& residual, int activation, bool gated, int64_t multiprocessors, uintptr_t stream) {
  const cuda::MatmulArgs a = matmul_args(y, x, w, bias, residual, activation, gated);
  check_pieces(a, x, w);
  check_rounded(a);
  check_range(a.k, 1, int64_t(1) << 30, "w: columns");
  check_range(a.rows, 0, kMaxRows, "x: rows");
  check_range(a.n, 0, kMaxRows, "w: rows");
  check_range(multiprocessors, 1, 1 << 16, "multiprocessors");
  py::gil_scoped_release release;
  raise(cuda::wgmma_matmul(a, multiprocessors, stream_of(stream)), "wgmma_matmul");
}

void mma_matmul(const py::object& y, const py::object& x, const py::object& w, const py::object& bias,
                const py::object& residual, int activation, bool gated, uintptr_t stream) {
  const cuda::MatmulArgs a = matmul_args(y, x, w, bias, residual, activation, gated);
  check_pieces(a, x, w);
  check_rounded(a);
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

}  // namespace

void bind_cuda_matmul(py::module_& module) {
  using py::arg;
  module.def(
      "skinny_fits", [](int64_t rows, int64_t k, bool whole) { return plan_of(rows, 1, k, whole, 1).fits; },
      "Whether skinny_matmul takes so many rows of this inner dimension on the current GPU; whole: float32 or with a "
      "norm.",
      arg("rows"), arg("k"), arg("whole"));
  module.def("skinny_matmul", &skinny_matmul, arg("y"), arg("x"), arg("w"), arg("bias"), arg("residual"),
             arg("activation"), arg("gated"), arg("norm_weight"), arg("norm_bias"), arg("norm"), arg("eps"),
             arg("multiprocessors"), arg("stream"));
  module.def("skinny_qkv", &skinny_qkv, arg("q"), arg("cache"), arg("x"), arg("w"), arg("bias"), arg("cos"), arg("sin"),
             arg("slots"), arg("head_size"), arg("norm_weight"), arg("norm_bias"), arg("norm"), arg("eps"),
             arg("multiprocessors"), arg("stream"));
  module.def("skinny_argmax", &skinny_argmax, arg("tokens"), arg("x"), arg("w"), arg("bias"), arg("norm_weight"),
             arg("norm_bias"), arg("norm"), arg("eps"), arg("partial"), arg("ticket"), arg("multiprocessors"),
             arg("stream"));
  module.def("split_matmul", &split_matmul, arg("y"), arg("x"), arg("w"), arg("bias"), arg("residual"),
             arg("activation"), arg("gated"), arg("partial"), arg("tickets"), arg("stream"));
  module.def(
      "has_wgmma",
      [] {
        bool yes = false;
        raise(cuda::has_wgmma(&yes), "has_wgmma");
        return yes;
      },
      "Whether wgmma_matmul runs on the current GPU: Hopper, and a build for sm_90a.");
  module.def(
      "wgmma_clusters",
      [](int64_t size) {
        if (size != 2 && size != 4 && size != 8)
          throw py::value_error("size: expected 2, 4 or 8 blocks, got " + std::to_string(size));
        int64_t most = 0;
        raise(cuda::wgmma_clusters(size, &most), "wgmma_clusters");
        return most;
      },
      arg("size"), "How many clusters of `size` blocks of wgmma_matmul the current GPU runs at once; Hopper alone.");
  module.def("wgmma_matmul", &wgmma_matmul, arg("y"), arg("x"), arg("w"), arg("bias"), arg("residual"),
             arg("activation"), arg("gated"), arg("multiprocessors"), arg("stream"));
  module.def("mma_matmul", &mma_matmul, arg("y"), arg("x"), arg("w"), arg("bias"), arg("residual"), arg("activation"),
             arg("gated"), arg("stream"));
  module.def("plain_matmul", &plain_matmul, arg("y"), arg("x"), arg("w"), arg("bias"), arg("residual"),
             arg("activation"), arg("gated"), arg("stream"));
}

}  // namespace pyllm::bindings
