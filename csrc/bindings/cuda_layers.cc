// The launchers of csrc/cuda/layers.h, qkv_write.h and sampling.h: every argument is checked here, and every launch's error raised.
#include "bindings/cuda_launch.h"
#include "cuda/advance.h"
#include "cuda/layers.h"
#include "cuda/qkv_write.h"
#include "cuda/sampling.h"

namespace pyllm::bindings {
namespace {

// The data of an array that may be None.
template <class T>
const T* optional(const py::object& object, const char* name, const char* dtype, const std::vector<int64_t>& shape) {
  return static_cast<const T*>(device_data(object, name, dtype, shape));
}

// x as rows of heads: [R, D], or [R, heads, D] with heads side by side.
struct Heads {
  void* data;
  int64_t rows, heads, dim, stride;
  DType dtype;
};
Heads heads_of(const py::object& object, const char* name, const char* dtypes) {
  const bool flat = py::isinstance<DeviceArray>(object) && object.cast<const DeviceArray&>().shape.size() == 2;
  const auto& a =
      device_array(object, name, dtypes, flat ? std::vector<int64_t>{-1, -1} : std::vector<int64_t>{-1, -1, -1}, false);
  if (!flat && a.dim(1) > 1 && a.strides[1] != a.dim(2))
    throw py::value_error(std::string(name) + ": expected heads side by side");
  return {a.data, a.dim(0), flat ? 1 : a.dim(1), flat ? a.dim(1) : a.dim(2), a.strides[0], float_dtype(a, name)};
}
Heads heads_like(const Heads& x, const py::object& object, const char* name, const char* dtypes) {
  const Heads a = heads_of(object, name, dtypes);
  if (a.rows != x.rows || a.heads != x.heads || a.dim != x.dim)
    throw py::value_error(std::string(name) + ": expected the shape of x, got another");
  return a;
}

void norm(const py::object& y, const py::object& x, const py::object& weight, const py::object& bias,
          const py::object& residual, const py::object& sum, float eps, int kind, uintptr_t stream) {
  const Heads in = heads_of(x, "x", "float32"), out = heads_like(in, y, "y", kFloats);
  cuda::NormArgs a{};
  a.y = out.data;
  a.y_stride = out.stride;
  a.y_dtype = out.dtype;
  a.x = static_cast<const float*>(in.data);
  a.x_stride = in.stride;
  if (!residual.is_none()) {
    const Heads r = heads_like(in, residual, "residual", "float32");
    a.residual = static_cast<const float*>(r.data);
    a.residual_stride = r.stride;
  }
  if (!sum.is_none()) {
    const Heads s = heads_like(in, sum, "sum", "float32");
    a.sum = static_cast<float*>(s.data);
    a.sum_stride = s.stride;
  }
  a.weight = optional<float>(weight, "weight", "float32", {in.dim});
  a.bias = optional<float>(bias, "bias", "float32", {in.dim});
  a.rows = in.rows;
  a.heads = in.heads;
  a.dim = in.dim;
  a.eps = eps;
  check_range(in.dim, 0, cuda::kMaxNormDim, "x: columns");
  check_range(in.rows * in.heads, 0, kMaxRows, "x: rows times heads");
  check_range(kind, 0, int(NormKind::rms), "kind");
  a.kind = NormKind(kind);
  py::gil_scoped_release release;
  raise(cuda::norm(a, stream_of(stream)), "norm");
}

void activation(const py::object& y, const py::object& x, const py::object& up, int activation, uintptr_t stream) {
  const auto& in = device_array(x, "x", kFloats, {-1, -1}, false);
  const auto& out = device_array(y, "y", kFloats, {in.dim(0), in.dim(1)}, false);
  cuda::ActivationArgs a{};
  a.y = out.data;
  a.x = in.data;
  a.rows = in.dim(0);
  a.dim = in.dim(1);
  a.x_stride = in.row_stride();
  a.y_stride = out.row_stride();
  a.x_dtype = float_dtype(in, "x");
  a.y_dtype = float_dtype(out, "y");
  if (!up.is_none()) {
    const auto& other = device_array(up, "up", in.dtype.c_str(), {in.dim(0), in.dim(1)}, false);
    a.up = other.data;
    a.up_stride = other.row_stride();
  }
  check_range(a.rows, 0, kMaxRows, "x: rows");
  check_range(a.dim, 0, cuda::kMaxRowWidth, "x: columns");
  check_range(activation, 0, kActivations - 1, "activation");
  a.activation = Activation(activation);
  py::gil_scoped_release release;
  raise(cuda::activation(a, stream_of(stream)), "activation");
}

void axpby(const py::object& out, const py::object& x, float factor, const py::object& y, float other_factor,
           uintptr_t stream) {
  const auto& in = device_array(x, "x", "float32", {-1, -1}, false);
  const std::vector<int64_t> shape{in.dim(0), in.dim(1)};
  const auto& result = device_array(out, "out", "float32", shape, false);
  AxpbyArgs a{};
  a.out = static_cast<float*>(result.data);
  a.x = static_cast<const float*>(in.data);
  if (!y.is_none()) {
    const auto& other = device_array(y, "y", "float32", shape, false);
    a.y = static_cast<const float*>(other.data);
    a.y_stride = other.row_stride();
  }
  a.rows = in.dim(0);
  a.dim = in.dim(1);
  a.out_stride = result.row_stride();
  a.x_stride = in.row_stride();
  a.a = factor;
  a.b = other_factor;
  check_range(a.rows, 0, kMaxRows, "x: rows");
  check_range(a.dim, 0, cuda::kMaxRowWidth, "x: columns");
  py::gil_scoped_release release;
  raise(cuda::axpby(a, stream_of(stream)), "axpby");
}

void gather_columns(const py::object& y, const py::object& x, const py::object& index, uintptr_t stream) {
  const auto& in = device_array(x, "x", "float32", {-1, -1}, false);
  const auto& columns = device_array(index, "index", "int32", {-1});
  const auto& out = device_array(y, "y", "float32", {in.dim(0), columns.dim(0)}, false);
  GatherColumnsArgs a{};
  a.y = static_cast<float*>(out.data);
  a.x = static_cast<const float*>(in.data);
  a.index = static_cast<const int32_t*>(columns.data);
  a.rows = in.dim(0);
  a.columns = columns.dim(0);
  a.x_columns = in.dim(1);
  a.y_stride = out.row_stride();
  a.x_stride = in.row_stride();
  check_range(a.rows, 0, kMaxRows, "x: rows");
  check_range(a.columns, 0, cuda::kMaxRowWidth, "index");
  py::gil_scoped_release release;
  raise(cuda::gather_columns(a, stream_of(stream)), "gather_columns");
}

void embedding(const py::object& y, const py::object& tokens, const py::object& table, const py::object& positions,
               const py::object& position_table, uintptr_t stream) {
  const auto& from = device_array(table, "table", kFloats, {-1, -1}, false);
  const auto& ids = device_array(tokens, "tokens", "int32", {-1});
  const auto& out = device_array(y, "y", "float32", {ids.dim(0), from.dim(1)}, false);
  cuda::EmbeddingArgs a{};
  a.y = static_cast<float*>(out.data);
  a.tokens = static_cast<const int32_t*>(ids.data);
  a.table = from.data;
  a.table_dtype = float_dtype(from, "table");
  a.table_stride = from.row_stride();
  a.vocab = from.dim(0);
  a.rows = ids.dim(0);
  a.dim = from.dim(1);
  a.y_stride = out.row_stride();
  if (positions.is_none() != position_table.is_none())
    throw py::value_error("positions, position_table: expected both or neither");
  if (!position_table.is_none()) {
    const auto& places = device_array(position_table, "position_table", "float32", {-1, a.dim}, false);
    a.positions = optional<int32_t>(positions, "positions", "int32", {a.rows});
    a.position_table = static_cast<const float*>(places.data);
    a.position_stride = places.row_stride();
    a.position_rows = places.dim(0);
  }
  check_range(a.rows, 0, kMaxRows, "tokens");
  check_range(a.dim, 0, cuda::kMaxRowWidth, "table: columns");
  py::gil_scoped_release release;
  raise(cuda::embedding(a, stream_of(stream)), "embedding");
}

void rope_angles(const py::object& cos, const py::object& sin, const py::object& positions, const py::object& inv_freq,
                 const py::object& table, float scaling, uintptr_t stream) {
  const auto& frequencies = device_array(inv_freq, "inv_freq", "float32", {-1, -1});
  const auto& places = device_array(positions, "positions", "int32", {-1});
  const std::vector<int64_t> shape{places.dim(0), frequencies.dim(1)};
  RopeAnglesArgs a{};
  a.cos = static_cast<float*>(device_array(cos, "cos", "float32", shape).data);
  a.sin = static_cast<float*>(device_array(sin, "sin", "float32", shape).data);
  a.positions = static_cast<const int32_t*>(places.data);
  a.inv_freq = static_cast<const float*>(frequencies.data);
  a.table = optional<int32_t>(table, "table", "int32", {places.dim(0)});
  a.rows = places.dim(0);
  a.half = frequencies.dim(1);
  a.classes = frequencies.dim(0);
  a.scaling = scaling;
  if (a.classes == 0) throw py::value_error("inv_freq: expected at least one row, got none");
  check_range(a.rows, 0, kMaxRows, "positions");
  check_range(a.half, 0, cuda::kMaxRowWidth, "inv_freq: columns");
  py::gil_scoped_release release;
  raise(cuda::rope_angles(a, stream_of(stream)), "rope_angles");
}

// cos and sin [T, half], half of the rotated channels of a head.
int64_t half_of(const py::object& cos, const py::object& sin, int64_t rows, int64_t head_size) {
  const auto& c = device_array(cos, "cos", "float32", {rows, -1});
  device_array(sin, "sin", "float32", {rows, c.dim(1)});
  if (2 * c.dim(1) > head_size)
    throw py::value_error("cos: expected at most half as many columns as a head has, got " + std::to_string(c.dim(1)) +
                          " for heads of " + std::to_string(head_size));
  return c.dim(1);
}

void rope(const py::object& x, const py::object& cos, const py::object& sin, int64_t head_size, bool inverse,
          uintptr_t stream) {
  const auto& heads = device_array(x, "x", "float32", {-1, -1}, false);
  check_range(head_size, 1, int64_t(1) << 30, "head_size");
  if (heads.dim(1) % head_size)
    throw py::value_error("x: expected whole heads of " + std::to_string(head_size) + ", got " +
                          std::to_string(heads.dim(1)) + " columns");
  RopeArgs a{};
  a.x = static_cast<float*>(heads.data);
  a.rows = heads.dim(0);
  a.heads = heads.dim(1) / head_size;
  a.head_size = head_size;
  a.half = half_of(cos, sin, a.rows, head_size);
  a.cos = optional<float>(cos, "cos", "float32", {a.rows, a.half});
  a.sin = optional<float>(sin, "sin", "float32", {a.rows, a.half});
  a.x_stride = heads.row_stride();
  a.inverse = inverse;
  check_range(a.rows, 0, kMaxRows, "x: rows");
  check_range(heads.dim(1), 0, cuda::kMaxRowWidth, "x: columns");
  py::gil_scoped_release release;
  raise(cuda::rope(a, stream_of(stream)), "rope");
}

// The rotation of heads that are written to the cache: cos and sin [rows, half], or neither.
template <class Args>
void read_rotation(Args& a, const py::object& cos, const py::object& sin, int64_t head_size) {
  if (cos.is_none() != sin.is_none()) throw py::value_error("cos, sin: expected both or neither");
  if (cos.is_none()) return;
  a.half = half_of(cos, sin, a.rows, head_size);
  a.cos = optional<float>(cos, "cos", "float32", {a.rows, a.half});
  a.sin = optional<float>(sin, "sin", "float32", {a.rows, a.half});
}

void kv_write(const py::object& cache, const py::object& k, const py::object& v, const py::object& slots,
              int64_t head_size, const py::object& cos, const py::object& sin, uintptr_t stream) {
  check_range(head_size, 1, kMaxHead, "head_size");
  const auto& blocks = device_array(cache, "cache", kFloats, {-1, -1, 2, kBlockTokens, round_up(head_size, kHeadPad)});
  KvWriteArgs a{};
  a.cache = {blocks.data, blocks.dim(0), blocks.dim(1), head_size, float_dtype(blocks, "cache")};
  const auto& keys = device_array(k, "k", "float32", {-1, a.cache.kv_heads * head_size}, false);
  a.rows = keys.dim(0);
  const auto& values = device_array(v, "v", "float32", {a.rows, a.cache.kv_heads * head_size}, false);
  a.k = static_cast<const float*>(keys.data);
  a.v = static_cast<const float*>(values.data);
  a.k_stride = keys.row_stride();
  a.v_stride = values.row_stride();
  a.slots = static_cast<const int64_t*>(device_array(slots, "slots", "int64", {a.rows}).data);
  read_rotation(a, cos, sin, head_size);
  check_range(a.rows, 0, kMaxRows, "k: rows");
  check_range(a.cache.kv_heads * a.cache.padded_head(), 0, cuda::kMaxRowWidth, "cache: heads times channels");
  py::gil_scoped_release release;
  raise(cuda::kv_write(a, stream_of(stream)), "kv_write");
}

// The weights of a norm of heads, [E] of all or [heads, E]; null for None.
const float* head_norm(const py::object& weight, const char* name, int64_t heads, int64_t head_size, int64_t stride) {
  return optional<float>(weight, name, "float32",
                         stride ? std::vector<int64_t>{heads, head_size} : std::vector<int64_t>{head_size});
}

void qkv_write(const py::object& q, const py::object& cache, const py::object& qkv, const py::object& slots,
               int64_t head_size, bool paired, const py::object& cos, const py::object& sin, const py::object& q_norm,
               const py::object& k_norm, int norm, float eps, uintptr_t stream) {
  check_range(head_size, 1, kMaxHead, "head_size");
  const auto& blocks = device_array(cache, "cache", kFloats, {-1, -1, 2, kBlockTokens, round_up(head_size, kHeadPad)});
  cuda::QkvWriteArgs a{};
  a.cache = {blocks.data, blocks.dim(0), blocks.dim(1), head_size, float_dtype(blocks, "cache")};
  const auto& queries = device_array(q, "q", kFloats, {-1, -1}, false);
  if (queries.dim(1) % head_size)
    throw py::value_error("q: expected whole heads of " + std::to_string(head_size) + ", got " +
                          std::to_string(queries.dim(1)) + " columns");
  a.rows = queries.dim(0);
  a.heads = queries.dim(1) / head_size;
  const auto& product =
      device_array(qkv, "qkv", "float32", {a.rows, (a.heads + 2 * a.cache.kv_heads) * head_size}, false);
  a.q = queries.data;
  a.q_stride = queries.row_stride();
  a.q_dtype = float_dtype(queries, "q");
  a.qkv = static_cast<const float*>(product.data);
  a.qkv_stride = product.row_stride();
  a.slots = static_cast<const int64_t*>(device_array(slots, "slots", "int64", {a.rows}).data);
  read_rotation(a, cos, sin, head_size);
  if (q_norm.is_none() != k_norm.is_none()) throw py::value_error("q_norm, k_norm: expected both or neither");
  if (py::isinstance<DeviceArray>(q_norm) && q_norm.cast<const DeviceArray&>().shape.size() == 2)
    a.norm_stride = head_size;
  a.q_norm = head_norm(q_norm, "q_norm", a.heads, head_size, a.norm_stride);
  a.k_norm = head_norm(k_norm, "k_norm", a.cache.kv_heads, head_size, a.norm_stride);
  check_range(norm, 0, int(NormKind::rms), "norm");
  a.norm = NormKind(norm);
  a.eps = eps;
  a.paired = paired;
  check_range(a.rows, 0, kMaxRows, "q: rows");
  check_range(a.heads + 2 * a.cache.kv_heads, 0, kMaxGrid, "qkv: heads");
  py::gil_scoped_release release;
  raise(cuda::qkv_write(a, stream_of(stream)), "qkv_write");
}

// starts [R + 1] and ids of a list for each row; both None where no row has one. Returns how many ids there are.
int64_t lists_of(RowLists& lists, const py::object& starts, const py::object& ids, int64_t rows, const char* name) {
  if (starts.is_none() != ids.is_none())
    throw py::value_error(std::string(name) + ": expected starts and ids, or neither");
  if (starts.is_none()) return 0;
  lists.starts = static_cast<const int64_t*>(device_array(starts, name, "int64", {rows + 1}).data);
  const auto& list = device_array(ids, name, "int32", {-1});
  lists.ids = static_cast<const int32_t*>(list.data);
  return list.dim(0);
}

void sample(const py::object& tokens, const py::object& logits, const py::object& rows,
            const py::object& history_starts, const py::object& history_ids, const py::object& history_counts,
            const py::object& bias_starts, const py::object& bias_ids, const py::object& bias_values,
            const py::object& allowed_starts, const py::object& allowed_ids, const py::object& workspace,
            uintptr_t stream) {
  const auto& x = device_array(logits, "logits", "float32", {-1, -1}, false);
  SampleArgs a{};
  a.count = x.dim(0);
  a.vocab = x.dim(1);
  a.stride = x.row_stride();
  a.logits = static_cast<float*>(x.data);
  a.tokens = static_cast<int32_t*>(device_array(tokens, "tokens", "int32", {a.count}).data);
  const auto& parameters = device_array(rows, "rows", "uint8", {a.count, int64_t(sizeof(SampleRow))});
  check_aligned(parameters, "rows");
  a.rows = static_cast<const SampleRow*>(parameters.data);
  const int64_t seen = lists_of(a.history, history_starts, history_ids, a.count, "history");
  const int64_t biased = lists_of(a.bias, bias_starts, bias_ids, a.count, "bias");
  const int64_t allowed = lists_of(a.allowed, allowed_starts, allowed_ids, a.count, "allowed");
  if (a.history.starts)
    a.history_counts =
        static_cast<const int32_t*>(device_array(history_counts, "history_counts", "int32", {seen}).data);
  if (a.bias.starts)
    a.bias_values = static_cast<const float*>(device_array(bias_values, "bias_values", "float32", {biased}).data);
  if (a.allowed.starts) a.workspace = device_array(workspace, "workspace", "float32", {allowed}).data;
  check_range(a.vocab, 1, cuda::kMaxVocab, "logits: columns");
  check_range(a.count, 0, kMaxRows, "logits: rows");
  py::gil_scoped_release release;
  raise(cuda::sample(a, stream_of(stream)), "sample");
}

void logprobs(const py::object& chosen, const py::object& ranks, const py::object& top, const py::object& top_ids,
              const py::object& logits, const py::object& ids, uintptr_t stream) {
  const auto& x = device_array(logits, "logits", "float32", {-1, -1}, false);
  LogprobsArgs a{};
  a.count = x.dim(0);
  a.vocab = x.dim(1);
  a.stride = x.row_stride();
  a.logits = static_cast<const float*>(x.data);
  const auto& best = device_array(top, "top", "float32", {a.count, -1});
  a.top_n = best.dim(1);
  a.top = static_cast<float*>(best.data);
  a.chosen = static_cast<float*>(device_array(chosen, "chosen", "float32", {a.count}).data);
  a.ranks = static_cast<int32_t*>(device_array(ranks, "ranks", "int32", {a.count}).data);
  a.top_ids = static_cast<int32_t*>(device_array(top_ids, "top_ids", "int32", {a.count, a.top_n}).data);
  a.ids = static_cast<const int32_t*>(device_array(ids, "ids", "int32", {a.count}).data);
  check_range(a.vocab, 1, cuda::kMaxVocab, "logits: columns");
  check_range(a.top_n, 0, cuda::kMaxTop, "top: columns");
  check_range(a.count, 0, kMaxRows, "logits: rows");
  py::gil_scoped_release release;
  raise(cuda::logprobs(a, stream_of(stream)), "logprobs");
}

void advance(const py::object& tokens, const py::object& positions, const py::object& slots, const py::object& lengths,
             const py::object& rows, const py::object& chosen, uintptr_t stream) {
  const auto& ids = device_array(chosen, "chosen", "int32", {-1});
  cuda::AdvanceArgs a{};
  a.count = ids.dim(0);
  a.chosen = static_cast<const int32_t*>(ids.data);
  a.tokens = static_cast<int32_t*>(device_array(tokens, "tokens", "int32", {a.count}).data);
  a.positions = static_cast<int32_t*>(device_array(positions, "positions", "int32", {a.count}).data);
  a.slots = static_cast<int64_t*>(device_array(slots, "slots", "int64", {a.count}).data);
  a.lengths = static_cast<int32_t*>(device_array(lengths, "lengths", "int32", {a.count}).data);
  const auto& draws = device_array(rows, "rows", "uint8", {a.count, int64_t(sizeof(SampleRow))});
  check_aligned(draws, "rows");
  a.rows = static_cast<SampleRow*>(draws.data);
  check_range(a.count, 0, kMaxRows, "chosen");
  py::gil_scoped_release release;
  raise(cuda::advance(a, stream_of(stream)), "advance");
}

}  // namespace

void bind_cuda_layers(py::module_& module) {
  using py::arg;
  module.def("norm", &norm, arg("y"), arg("x"), arg("weight"), arg("bias"), arg("residual"), arg("sum"), arg("eps"),
             arg("kind"), arg("stream"));
  module.def("activation", &activation, arg("y"), arg("x"), arg("up"), arg("activation"), arg("stream"));
  module.def("axpby", &axpby, arg("out"), arg("x"), arg("a"), arg("y"), arg("b"), arg("stream"));
  module.def("gather_columns", &gather_columns, arg("y"), arg("x"), arg("index"), arg("stream"));
  module.def("embedding", &embedding, arg("y"), arg("tokens"), arg("table"), arg("positions"), arg("position_table"),
             arg("stream"));
  module.def("rope_angles", &rope_angles, arg("cos"), arg("sin"), arg("positions"), arg("inv_freq"), arg("table"),
             arg("scaling"), arg("stream"));
  module.def("rope", &rope, arg("x"), arg("cos"), arg("sin"), arg("head_size"), arg("inverse"), arg("stream"));
  module.def("kv_write", &kv_write, arg("cache"), arg("k"), arg("v"), arg("slots"), arg("head_size"), arg("cos"),
             arg("sin"), arg("stream"));
  module.def("qkv_write", &qkv_write, arg("q"), arg("cache"), arg("qkv"), arg("slots"), arg("head_size"), arg("paired"),
             arg("cos"), arg("sin"), arg("q_norm"), arg("k_norm"), arg("norm"), arg("eps"), arg("stream"));
  module.def("sample", &sample, arg("tokens"), arg("logits"), arg("rows"), arg("history_starts"), arg("history_ids"),
             arg("history_counts"), arg("bias_starts"), arg("bias_ids"), arg("bias_values"), arg("allowed_starts"),
             arg("allowed_ids"), arg("workspace"), arg("stream"));
  module.def("logprobs", &logprobs, arg("chosen"), arg("ranks"), arg("top"), arg("top_ids"), arg("logits"), arg("ids"),
             arg("stream"));
  module.def("advance", &advance, arg("tokens"), arg("positions"), arg("slots"), arg("lengths"), arg("rows"),
             arg("chosen"), arg("stream"));
}

}  // namespace pyllm::bindings
