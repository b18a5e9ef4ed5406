// limits: runs the machine at one of its limits; pyllm.limits takes the time.
#include <numeric>

#include "bindings/arrays.h"
#include "bindings/context.h"

namespace pyllm::bindings {
namespace {

Limit limit_named(const std::string& name) {
  if (name == "read") return Limit::read;
  if (name == "f32") return Limit::f32;
  if (name == "bf16") return Limit::bf16;
  if (name == "int8") return Limit::int8;
  throw py::value_error("limit: expected read, f32, bf16 or int8, got " + name);
}

int64_t limits(Context& context, const std::string& name, const py::object& data, int64_t streams, int64_t chunks,
               int64_t rounds) {
  if (context.recording()) throw py::value_error("limits cannot be recorded into a graph");
  LimitsArgs args{};
  args.limit = limit_named(name);
  args.data = vector_of<const float>(data, "data", -1, true, &args.size);
  if (args.limit == Limit::read && (!args.data || args.size % kLimitsChunk != 0))
    throw py::value_error("data: expected a multiple of " + std::to_string(kLimitsChunk) + " floats, got " +
                          std::to_string(args.size));
  if (streams != 1 && streams != 4) throw py::value_error("streams: expected 1 or 4, got " + std::to_string(streams));
  if (chunks < 0 || rounds < 0) throw py::value_error("chunks and rounds: expected >= 0");
  args.streams = streams;
  args.chunks = chunks;
  args.rounds = rounds;
  std::vector<int64_t> work(size_t(context.threads()), 0);
  std::vector<float> sink(size_t(context.threads()), 0.0f);
  args.work = work.data();
  args.sink = sink.data();
  context.submit(&cpu::KernelTable::limits, args, {});
  return std::accumulate(work.begin(), work.end(), int64_t(0));
}

}  // namespace

void bind_limits(py::module_& module, ContextClass& context) {
  module.attr("LIMITS_CHUNK") = kLimitsChunk;
  context.def("limits", &limits, py::arg("limit"), py::arg("data") = py::none(), py::arg("streams") = 1,
              py::arg("chunks") = 0, py::arg("rounds") = 0,
              "Read float32 data once (limit 'read'), or do chunks of register arithmetic ('f32', 'bf16', 'int8'); "
              "returns bytes or operations.");
}

}  // namespace pyllm::bindings
