// rope_angles, rope, kv_write, attention and its backward pass.
#include <algorithm>
#include <cmath>
#include <optional>

#include "bindings/arrays.h"
#include "bindings/context.h"

namespace pyllm::bindings {
namespace {

std::string at(const char* name, int64_t index) { return std::string(name) + "[" + std::to_string(index) + "]"; }

// Rows without gaps between them, for kernels that take no stride.
template <class T>
Rows<T> dense_rows_of(const py::object& object, const char* name, int64_t rows, int64_t cols) {
  const auto view = rows_of<T>(object, name, rows, cols);
  if (view.stride != view.cols)
    throw py::value_error(std::string(name) + ": expected rows without gaps, got a stride of " +
                          std::to_string(view.stride) + " for " + std::to_string(view.cols) +
                          " columns: pass numpy.ascontiguousarray of it");
  return view;
}

void check_head_size(int64_t head_size) {
  if (head_size < 1 || head_size > kMaxHead)
    throw py::value_error("head_size: expected 1 to " + std::to_string(kMaxHead) + ", got " +
                          std::to_string(head_size));
}

// How many heads of head_size make up the columns of an array.
int64_t heads_of(int64_t cols, const char* name, int64_t head_size) {
  if (cols % head_size != 0 || cols == 0)
    throw py::value_error(std::string(name) + ": expected a multiple of head_size = " + std::to_string(head_size) +
                          " columns, got " + std::to_string(cols));
  return cols / head_size;
}

void check_half(int64_t half, int64_t head_size) {
  if (2 * half > head_size)
    throw py::value_error("cos: expected at most head_size / 2 = " + std::to_string(head_size / 2) + " columns, got " +
                          std::to_string(half));
}

DType cache_dtype(const py::array& a) {
  if (a.dtype().is(py::dtype::of<float>())) return DType::f32;  // by far the fastest to find out
  const auto dtype = std::string(py::str(a.dtype()));
  if (dtype == "float32") return DType::f32;
  if (dtype == "bfloat16") return DType::bf16;
  if (dtype == "int8") return DType::i8;
  throw py::type_error("cache: expected float32, bfloat16 or int8, got " + shape_text(a));
}

// One layer's cache [blocks, G, 2, 64 * Ep], or 64 * (Ep + 2) in int8.
CacheView cache_of(const py::object& object, int64_t head_size, bool writable) {
  check_head_size(head_size);
  if (!py::isinstance<py::array>(object))
    throw py::type_error("cache: expected a numpy array, got " + std::string(py::str(py::type::of(object))));
  const auto a = py::reinterpret_borrow<py::array>(object);
  CacheView cache{const_cast<void*>(a.data()), 0, 0, head_size, cache_dtype(a)};
  if (a.ndim() != 4 || a.shape(1) < 1 || a.shape(2) != 2 || a.shape(3) != cache.half_elements())
    throw py::value_error("cache: expected [blocks, kv_heads, 2, " + std::to_string(cache.half_elements()) +
                          "] for head_size " + std::to_string(head_size) + ", got " + shape_text(a));
  const bool aligned = reinterpret_cast<uintptr_t>(a.data()) % uintptr_t(a.itemsize()) == 0;
  if (!(a.flags() & py::array::c_style) || !aligned)
    throw py::value_error("cache: expected an aligned C-contiguous array, got one that is not");
  if (writable && !a.writeable()) throw py::value_error("cache: expected a writable array, got a read-only one");
  cache.blocks = a.shape(0);
  cache.kv_heads = a.shape(1);
  return cache;
}

void check_values(const RopeAnglesArgs& a) {
  for (int64_t t = 0; t < a.rows; ++t)
    if (a.positions[t] < 0)
      throw py::value_error(at("positions", t) + ": expected >= 0, got " + std::to_string(a.positions[t]));
  if (a.table) check_ids(a.table, a.rows, a.classes, "table", "a row of inv_freq");
}

void rope_angles(Context& context, const py::object& cos, const py::object& sin, const py::object& positions,
                 const py::object& inv_freq, const py::object& table, float scaling) {
  const auto frequencies = dense_rows_of<const float>(inv_freq, "inv_freq", -1, -1);
  int64_t rows = 0;
  const int32_t* position = vector_of<const int32_t>(positions, "positions", -1, false, &rows);
  const auto cosines = dense_rows_of<float>(cos, "cos", rows, frequencies.cols);
  const auto sines = dense_rows_of<float>(sin, "sin", rows, frequencies.cols);
  const int32_t* row = vector_of<const int32_t>(table, "table", rows, true);
  if (frequencies.rows < 1) throw py::value_error("inv_freq: expected at least one row, got none");
  if (!std::isfinite(scaling))
    throw py::value_error("scaling: expected a finite number, got " + std::to_string(scaling));
  RopeAnglesArgs args{cosines.data, sines.data,       position,         frequencies.data, row,
                      rows,         frequencies.cols, frequencies.rows, scaling};
  context.submit(&cpu::KernelTable::rope_angles, args, {cos, sin, positions, inv_freq, table}, &check_values);
}

void rope(Context& context, const py::object& x, const py::object& cos, const py::object& sin, int64_t head_size,
          bool inverse) {
  check_head_size(head_size);
  const auto in = rows_of<float>(x, "x", -1, -1);
  const auto cosines = dense_rows_of<const float>(cos, "cos", in.rows, -1);
  const auto sines = dense_rows_of<const float>(sin, "sin", in.rows, cosines.cols);
  check_half(cosines.cols, head_size);
  RopeArgs args{in.data,   cosines.data, sines.data, in.rows, heads_of(in.cols, "x", head_size),
                head_size, cosines.cols, in.stride,  inverse};
  context.submit(&cpu::KernelTable::rope, args, {x, cos, sin});
}

void check_values(const KvWriteArgs& a) {
  const int64_t end = a.cache.blocks * kBlockTokens;
  for (int64_t t = 0; t < a.rows; ++t)
    if (a.slots[t] >= end)
      throw py::value_error(at("slots", t) + ": expected below blocks * " + std::to_string(kBlockTokens) + " = " +
                            std::to_string(end) + ", got " + std::to_string(a.slots[t]));
}

void kv_write(Context& context, const py::object& cache, const py::object& k, const py::object& v,
              const py::object& slots, int64_t head_size, const py::object& cos, const py::object& sin) {
  const CacheView view = cache_of(cache, head_size, true);
  const int64_t columns = view.kv_heads * head_size;
  const auto keys = rows_of<const float>(k, "k", -1, columns);
  const auto values = rows_of<const float>(v, "v", keys.rows, columns);
  const int64_t* slot = vector_of<const int64_t>(slots, "slots", keys.rows);
  if (cos.is_none() != sin.is_none()) throw py::value_error("cos and sin: expected both or neither, got one of them");
  Rows<const float> cosines{}, sines{};
  if (!cos.is_none()) {
    cosines = dense_rows_of<const float>(cos, "cos", keys.rows, -1);
    sines = dense_rows_of<const float>(sin, "sin", keys.rows, cosines.cols);
    check_half(cosines.cols, head_size);
  }
  KvWriteArgs args{view, keys.data, values.data,  cosines.data, sines.data,
                   slot, keys.rows, cosines.cols, keys.stride,  values.stride};
  context.submit(&cpu::KernelTable::kv_write, args, {cache, k, v, slots, cos, sin}, &check_values);
}

// What changes from step to step: row ranges, lengths, prefixes and the blocks they reach.
template <class Args>
void check_sequences(const Args& a) {
  if (a.starts[0] != 0) throw py::value_error("starts[0]: expected 0, got " + std::to_string(a.starts[0]));
  const bool places = a.rule.causal || a.rule.window > 0 || a.scores.bias ||
                      a.scores.slopes;  // whether it matters where a query stands
  for (int64_t b = 0; b < a.sequences; ++b) {
    const int64_t rows = int64_t(a.starts[b + 1]) - a.starts[b], length = a.lengths[b];
    if (rows < 0)
      throw py::value_error(at("starts", b + 1) + ": expected at least " + std::to_string(a.starts[b]) +
                            ", the one before, got " + std::to_string(a.starts[b + 1]));
    const int64_t least = places ? rows : 0, most = a.table_width * kBlockTokens;
    if (length < least || length > most)
      throw py::value_error(at("lengths", b) + ": expected from " + std::to_string(least) +
                            (places ? ", the rows of the sequence" : "") + ", to " + std::to_string(most) +
                            ", the tokens of its block table, got " + std::to_string(length));
    if (a.rule.prefix && (a.rule.prefix[b] < 0 || a.rule.prefix[b] > length))
      throw py::value_error(at("prefix", b) + ": expected from 0 to " + std::to_string(length) +
                            ", the keys in the cache, got " + std::to_string(a.rule.prefix[b]));
    if (rows == 0) continue;
    const int64_t before = length - rows - a.rule.window + 1;  // keys that no row sees, but for sinks
    const int64_t first = a.rule.window > 0 && before > 0 ? before / kBlockTokens : 0;
    const int64_t sinks = (std::min(a.rule.sinks, length) + kBlockTokens - 1) / kBlockTokens;
    const int64_t count = (length + kBlockTokens - 1) / kBlockTokens;
    for (int64_t i = sinks > 0 ? 0 : first; i < count; i = i + 1 == sinks ? std::max(sinks, first) : i + 1) {
      const int32_t block = a.tables[b * a.table_width + i];
      if (block < 0 || block >= a.cache.blocks)
        throw py::value_error(at("tables", b) + "[" + std::to_string(i) + "]: expected a block in [0, " +
                              std::to_string(a.cache.blocks) + "), got " + std::to_string(block));
    }
  }
  if (a.starts[a.sequences] != a.rows)
    throw py::value_error(at("starts", a.sequences) + ": expected " + std::to_string(a.rows) + ", the rows of q, got " +
                          std::to_string(a.starts[a.sequences]));
}

void check_values(const AttentionArgs& a) { check_sequences(a); }

void check_values(const AttentionBackwardArgs& a) {
  check_sequences(a);
  int64_t keys = 0;
  for (int64_t b = 0; b < a.sequences; ++b) keys += a.lengths[b];
  if (keys != a.keys)
    throw py::value_error("lengths: expected a sum of " + std::to_string(a.keys) +
                          ", the rows of dk and dv, as every key has a gradient, got " + std::to_string(keys));
}

AttentionRule rule_of(int64_t sequences, std::optional<int64_t> window, bool causal, const py::object& prefix,
                      int64_t sinks) {
  AttentionRule rule{};
  rule.causal = causal;
  rule.prefix = vector_of<const int32_t>(prefix, "prefix", sequences, true);
  if (rule.prefix && !causal)
    throw py::value_error("prefix: expected None where attention is not causal, as every query sees every key");
  if (window.value_or(0) < 0) throw py::value_error("window: expected >= 0, got " + std::to_string(*window));
  rule.window = std::min(window.value_or(0), int64_t(INT32_MAX));  // as lengths are int32
  if (sinks < 0) throw py::value_error("sinks: expected >= 0, got " + std::to_string(sinks));
  if (sinks > 0 && rule.window == 0)
    throw py::value_error("sinks: expected 0 without a window, as no key is hidden, got " + std::to_string(sinks));
  rule.sinks = std::min(sinks, int64_t(INT32_MAX));
  return rule;
}

AttentionScores scores_of(int64_t heads, const py::object& bias, const py::object& slopes,
                          std::optional<float> softcap) {
  AttentionScores scores{};
  if (!bias.is_none()) {
    const auto table = dense_rows_of<const float>(bias, "bias", heads, -1);
    if (table.cols % 2 == 0)
      throw py::value_error("bias: expected an odd number of columns, for the distances from -n to n, got " +
                            std::to_string(table.cols));
    scores.bias = table.data, scores.reach = table.cols / 2;
  }
  scores.slopes = vector_of<const float>(slopes, "slopes", heads, true);
  scores.softcap = softcap.value_or(0.0f);
  if (softcap && !(*softcap > 0 && std::isfinite(*softcap)))
    throw py::value_error("softcap: expected a finite number above 0, or None, got " + std::to_string(*softcap));
  return scores;
}

// The arguments that forward and backward have in common.
template <class Args>
void set_sequences(Args& args, const py::object& q, const py::object& cache, const py::object& starts,
                   const py::object& lengths, const py::object& tables, int64_t head_size, float scale,
                   const py::object& dropout, std::optional<bool> bf16_dots) {
  args.cache = cache_of(cache, head_size, false);
  const auto queries = rows_of<const float>(q, "q", -1, -1);
  args.q = queries.data, args.q_stride = queries.stride, args.rows = queries.rows;
  args.heads = heads_of(queries.cols, "q", head_size);
  if (args.heads % args.cache.kv_heads != 0)
    throw py::value_error("q: expected a multiple of the cache's " + std::to_string(args.cache.kv_heads) +
                          " heads, got " + std::to_string(args.heads));
  args.lengths = vector_of<const int32_t>(lengths, "lengths", -1, false, &args.sequences);
  args.starts = vector_of<const int32_t>(starts, "starts", args.sequences + 1);
  const auto blocks = dense_rows_of<const int32_t>(tables, "tables", args.sequences, -1);
  args.tables = blocks.data, args.table_width = blocks.cols;
  if (!std::isfinite(scale)) throw py::value_error("scale: expected a finite number, got " + std::to_string(scale));
  args.scale = scale;
  args.dropout = dropout_of(dropout);
  args.bf16_dots = bf16_dots.value_or(cpu::fast_bf16_dots());
}

void attention(Context& context, const py::object& out, const py::object& q, const py::object& cache,
               const py::object& starts, const py::object& lengths, const py::object& tables, int64_t head_size,
               float scale, std::optional<int64_t> window, const py::object& lse, const py::object& dropout,
               std::optional<bool> bf16_dots, bool causal, const py::object& prefix, int64_t sinks,
               const py::object& bias, const py::object& slopes, std::optional<float> softcap) {
  AttentionArgs args{};
  set_sequences(args, q, cache, starts, lengths, tables, head_size, scale, dropout, bf16_dots);
  args.rule = rule_of(args.sequences, window, causal, prefix, sinks);
  args.scores = scores_of(args.heads, bias, slopes, softcap);
  const auto result = rows_of<float>(out, "out", args.rows, args.heads * head_size);
  args.out = result.data, args.out_stride = result.stride;
  if (!lse.is_none()) args.lse = dense_rows_of<float>(lse, "lse", args.rows, args.heads).data;
  context.submit(&cpu::KernelTable::attention, args,
                 {out, q, cache, starts, lengths, tables, lse, dropout, prefix, bias, slopes}, &check_values);
}

void attention_backward(Context& context, const py::object& dq, const py::object& dk, const py::object& dv,
                        const py::object& dout, const py::object& out, const py::object& q, const py::object& cache,
                        const py::object& lse, const py::object& starts, const py::object& lengths,
                        const py::object& tables, int64_t head_size, float scale, std::optional<int64_t> window,
                        const py::object& dropout, std::optional<bool> bf16_dots, bool causal, const py::object& prefix,
                        int64_t sinks, const py::object& bias, const py::object& slopes, std::optional<float> softcap,
                        const py::object& dbias, bool add_dbias) {
  AttentionBackwardArgs args{};
  set_sequences(args, q, cache, starts, lengths, tables, head_size, scale, dropout, bf16_dots);
  args.rule = rule_of(args.sequences, window, causal, prefix, sinks);
  args.scores = scores_of(args.heads, bias, slopes, softcap);
  if (!dbias.is_none()) {
    if (!args.scores.bias) throw py::value_error("dbias: expected None, as there is no bias");
    args.dbias = dense_rows_of<float>(dbias, "dbias", args.heads, 2 * args.scores.reach + 1).data;
  }
  args.add_dbias = add_dbias;
  if (args.cache.dtype == DType::i8)
    throw py::type_error("cache: expected float32 or bfloat16, as int8 has no gradient, got int8");
  const int64_t columns = args.heads * head_size, key_columns = args.cache.kv_heads * head_size;
  const auto queries = rows_of<float>(dq, "dq", args.rows, columns);
  const auto keys = rows_of<float>(dk, "dk", -1, key_columns);
  const auto values = rows_of<float>(dv, "dv", keys.rows, key_columns);
  const auto gradient = rows_of<const float>(dout, "dout", args.rows, columns);
  const auto result = rows_of<const float>(out, "out", args.rows, columns);
  const auto alone = [&](const auto& to, const char* name, const auto&... from) {
    if ((overlap(to, from) || ...))
      throw py::value_error(std::string(name) + ": expected memory of its own, got an array that overlaps another one");
  };
  const auto given = rows_of<const float>(q, "q", args.rows, columns);
  alone(queries, "dq", keys, values, gradient, result, given);
  alone(keys, "dk", values, gradient, result, given);
  alone(values, "dv", gradient, result, given);
  args.dq = queries.data, args.dq_stride = queries.stride;
  args.dk = keys.data, args.dk_stride = keys.stride, args.keys = keys.rows;
  args.dv = values.data, args.dv_stride = values.stride;
  args.dout = gradient.data, args.dout_stride = gradient.stride;
  args.out = result.data, args.out_stride = result.stride;
  args.lse = dense_rows_of<const float>(lse, "lse", args.rows, args.heads).data;
  context.submit(&cpu::KernelTable::attention_backward, args,
                 {dq, dk, dv, dout, out, q, cache, lse, starts, lengths, tables, dropout, prefix, bias, slopes, dbias},
                 &check_values);
}

}  // namespace

void bind_attention(py::module_&, ContextClass& context) {
  context
      .def("rope_angles", &rope_angles, py::arg("cos"), py::arg("sin"), py::arg("positions"), py::arg("inv_freq"),
           py::arg("table"), py::arg("scaling"))
      .def("rope", &rope, py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("head_size"),
           py::arg("inverse") = false)
      .def("kv_write", &kv_write, py::arg("cache"), py::arg("k"), py::arg("v"), py::arg("slots"), py::arg("head_size"),
           py::arg("cos"), py::arg("sin"))
      .def("attention", &attention, py::arg("out"), py::arg("q"), py::arg("cache"), py::arg("starts"),
           py::arg("lengths"), py::arg("tables"), py::arg("head_size"), py::arg("scale"),
           py::arg("window") = py::none(), py::arg("lse") = py::none(), py::arg("dropout") = py::none(),
           py::arg("bf16_dots") = py::none(), py::arg("causal") = true, py::arg("prefix") = py::none(),
           py::arg("sinks") = 0, py::arg("bias") = py::none(), py::arg("slopes") = py::none(),
           py::arg("softcap") = py::none())
      .def("attention_backward", &attention_backward, py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("dout"),
           py::arg("out"), py::arg("q"), py::arg("cache"), py::arg("lse"), py::arg("starts"), py::arg("lengths"),
           py::arg("tables"), py::arg("head_size"), py::arg("scale"), py::arg("window") = py::none(),
           py::arg("dropout") = py::none(), py::arg("bf16_dots") = py::none(), py::arg("causal") = true,
           py::arg("prefix") = py::none(), py::arg("sinks") = 0, py::arg("bias") = py::none(),
           py::arg("slopes") = py::none(), py::arg("softcap") = py::none(), py::arg("dbias") = py::none(),
           py::arg("add_dbias") = false);
}

}  // namespace pyllm::bindings
