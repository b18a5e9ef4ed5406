// sample, logprobs and the generator.
#include "core/sampling.h"

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>

#include "bindings/arrays.h"
#include "bindings/context.h"
#include "core/random.h"

namespace pyllm::bindings {
namespace {

std::string at(const char* name, int64_t row) { return std::string(name) + " of row " + std::to_string(row); }

void check_range(bool ok, const char* name, int64_t row, const char* expected, double got) {
  if (!ok) throw py::value_error(at(name, row) + ": expected " + expected + ", got " + std::to_string(got));
}

void check_rows(const SampleArgs& args) {
  for (int64_t r = 0; r < args.count; ++r) {
    const SampleRow& row = args.rows[r];
    check_range(std::isfinite(row.temperature) && row.temperature >= 0, "temperature", r, "a finite number >= 0",
                row.temperature);
    check_range(row.top_p > 0 && row.top_p <= 1, "top_p", r, "0 < top_p <= 1", row.top_p);
    check_range(row.min_p >= 0 && row.min_p <= 1, "min_p", r, "0 <= min_p <= 1", row.min_p);
    check_range(row.top_k >= 0, "top_k", r, ">= 0", row.top_k);
    check_range(std::isfinite(row.repetition_penalty) && row.repetition_penalty > 0, "repetition_penalty", r,
                "a finite number > 0", row.repetition_penalty);
    check_range(std::isfinite(row.presence_penalty), "presence_penalty", r, "a finite number", row.presence_penalty);
    check_range(std::isfinite(row.frequency_penalty), "frequency_penalty", r, "a finite number", row.frequency_penalty);
  }
}

// rows: a structured array [R] of pyllm.sampling.SAMPLE_ROW; check_rows looks at the values.
const SampleRow* sample_rows(const py::object& object, int64_t count) {
  if (!py::isinstance<py::array>(object))
    throw py::type_error("rows: expected a numpy array of pyllm.sampling.SAMPLE_ROW, got " +
                         std::string(py::str(py::type::of(object))));
  const auto a = py::reinterpret_borrow<py::array>(object);
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::dtype> sample_row;
  const py::dtype& expected = sample_row
                                  .call_once_and_store_result([] {
                                    return py::dtype(py::module_::import("pyllm.sampling").attr("SAMPLE_ROW"));
                                  })
                                  .get_stored();
  if (expected.itemsize() != py::ssize_t(sizeof(SampleRow)) || !(a.dtype().is(expected) || a.dtype().equal(expected)))
    throw py::type_error("rows: expected dtype pyllm.sampling.SAMPLE_ROW, got " + std::string(py::str(a.dtype())));
  const bool aligned = reinterpret_cast<uintptr_t>(a.data()) % alignof(SampleRow) == 0;
  if (a.ndim() != 1 || a.shape(0) != count || (count > 1 && a.strides(0) != py::ssize_t(sizeof(SampleRow))) || !aligned)
    throw py::value_error("rows: expected a contiguous array [" + std::to_string(count) + "], got " + shape_text(a));
  return static_cast<const SampleRow*>(a.data());
}

// A tuple (starts int64[R + 1], ids int32[n], ...) or None; `values` is what follows the ids.
RowLists lists_of(const py::object& object, const char* name, size_t parts, int64_t count, int64_t vocab,
                  int64_t* length, py::object* values) {
  if (object.is_none()) return {};
  if (!py::isinstance<py::tuple>(object) || py::len(object) != parts)
    throw py::type_error(std::string(name) + ": expected a tuple of " + std::to_string(parts) + " arrays or None");
  const auto tuple = py::reinterpret_borrow<py::tuple>(object);
  const std::string starts_name = std::string(name) + " starts", ids_name = std::string(name) + " ids";
  const auto* starts = vector_of<const int64_t>(tuple[0], starts_name.c_str(), count + 1);
  const auto* ids = vector_of<const int32_t>(tuple[1], ids_name.c_str(), -1, false, length);
  if (parts > 2) *values = tuple[2];
  bool rising = starts[0] >= 0 && starts[count] <= *length;
  for (int64_t r = 0; r < count; ++r)
    rising = rising && starts[r] <= starts[r + 1] && starts[r + 1] - starts[r] <= vocab;
  if (!rising)
    throw py::value_error(starts_name + ": expected numbers that rise from 0 to at most " + std::to_string(*length) +
                          ", no list longer than the vocabulary");
  check_ids(ids, *length, vocab, ids_name.c_str(), "a token");
  return {starts, ids};
}

void sample(Context& context, const py::object& tokens, const py::object& logits, const py::object& rows,
            const py::object& history, const py::object& bias, const py::object& allowed) {
  if (context.recording() && !(history.is_none() && bias.is_none() && allowed.is_none()))
    throw py::value_error(
        "sample with history, bias or allowed tokens cannot be recorded into a graph: these lists change their length "
        "from step to step");
  const auto x = rows_of<float>(logits, "logits", -1, -1);
  if (x.cols > INT32_MAX)
    throw py::value_error("logits: expected at most 2^31 - 1 columns, got " + std::to_string(x.cols));
  SampleArgs args{};
  args.tokens = vector_of<int32_t>(tokens, "tokens", x.rows);
  args.logits = x.data, args.count = x.rows, args.vocab = x.cols, args.stride = x.stride;
  args.rows = sample_rows(rows, x.rows);
  int64_t length = 0;
  py::object values;
  args.history = lists_of(history, "history", 3, x.rows, x.cols, &length, &values);
  if (args.history.starts) args.history_counts = vector_of<const int32_t>(values, "history counts", length);
  args.bias = lists_of(bias, "bias", 3, x.rows, x.cols, &length, &values);
  if (args.bias.starts) {
    args.bias_values = vector_of<const float>(values, "bias values", length);
    for (int64_t i = 0; i < length; ++i)
      if (!(args.bias_values[i] < INFINITY))
        throw py::value_error("bias values[" + std::to_string(i) + "]: expected a finite number or -inf, got " +
                              std::to_string(args.bias_values[i]));
  }
  args.allowed = lists_of(allowed, "allowed", 2, x.rows, x.cols, &length, &values);
  context.submit(&cpu::KernelTable::sample, args, {tokens, logits, rows, history, bias, allowed}, &check_rows);
}

void check_values(const LogprobsArgs& a) { check_ids(a.ids, a.count, a.vocab, "ids", "a token"); }

void logprobs(Context& context, const py::object& chosen, const py::object& ranks, const py::object& top,
              const py::object& top_ids, const py::object& logits, const py::object& ids) {
  const auto x = rows_of<const float>(logits, "logits", -1, -1);
  const auto best = rows_of<float>(top, "top", x.rows, -1);
  const auto best_ids = rows_of<int32_t>(top_ids, "top_ids", x.rows, best.cols);
  if (x.cols > INT32_MAX)
    throw py::value_error("logits: expected at most 2^31 - 1 columns, got " + std::to_string(x.cols));
  if (best.cols > x.cols)
    throw py::value_error("top_n: expected at most the vocabulary of " + std::to_string(x.cols) + ", got " +
                          std::to_string(best.cols));
  if (x.rows > 1 && (best.stride != best.cols || best_ids.stride != best.cols))
    throw py::value_error("top: expected contiguous arrays");
  LogprobsArgs args{};
  args.chosen = vector_of<float>(chosen, "chosen", x.rows);
  args.ranks = vector_of<int32_t>(ranks, "ranks", x.rows);
  args.top = best.data, args.top_ids = best_ids.data, args.top_n = best.cols;
  args.logits = x.data, args.count = x.rows, args.vocab = x.cols, args.stride = x.stride;
  args.ids = vector_of<const int32_t>(ids, "ids", x.rows);
  context.submit(&cpu::KernelTable::logprobs, args, {chosen, ranks, top, top_ids, logits, ids}, &check_values);
}

py::tuple philox(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
  const Philox r = philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return py::make_tuple(r.words[0], r.words[1], r.words[2], r.words[3]);
}

}  // namespace

void bind_sampling(py::module_& module, ContextClass& context) {
  module.def("philox4x32", &philox, py::arg("counter"), py::arg("key"),
             "Four 32-bit words of the generator for 4 counter and 2 key words.");
  module.def("uniform", &uniform, py::arg("seed"), py::arg("stream"), py::arg("position"),
             "The number in [0, 1) that sample draws with.");
  context.def("sample", &sample, py::arg("tokens"), py::arg("logits"), py::arg("rows"), py::arg("history"),
              py::arg("bias"), py::arg("allowed"));
  context.def("logprobs", &logprobs, py::arg("chosen"), py::arg("ranks"), py::arg("top"), py::arg("top_ids"),
              py::arg("logits"), py::arg("ids"));
}

}  // namespace pyllm::bindings
