// pyllm._cpu: the CPU kernels for Python.
#include "bindings/context.h"

namespace pyllm::bindings {
namespace {

// Zeroed bytes on huge pages, as a numpy array that owns them.
py::array allocate(int64_t bytes) {
  if (bytes < 0) throw py::value_error("bytes: expected >= 0, got " + std::to_string(bytes));
  auto buffer = std::make_unique<cpu::Buffer>(bytes);
  void* data = buffer->data();
  py::capsule owner(buffer.release(), [](void* b) { delete static_cast<cpu::Buffer*>(b); });
  return py::array_t<uint8_t>({bytes}, {1}, static_cast<uint8_t*>(data), owner);
}

py::list available_isas() {
  py::list names;
  for (const auto& level : cpu::isa_levels())
    if (level.supported()) names.append(level.name);
  return names;
}

void set_isa(const std::string& name) {
  if (cpu::set_isa(name.c_str())) return;
  std::string known, available;
  const char* needs = nullptr;
  for (const auto& level : cpu::isa_levels()) {
    known += (known.empty() ? "" : ", ") + std::string(level.name);
    if (level.supported()) available += (available.empty() ? "" : ", ") + std::string(level.name);
    if (name == level.name) needs = level.requires_;
  }
  if (needs)
    throw py::value_error("ISA level " + name + " needs " + needs +
                          ", which this machine does not have; available here: " + available);
  throw py::value_error("unknown ISA level " + name + ": expected one of " + known);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "Compiled CPU kernels of pyllm; pyllm.ops is the documented way to call them.";
  module.def("allocate", &allocate, py::arg("bytes"),
             "Zeroed uint8[bytes] on huge pages where granted, 64-byte aligned.");
  module.def(
      "isa_levels",
      [] {
        py::list names;
        for (const auto& level : cpu::isa_levels()) names.append(level.name);
        return names;
      },
      "Names of all levels in this build, best first.");
  module.def("available_isas", &available_isas, "Names of the levels this machine can run, best first.");
  module.def("active_isa", [] { return cpu::active_isa().name; }, "Name of the level in use.");
  module.def("set_isa", &set_isa, py::arg("name"),
             "Choose a level; ValueError where it is unknown or cannot run here.");
  module.def("fast_bf16_dots", &cpu::fast_bf16_dots,
             "Whether attention over a bfloat16 cache multiplies bfloat16 by default, where the level in use can.");
  module.attr("IGNORED_LABEL") = kIgnoredLabel;
  module.attr("BLOCK_TOKENS") = kBlockTokens;
  module.attr("HEAD_PAD") = kHeadPad;
  module.attr("KEY_BLOCK") = kKeyBlock;
  module.attr("PANEL") = kPanel;
  module.attr("GREEDY_BELOW") = kGreedyBelow;
  module.attr("COMPILER") = __VERSION__;
  module.attr("BUILD_TYPE") = PYLLM_BUILD_TYPE;

  py::class_<RecordedGraph, std::shared_ptr<RecordedGraph>>(module, "Graph", "A recorded sequence of kernel calls.")
      .def("__len__", [](const RecordedGraph& g) { return g.graph.size(); });

  ContextClass context(module, "Context", "Threads and scratch memory that kernel calls run on.");
  context
      .def(py::init([](int threads) {
             if (threads < 1 || threads > 1024)
               throw py::value_error("threads: expected 1 to 1024, got " + std::to_string(threads));
             return std::make_unique<Context>(threads);
           }),
           py::arg("threads"))
      .def_property_readonly("threads", &Context::threads)
      .def_property_readonly("recording", &Context::recording)
      .def("begin_recording", &Context::begin_recording, "From here kernel calls are recorded, not run.")
      .def("end_recording", &Context::end_recording, "The graph of the calls since begin_recording.")
      .def("replay", &Context::replay, py::arg("graph"), "Run a recorded graph.");
  bind_packed(module, context);
  bind_layers(module, context);
  bind_attention(module, context);
  bind_training_layers(module, context);
  bind_sampling(module, context);
  bind_training_weights(module, context);
  bind_limits(module, context);
}

}  // namespace pyllm::bindings
