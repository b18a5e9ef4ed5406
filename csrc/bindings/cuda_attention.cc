// The launchers of csrc/cuda/attention.h: every argument is checked here, and every launch's error raised.
#include "bindings/cuda_launch.h"
#include "cuda/attention.h"

namespace pyllm::bindings {
namespace {

using Object = const py::object&;

// What all take; q and out may be float32 or bfloat16, the cache is of `dtype`.
cuda::AttentionArgs attention_args(Object out, Object lse, Object q, Object cache, Object starts, Object lengths,
                                   Object tables, int64_t head_size, float scale, bool causal, Object prefix,
                                   int64_t window, int64_t sinks, Object bias, Object slopes, float softcap,
                                   int64_t most_queries, const char* dtype) {
  check_range(head_size, 1, kMaxHead, "head_size");
  check_range(window, 0, int64_t(1) << 40, "window");
  check_range(sinks, 0, int64_t(1) << 40, "sinks");
  cuda::AttentionArgs a{};
  const auto& blocks = device_array(cache, "cache", dtype, {-1, -1, 2, kBlockTokens, round_up(head_size, kHeadPad)});
  a.cache = {blocks.data, blocks.dim(0), blocks.dim(1), head_size, float_dtype(blocks, "cache")};
  const char* others = a.cache.dtype == DType::f32 ? "float32" : kFloats;
  const auto& queries = device_array(q, "q", others, {-1, -1, head_size}, false);
  const int64_t rows = queries.dim(0);
  a.heads = queries.dim(1);
  if (a.cache.kv_heads == 0 || a.heads % a.cache.kv_heads)
    throw py::value_error("q: expected a multiple of the cache's " + std::to_string(a.cache.kv_heads) + " heads, got " +
                          std::to_string(a.heads));
  const auto& output = device_array(out, "out", others, {rows, a.heads, head_size}, false);
  for (const auto* array : {&queries, &output})
    if (array->dim(1) > 1 && array->row_stride() != head_size)
      throw py::value_error("q, out: expected heads side by side");
  a.out = output.data;
  a.lse = static_cast<float*>(device_data(lse, "lse", "float32", {rows, a.heads}));
  a.q = queries.data;
  a.q_dtype = float_dtype(queries, "q");
  a.out_dtype = float_dtype(output, "out");
  const auto& table = device_array(tables, "tables", "int32", {-1, -1});
  a.sequences = table.dim(0);
  a.table_width = table.dim(1);
  a.tables = static_cast<const int32_t*>(table.data);
  a.starts = static_cast<const int32_t*>(device_array(starts, "starts", "int32", {a.sequences + 1}).data);
  a.lengths = static_cast<const int32_t*>(device_array(lengths, "lengths", "int32", {a.sequences}).data);
  a.q_stride = queries.strides[0];
  a.out_stride = output.strides[0];
  if (!prefix.is_none() && !causal) throw py::value_error("prefix: expected None where causal is False");
  a.rule = {static_cast<const int32_t*>(device_data(prefix, "prefix", "int32", {a.sequences})), window, sinks, causal};
  if (!bias.is_none()) {
    const auto& columns = device_array(bias, "bias", "float32", {a.heads, -1});
    if (columns.dim(1) % 2 == 0)
      throw py::value_error("bias: expected a column for each distance from -reach to reach, got " +
                            std::to_string(columns.dim(1)));
    a.scores.bias = static_cast<const float*>(columns.data);
    a.scores.reach = columns.dim(1) / 2;
  }
  a.scores.slopes = static_cast<const float*>(device_data(slopes, "slopes", "float32", {a.heads}));
  if (!(softcap >= 0.0f)) throw py::value_error("softcap: expected at least 0, got " + std::to_string(softcap));
  a.scores.softcap = softcap;
  check_range(most_queries, 0, rows, "most_queries");
  check_range(a.sequences, 0, kMaxGrid, "tables: sequences");
  check_range(a.cache.kv_heads, 1, kMaxGrid, "cache: heads");
  a.most_queries = most_queries;
  a.scale = scale;
  return a;
}

void check_attention_pieces(const cuda::AttentionArgs& a, Object q, Object cache) {
  if (a.cache.head_size % 8 || a.q_stride % 8)
    throw py::value_error("q: expected a head size and a distance of rows that 8 divides, got " +
                          std::to_string(a.cache.head_size) + " and " + std::to_string(a.q_stride));
  check_aligned(q.cast<const DeviceArray&>(), "q");
  check_aligned(cache.cast<const DeviceArray&>(), "cache");
}

// With `wgmma` by Hopper's kernel, else by that of every GPU.
void prompt_attention(Object out, Object lse, Object q, Object cache, Object starts, Object lengths, Object tables,
                      int64_t head_size, float scale, bool causal, Object prefix, int64_t window, int64_t sinks,
                      Object bias, Object slopes, float softcap, int64_t most_queries, bool wgmma, uintptr_t stream) {
  const auto a = attention_args(out, lse, q, cache, starts, lengths, tables, head_size, scale, causal, prefix, window,
                                sinks, bias, slopes, softcap, most_queries, "bfloat16");
  check_attention_pieces(a, q, cache);
  if (wgmma) {
    if (head_size != 64 && head_size != 128)
      throw py::value_error("head_size: expected 64 or 128 with wgmma, got " + std::to_string(head_size));
    check_range(a.cache.blocks * a.cache.kv_heads, 0, cuda::kMaxWgmmaBlocks, "cache: blocks times heads");
  }
  py::gil_scoped_release release;
  if (wgmma)
    raise(cuda::wgmma_attention(a, stream_of(stream)), "wgmma_attention");
  else
    raise(cuda::prompt_attention(a, stream_of(stream)), "prompt_attention");
}

void split_attention(Object out, Object lse, Object q, Object cache, Object starts, Object lengths, Object tables,
                     int64_t head_size, float scale, bool causal, Object prefix, int64_t window, int64_t sinks,
                     Object bias, Object slopes, float softcap, int64_t most_queries, int64_t split_blocks,
                     Object partial, Object tickets, uintptr_t stream) {
  auto a = attention_args(out, lse, q, cache, starts, lengths, tables, head_size, scale, causal, prefix, window, sinks,
                          bias, slopes, softcap, most_queries, "bfloat16");
  check_attention_pieces(a, q, cache);
  check_range(most_queries * (a.heads / a.cache.kv_heads), 0, cuda::kSplitRows, "most_queries times heads of a group");
  check_range(split_blocks, 1, int64_t(1) << 30, "split_blocks");
  const int64_t splits = (a.table_width + split_blocks - 1) / split_blocks;
  a.split_blocks = split_blocks;
  a.partial = static_cast<float*>(device_array(partial, "partial", "float32",
                                               {a.sequences, a.cache.kv_heads, splits, cuda::kSplitRows, head_size + 2})
                                      .data);
  a.tickets = static_cast<uint32_t*>(device_array(tickets, "tickets", "uint32", {a.sequences, a.cache.kv_heads}).data);
  py::gil_scoped_release release;
  raise(cuda::split_attention(a, stream_of(stream)), "split_attention");
}

void plain_attention(Object out, Object lse, Object q, Object cache, Object starts, Object lengths, Object tables,
                     int64_t head_size, float scale, bool causal, Object prefix, int64_t window, int64_t sinks,
                     Object bias, Object slopes, float softcap, int64_t most_queries, uintptr_t stream) {
  const auto a = attention_args(out, lse, q, cache, starts, lengths, tables, head_size, scale, causal, prefix, window,
                                sinks, bias, slopes, softcap, most_queries, "float32");
  py::gil_scoped_release release;
  raise(cuda::plain_attention(a, stream_of(stream)), "plain_attention");
}

}  // namespace

void bind_cuda_attention(py::module_& module) {
  using py::arg;
  const auto define = [&](const char* name, auto* launcher, auto... more) {
    module.def(name, launcher, arg("out"), arg("lse"), arg("q"), arg("cache"), arg("starts"), arg("lengths"),
               arg("tables"), arg("head_size"), arg("scale"), arg("causal"), arg("prefix"), arg("window"), arg("sinks"),
               arg("bias"), arg("slopes"), arg("softcap"), arg("most_queries"), more..., arg("stream"));
  };
  define("prompt_attention", &prompt_attention, arg("wgmma"));
  define("plain_attention", &plain_attention);
  define("split_attention", &split_attention, arg("split_blocks"), arg("partial"), arg("tickets"));
}

}  // namespace pyllm::bindings
