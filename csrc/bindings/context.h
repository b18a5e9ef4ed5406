// What a kernel call from Python goes through: the threads, the scratch memory, and the graph being recorded, if any.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

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

// Kernels whose arrays say where others are read or written have a check of those values: it throws py::value_error, and
// needs no GIL. See the files of the bindings.
template <class Args>
using CheckValues = void (*)(const Args&);

class Context {
 public:
  explicit Context(int threads) : pool_(threads), threads_(std::make_shared<const int>(threads)) {}

  int threads() const { return pool_.threads(); }

  // Whether a graph is being recorded, by this thread: the calls of others would get into it.
  bool recording() const {
    if (recording_ && recorder_ != PyThread_get_thread_ident())
      throw py::value_error(
          "another thread is recording a graph on these ops: wait for its end_recording, or use ops of your own");
    return recording_ != nullptr;
  }

  // Runs the active level's kernel now, without the GIL; or adds it to the graph being recorded, which keeps `arrays` alive.
  // Values are checked where they are used: now, or at each replay.
  template <class Args>
  void submit(cpu::Kernel<Args> cpu::KernelTable::* kernel, Args& args, std::initializer_list<py::handle> arrays,
              CheckValues<Args> check = nullptr) {
    const cpu::Kernel<Args> function = cpu::active_isa().kernels().*kernel;
    const bool recorded = recording();
    if (!recorded && check) check(args);
    std::shared_ptr<cpu::Buffer> scratch = workspace(args);
    if (recorded) {
      recording_->graph.add(function, args, check);
      for (py::handle a : arrays)
        if (!a.is_none()) recording_->arrays.push_back(py::reinterpret_borrow<py::object>(a));
      if (scratch && (recording_->workspaces.empty() || recording_->workspaces.back() != scratch))
        recording_->workspaces.push_back(scratch);
      return;
    }
    std::mutex& mutex = this->mutex();
    py::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(mutex);
    function(args, pool_);
  }

  void begin_recording() {
    if (recording()) throw py::value_error("a graph is already being recorded on these ops: end that recording first");
    recorder_ = PyThread_get_thread_ident();
    recording_ = std::make_shared<RecordedGraph>();
    recording_->threads = threads_;
  }

  std::shared_ptr<RecordedGraph> end_recording() {
    if (!recording()) throw py::value_error("no graph is being recorded on these ops");
    return std::move(recording_);
  }

  void replay(const RecordedGraph& recorded) {
    if (recorded.threads != threads_)
      throw py::value_error(
          "graph: expected one recorded on these ops, got one of other ops, whose scratch memory it uses");
    std::mutex& mutex = this->mutex();
    py::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(mutex);
    recorded.graph.replay(pool_);
  }

 private:
  // Lets one kernel run at a time. In a forked child it is a fresh one, as a thread that is not there may hold the other, which
  // is therefore left as it is. Called with the GIL.
  std::mutex& mutex() {
    if (mutex_pid_ != getpid()) {
      (void)mutex_.release();
      mutex_ = std::make_unique<std::mutex>();
      mutex_pid_ = getpid();
    }
    return *mutex_;
  }

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
  std::unique_ptr<std::mutex> mutex_;
  pid_t mutex_pid_ = 0;
  std::shared_ptr<cpu::Buffer> workspace_;
  std::shared_ptr<RecordedGraph> recording_;
  unsigned long recorder_ = 0;  // the thread that began it
};

using ContextClass = py::class_<Context>;

// Each adds its kernels as methods; see the files of the same names.
void bind_packed(py::module_& module, ContextClass& context);     // PackedMatrix, packing, matmul
void bind_layers(py::module_& module, ContextClass& context);     // norm, activation, axpby, clamp, embedding, gather
void bind_attention(py::module_& module, ContextClass& context);  // rope_angles, rope, kv_write, attention
void bind_sampling(py::module_& module, ContextClass& context);   // sample, logprobs
void bind_training_weights(py::module_& module, ContextClass& context);  // gradients of matrices, the optimizer
void bind_limits(py::module_& module, ContextClass& context);            // limits
void bind_training_layers(py::module_& module, ContextClass& context);   // dropout, cross_entropy

}  // namespace pyllm::bindings
