// Coroutines for the threads of a block, and what they wait for.
#include <cuda_runtime.h>
#include <ucontext.h>

#include <cstdlib>
#include <deque>
#include <memory>
#include <vector>

dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace emulator {
namespace {

constexpr size_t kStackBytes = 64 * 1024;

struct Copy {
  void* dst;
  const void* src;
  bool valid;
};
struct Meeting {  // of a block or a warp
  unsigned size = 0, arrived = 0, generation = 0;
  void* operands[32] = {};
};
struct Thread {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  bool done = false;
  std::vector<Copy> open;                // copies not yet in a group
  std::deque<std::vector<Copy>> groups;  // under way
};

ucontext_t scheduler;
std::vector<Thread> threads;
std::vector<Meeting> warps;
Meeting block;
std::unique_ptr<unsigned char[]> memory;
unsigned char* base;
unsigned current;
bool progress;  // since the last look: a round without any is a deadlock
const std::function<void()>* kernel;

void entry() {
  (*kernel)();
  threads[current].done = progress = true;
  swapcontext(&threads[current].context, &scheduler);
}

void meet(Meeting& m, const std::function<void()>& last) {
  const unsigned generation = m.generation;
  progress = true;
  if (++m.arrived == m.size) {
    last();
    m.arrived = 0;
    ++m.generation;
    return;
  }
  while (m.generation == generation) swapcontext(&threads[current].context, &scheduler);
}

void run_block(size_t shared_bytes) {
  memory = std::make_unique<unsigned char[]>(shared_bytes + 128);
  base = memory.get() + (128 - reinterpret_cast<uintptr_t>(memory.get()) % 128) % 128;
  std::memset(base, 0xff, shared_bytes);
  const unsigned count = blockDim.x;
  threads.resize(count);
  warps.assign(count / 32, Meeting{32});
  block = Meeting{count};
  for (Thread& t : threads) {
    if (!t.stack) t.stack = std::make_unique<unsigned char[]>(kStackBytes);
    t.done = false;
    t.open.clear();
    t.groups.clear();
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStackBytes;
    makecontext(&t.context, entry, 0);
  }
  for (unsigned left = count; left;) {
    progress = false;
    for (current = 0; current < count; ++current) {
      if (threads[current].done) continue;
      threadIdx = dim3(current, 0, 0);
      swapcontext(&scheduler, &threads[current].context);
      if (threads[current].done) --left;
    }
    if (!progress && left) std::abort();  // not all threads came to a barrier
  }
}

}  // namespace

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& body) {
  if (config.dynamicSmemBytes > kSharedLimit || config.blockDim.x % 32) return cudaErrorInvalidValue;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  kernel = &body;
  for (unsigned z = 0; z < gridDim.z; ++z)
    for (unsigned y = 0; y < gridDim.y; ++y)
      for (unsigned x = 0; x < gridDim.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block(config.dynamicSmemBytes);
      }
  return cudaSuccess;
}

unsigned char* shared() { return base; }
void block_barrier() {
  meet(block, [] {});
}
void warp_together(void* mine, const std::function<void(void* const*)>& act) {
  Meeting& warp = warps[current / 32];
  warp.operands[current % 32] = mine;
  meet(warp, [&] { act(warp.operands); });
}
void copy_later(void* dst, const void* src, bool valid) {
  if (reinterpret_cast<uintptr_t>(dst) % 16 || reinterpret_cast<uintptr_t>(src) % 16) std::abort();
  threads[current].open.push_back({dst, src, valid});
}
void commit() {
  Thread& t = threads[current];
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}
void wait(int pending) {
  Thread& t = threads[current];
  for (; int(t.groups.size()) > pending; t.groups.pop_front())
    for (const Copy& c : t.groups.front()) {
      if (c.valid) {
        std::memcpy(c.dst, c.src, 16);
      } else {
        std::memset(c.dst, 0, 16);
      }
    }
}

}  // namespace emulator
