// What a kernel call from Python goes through: the threads, the scratch memory, and the graph being recorded, if any.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <mutex>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/graph.h"
#include "cpu/memory.h"

namespace pyllm::bindings {

namespace py = pybind11;

// A recorded graph together with all that its arguments point into.
struct RecordedGraph {
  cpu::Graph graph;
  std::vector<py::object> arrays;
  std::vector<std::shared_ptr<cpu::Buffer>> workspaces;
  std::shared_ptr<const int> threads;  // of the context it was recorded on, which alone may replay it
};

class Context {
 public:
  explicit Context(int threads) : pool_(threads), threads_(std::make_shared<const int>(threads)) {}

  int threads() const { return pool_.threads(); }
  bool recording() const { return recording_ != nullptr; }

  // Runs the active level's kernel now, without the GIL; or adds it to the graph being recorded, which keeps `arrays` alive.
  template <class Args>
  void submit(cpu::Kernel<Args> cpu::KernelTable::* kernel, Args& args, std::initializer_list<py::handle> arrays) {
    const cpu::Kernel<Args> function = cpu::active_isa().kernels().*kernel;
    std::shared_ptr<cpu::Buffer> scratch = workspace(args);
    if (recording_) {
      recording_->graph.add(function, args);
      for (py::handle a : arrays)
        if (!a.is_none()) recording_->arrays.push_back(py::reinterpret_borrow<py::object>(a));
      if (scratch && (recording_->workspaces.empty() || recording_->workspaces.back() != scratch))
        recording_->workspaces.push_back(scratch);
      return;
    }
    py::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(mutex_);
    function(args, pool_);
  }

  void begin_recording() {
    if (recording_) throw py::value_error("a graph is already being recorded on these ops: end that recording first");
    recording_ = std::make_shared<RecordedGraph>();
    recording_->threads = threads_;
  }

  std::shared_ptr<RecordedGraph> end_recording() {
    if (!recording_) throw py::value_error("no graph is being recorded on these ops");
    return std::move(recording_);
  }

  void replay(const RecordedGraph& recorded) {
    if (recorded.threads != threads_)
      throw py::value_error(
          "graph: expected one recorded on these ops, got one of other ops, whose scratch memory it uses");
    py::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(mutex_);
    recorded.graph.replay(pool_);
  }

 private:
  // Kernels run one at a time, so they share one scratch buffer; a graph keeps the one it was recorded with.
  template <class Args>
  std::shared_ptr<cpu::Buffer> workspace(Args& args) {
    const int64_t bytes = cpu::workspace_bytes(args, pool_.threads());
    if (bytes == 0) return nullptr;
    if (!workspace_ || workspace_->bytes() < bytes) workspace_ = std::make_shared<cpu::Buffer>(bytes + bytes / 4);
    set_workspace(args, workspace_->data(), 0);
    return workspace_;
  }
  template <class Args>
  static auto set_workspace(Args& args, void* data, int) -> decltype(args.workspace, void()) {
    args.workspace = data;
  }
  template <class Args>
  static void set_workspace(Args&, void*, long) {}

  cpu::Parallel pool_;
  std::shared_ptr<const int> threads_;
  std::mutex mutex_;
  std::shared_ptr<cpu::Buffer> workspace_;
  std::shared_ptr<RecordedGraph> recording_;
};

using ContextClass = py::class_<Context>;

// Each adds its kernels as methods; see the files of the same names.
void bind_packed(py::module_& module, ContextClass& context);     // PackedMatrix, pack, matmul
void bind_layers(py::module_& module, ContextClass& context);     // norm, activation, embedding, gather
void bind_attention(py::module_& module, ContextClass& context);  // rope_angles, rope, kv_write, attention
void bind_sampling(py::module_& module, ContextClass& context);   // sample, logprobs
void bind_limits(py::module_& module, ContextClass& context);     // limits

}  // namespace pyllm::bindings
