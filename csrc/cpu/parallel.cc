#include "cpu/parallel.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pyllm::cpu {
namespace {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// How long an idle worker spins before it sleeps: longer than the gap between two decode steps, too short to notice as load.
constexpr auto kSpin = std::chrono::microseconds(200);

// A worker's share of the chunks as (begin, end), 32 bits each, so that owner and thieves take from it with one compare-swap.
struct alignas(64) Share {
  std::atomic<uint64_t> range{0};

  // Release and acquire: who takes a chunk sees the run it belongs to.
  void set(uint64_t begin, uint64_t end) { range.store(begin << 32 | end, std::memory_order_release); }

  int64_t take(bool front) {
    uint64_t r = range.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t begin = r >> 32, end = r & 0xffffffffu;
      if (begin >= end) return -1;
      const uint64_t next = front ? (begin + 1) << 32 | end : begin << 32 | (end - 1);
      if (range.compare_exchange_weak(r, next, std::memory_order_acquire, std::memory_order_relaxed))
        return int64_t(front ? begin : end - 1);
    }
  }
};

}  // namespace

struct Parallel::Team {
  explicit Team(int threads) : shares(threads) {
    workers.reserve(threads);
    try {
      for (int i = 1; i < threads; ++i) workers.emplace_back([this, i] { loop(i); });
    } catch (const std::exception& error) {
      const auto started = std::to_string(workers.size() + 1);
      end();
      throw std::runtime_error("could not start " + std::to_string(threads) + " threads, only " + started + ": " +
                               error.what() + "; choose fewer with threads= or --threads");
    }
  }

  ~Team() { end(); }

  void end() {
    stop.store(true);
    {
      std::lock_guard<std::mutex> lock(mutex);
      epoch.fetch_add(1);
    }
    wake.notify_all();
    for (auto& w : workers) w.join();
  }

  // Takes and runs chunks until none is left. Who comes late, even from the run before, just helps with the present one: a
  // chunk can only be taken while its run lasts, and the run lasts until every chunk is done.
  void work(int self) {
    const int n = int(shares.size());
    int64_t count = 0;
    for (int64_t c; (c = shares[self].take(true)) >= 0; ++count) fn(context, c, self);
    for (int d = 1; d < n; ++d) {
      Share& other = shares[(self + d) % n];
      for (int64_t c; (c = other.take(false)) >= 0; ++count) fn(context, c, self);
    }
    if (count) done.fetch_add(count, std::memory_order_release);
  }

  void loop(int self) {
    uint64_t seen = 0;
    for (;;) {
      const auto start = std::chrono::steady_clock::now();
      for (int spins = 0; epoch.load(std::memory_order_acquire) == seen; ++spins) {
        relax();
        if ((spins & 63) == 63 && std::chrono::steady_clock::now() - start > kSpin) {
          std::unique_lock<std::mutex> lock(mutex);
          sleeping.fetch_add(1);
          wake.wait(lock, [&] { return epoch.load(std::memory_order_seq_cst) != seen; });
          sleeping.fetch_sub(1);
        }
      }
      seen = epoch.load(std::memory_order_acquire);
      if (stop.load()) return;
      work(self);
    }
  }

  void run(int64_t chunks, void (*f)(void*, int64_t, int), void* ctx) {
    const int n = int(shares.size());
    fn = f;
    context = ctx;
    done.store(0, std::memory_order_relaxed);
    for (int i = 0; i < n; ++i) shares[i].set(uint64_t(chunks * i / n), uint64_t(chunks * (i + 1) / n));
    epoch.fetch_add(1, std::memory_order_seq_cst);
    if (sleeping.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(mutex);
      wake.notify_all();
    }
    work(0);
    for (int spins = 0; done.load(std::memory_order_acquire) < chunks; ++spins) {
      relax();
      if (spins > 4096) std::this_thread::yield();
    }
  }

  std::vector<Share> shares;
  std::vector<std::thread> workers;
  std::atomic<uint64_t> epoch{0};
  std::atomic<int64_t> done{0};
  std::atomic<int> sleeping{0};
  std::atomic<bool> stop{false};
  std::mutex mutex;
  std::condition_variable wake;
  void (*fn)(void*, int64_t, int) = nullptr;
  void* context = nullptr;
};

Parallel::Parallel(int threads) : threads_(threads < 1 ? 1 : threads) {}

Parallel::~Parallel() {
  if (team_ && team_pid_ != getpid()) (void)team_.release();  // a fork's copy: its threads do not exist here
}

void Parallel::run(int64_t chunks, void (*fn)(void*, int64_t, int), void* context) {
  if (chunks <= 0) return;
  if (threads_ == 1 || chunks == 1) {
    for (int64_t c = 0; c < chunks; ++c) fn(context, c, 0);
    return;
  }
  if (!team_ || team_pid_ != getpid()) {
    if (team_) (void)team_.release();
    team_ = std::make_unique<Team>(threads_);
    team_pid_ = getpid();
  }
  constexpr int64_t kMost = int64_t(1) << 31;  // a share's ends are 32 bits wide
  if (chunks < kMost) return team_->run(chunks, fn, context);
  for (int64_t c = 0; c < chunks; ++c) fn(context, c, 0);
}

}  // namespace pyllm::cpu
