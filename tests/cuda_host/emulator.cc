// Coroutines for the threads of a block, and what they wait for; streams that run nothing before somebody waits.
#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
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
  std::unique_ptr<unsigned char[]> stack;
  jmp_buf place;  // where it goes on
  bool done = false;
  std::vector<Copy> open;                // copies not yet in a group
  std::deque<std::vector<Copy>> groups;  // under way
};

jmp_buf scheduler;
std::vector<Thread> threads;
std::vector<Meeting> warps;
Meeting block;
std::unique_ptr<unsigned char[]> memory;
unsigned char* base;
unsigned current;
bool last_first = false;  // the order of blocks
bool progress;            // since the last look: a round without any is a deadlock
const std::function<void()>* kernel;

// A thread's stack is made once; after that both ways are long jumps, which cost no system call.
__attribute__((noinline)) void pause() {
  if (!_setjmp(threads[current].place)) _longjmp(scheduler, 1);
}

void entry() {
  for (;;) {  // block after block
    (*kernel)();
    threads[current].done = progress = true;
    pause();
  }
}

__attribute__((noinline)) void resume(Thread& t) {
  if (_setjmp(scheduler)) return;
  if (t.stack) _longjmp(t.place, 1);
  t.stack = std::make_unique<unsigned char[]>(kStackBytes);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = t.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, entry, 0);
  setcontext(&context);
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
  while (m.generation == generation) pause();
}

void run_block(size_t shared_bytes) {
  memory = std::make_unique<unsigned char[]>(shared_bytes + 128);
  base = memory.get() + (128 - reinterpret_cast<uintptr_t>(memory.get()) % 128) % 128;
  std::memset(base, 0xff, shared_bytes);
  const unsigned count = blockDim.x;
  if (threads.size() < count) threads.resize(count);
  warps.assign(count / 32, Meeting{32});
  block = Meeting{count};
  for (unsigned i = 0; i < count; ++i) {
    threads[i].done = false;
    threads[i].open.clear();
    threads[i].groups.clear();
  }
  for (unsigned left = count; left;) {
    progress = false;
    for (current = 0; current < count; ++current) {
      if (threads[current].done) continue;
      threadIdx = dim3(current, 0, 0);
      resume(threads[current]);
      if (threads[current].done) --left;
    }
    if (!progress && left) std::abort();  // not all threads came to a barrier
  }
}

void run_grid(dim3 grid, dim3 threads_of_block, size_t shared_bytes, const std::function<void()>& body) {
  gridDim = grid;
  blockDim = threads_of_block;
  kernel = &body;
  for (unsigned z = 0; z < gridDim.z; ++z)
    for (unsigned y = 0; y < gridDim.y; ++y)
      for (unsigned x = 0; x < gridDim.x; ++x) {
        blockIdx = last_first ? dim3(grid.x - 1 - x, grid.y - 1 - y, grid.z - 1 - z) : dim3(x, y, z);
        run_block(shared_bytes);
      }
}

using Work = std::vector<std::function<void()>>;
struct Stream {
  std::deque<std::function<void()>> pending;
  int64_t given = 0;  // acts so far, those that were done included
  Work* captured = nullptr;
  void sync(int64_t until) {  // does those before number `until`
    while (given - int64_t(pending.size()) < until && !pending.empty()) {
      const auto act = std::move(pending.front());
      pending.pop_front();
      act();
    }
  }
};
std::vector<Stream*> streams;
std::recursive_mutex device;  // held by the thread that uses the GPU
using Use = std::lock_guard<std::recursive_mutex>;

// Work on no stream is done at once.
void give(void* stream, std::function<void()> act) {
  const Use use(device);
  if (!stream) return act();
  auto* s = static_cast<Stream*>(stream);
  if (s->captured) return s->captured->push_back(std::move(act));
  s->pending.push_back(std::move(act));
  ++s->given;
}

