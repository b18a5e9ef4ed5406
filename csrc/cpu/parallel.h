// The only place that knows threads.
#pragma once
#include <cstdint>
#include <memory>
#include <type_traits>

namespace pyllm::cpu {

// A fixed team of threads, the caller being one of them. Threads start on first use, and anew in a forked child.
class Parallel {
 public:
  explicit Parallel(int threads);
  ~Parallel();
  Parallel(const Parallel&) = delete;
  Parallel& operator=(const Parallel&) = delete;

  int threads() const { return threads_; }

  // Calls fn(context, chunk, worker) once for each chunk of [0, chunks), and returns when all are done; worker < threads().
  // Worker w begins at its own contiguous share of the range and walks it upwards, so that it streams memory in order; who
  // is done takes chunks from the far end of another's share. One call at a time. Throws std::runtime_error, before fn is
  // called, where the system does not let the threads start.
  void run(int64_t chunks, void (*fn)(void* context, int64_t chunk, int worker), void* context);

 private:
  struct Team;
  int threads_;
  std::unique_ptr<Team> team_;
  int team_pid_ = 0;
};

// fn(chunk, worker) for each chunk of [0, chunks).
template <class Fn>
inline void parallel_for(Parallel& pool, int64_t chunks, Fn&& fn) {
  using F = std::remove_reference_t<Fn>;
  pool.run(
      chunks, [](void* f, int64_t chunk, int worker) { (*static_cast<F*>(f))(chunk, worker); },
      const_cast<void*>(static_cast<const void*>(&fn)));
}

}  // namespace pyllm::cpu