int64_t held = 0, limit = int64_t(1) << 40;  // bytes of device memory
constexpr int most_shared = 227 * 1024;
int shared_limit = most_shared, capability_major = 9;
std::map<const void*, int> allowed;  // shared memory of each kernel, where it may have more than it may unasked
int allowances = 0;                  // how often that was said

}  // namespace

int device_attribute(cudaDeviceAttr attribute) {
  return attribute == cudaDevAttrComputeCapabilityMajor ? capability_major : int(shared_limit);
}
cudaError_t allow_shared(const void* kernel, int bytes) {
  if (bytes > most_shared) return cudaErrorInvalidValue;
  allowed[kernel] = bytes;
  ++allowances;
  return cudaSuccess;
}
cudaError_t run(const void* kernel, const cudaLaunchConfig_t& config, std::function<void()> body) {
  const int bytes = int(config.dynamicSmemBytes);
  if (bytes > (allowed.count(kernel) ? allowed[kernel] : 48 * 1024) || bytes > shared_limit)
    return cudaErrorInvalidValue;
  if (config.blockDim.x % 32 || (config.numAttrs && capability_major < 9)) return cudaErrorInvalidValue;
  const dim3 grid = config.gridDim, threads_of_block = config.blockDim;
  const size_t shared_bytes = config.dynamicSmemBytes;
  give(config.stream, [=, body = std::move(body)] { run_grid(grid, threads_of_block, shared_bytes, body); });
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
void memory_info(size_t* free, size_t* total) {
  *free = size_t(limit - held);
  *total = size_t(limit);
}

}  // namespace emulator

// What tests/emulated_cuda.py makes streams, memory and graphs of. Memory is freed in the order of a stream, and is NaN before and
// after its use.
using namespace emulator;
extern "C" {
void* host_stream() {
  const Use use(device);
  return streams.emplace_back(new Stream);
}
int64_t host_given(void* stream) {
  const Use use(device);
  return static_cast<Stream*>(stream)->given;
}
void host_sync(void* stream, int64_t until) {
  const Use use(device);
  static_cast<Stream*>(stream)->sync(until);
}
void host_sync_all() {
  const Use use(device);
  for (Stream* stream : streams) stream->sync(stream->given);
}
void host_copy(void* stream, void* dst, const void* src, int64_t bytes) {
  give(stream, [=] { std::memcpy(dst, src, size_t(bytes)); });
}
void host_fill(void* stream, void* dst, int value, int64_t bytes) {
  give(stream, [=] { std::memset(dst, value, size_t(bytes)); });
}
void host_begin_capture(void* stream) { static_cast<Stream*>(stream)->captured = new Work; }
void* host_end_capture(void* stream) { return std::exchange(static_cast<Stream*>(stream)->captured, nullptr); }
int64_t host_graph_size(void* graph) { return int64_t(static_cast<Work*>(graph)->size()); }
void host_launch_graph(void* graph, void* stream) {
  const Use use(device);
  for (const auto& act : *static_cast<Work*>(graph)) give(stream, act);
}
void host_delete_graph(void* graph) { delete static_cast<Work*>(graph); }
// Sets the bytes that are free, or all that there are; returns all of before.
int64_t host_limit_memory(int64_t free, int64_t all) { return std::exchange(limit, free ? held + free : all); }
// The shared memory of a block and the major number of the compute capability.
void host_limit_device(int shared_bytes, int major) {
  shared_limit = shared_bytes;
  capability_major = major;
}
void host_last_block_first(bool yes) { last_first = yes; }
int host_allowances() { return allowances; }
void* host_allocate(int64_t bytes) {
  const Use use(device);
  if (held + bytes > limit) return nullptr;
  held += bytes;
  void* p = std::aligned_alloc(256, size_t((bytes + 255) / 256 * 256));
  std::memset(p, 0xff, size_t(bytes));
  return p;
}
void host_free(void* stream, void* p, int64_t bytes) {
  give(stream, [=] {
    std::memset(p, 0xff, size_t(bytes));
    std::free(p);
    held -= bytes;
  });
}
}
