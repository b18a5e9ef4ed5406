// Coroutines for the threads of a block, and what they wait for; streams that run nothing before somebody waits.
#include <cuda.h>
#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
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
  std::vector<std::function<void()>> open_products;
  std::deque<std::vector<std::function<void()>>> products;  // under way
  bool fenced = false;  // registers that products may use
};
struct Block {
  dim3 index;
  std::unique_ptr<unsigned char[]> memory;
  unsigned char* base;
  Meeting all, some[16];  // the numbered barriers of part of the threads
};
struct Barrier {
  int size = 0, arrived = 0, parity = 0;
  int64_t bytes = 0;  // announced and not yet landed
  bool published = false;
  struct Box {
    int bytes;
    std::function<void()> land;
  };
  std::vector<Box> under_way;
};

jmp_buf scheduler;
std::vector<Thread> threads;
std::vector<Meeting> warps, warpgroups;
std::vector<Block> blocks;  // of the cluster that runs
Meeting cluster;
std::map<void*, Barrier> barriers;
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
  t.stack.reset(new unsigned char[kStackBytes]);
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

Block& block() { return blocks[current / blockDim.x]; }

// Runs `count` neighbours along x, of which the first has the index `first`.
void run_cluster(dim3 first, unsigned count, size_t shared_bytes) {
  blocks.clear();
  barriers.clear();
  for (unsigned i = 0; i < count; ++i) {
    Block b{dim3(first.x + i, first.y, first.z), std::make_unique<unsigned char[]>(shared_bytes + 128), nullptr,
            Meeting{blockDim.x}};
    b.base = b.memory.get() + (128 - reinterpret_cast<uintptr_t>(b.memory.get()) % 128) % 128;
    std::memset(b.base, 0xff, shared_bytes);
    blocks.push_back(std::move(b));
  }
  const unsigned size = blockDim.x * count;
  if (threads.size() < size) threads.resize(size);
  warps.assign(size / 32, Meeting{32});
  warpgroups.assign((size + 127) / 128, Meeting{128});
  cluster = Meeting{size};
  for (unsigned i = 0; i < size; ++i) {
    threads[i].done = false;
    threads[i].open.clear();
    threads[i].groups.clear();
    threads[i].open_products.clear();
    threads[i].products.clear();
    threads[i].fenced = false;
  }
  for (unsigned left = size; left;) {
    progress = false;
    for (current = 0; current < size; ++current) {
      if (threads[current].done) continue;
      threadIdx = dim3(current % blockDim.x, 0, 0);
      blockIdx = block().index;
      resume(threads[current]);
      if (threads[current].done) --left;
    }
    if (!progress && left) std::abort();  // not all threads came to a barrier
  }
  // Nothing lands in a block that has ended, and no product reads there.
  for (const auto& [place, barrier] : barriers)
    if (!barrier.under_way.empty()) std::abort();
  for (unsigned i = 0; i < size; ++i)
    if (!threads[i].products.empty() || !threads[i].open_products.empty()) std::abort();
}

void run_grid(dim3 grid, dim3 threads_of_block, unsigned size, size_t shared_bytes, const std::function<void()>& body) {
  gridDim = grid;
  blockDim = threads_of_block;
  kernel = &body;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; x += size)
        run_cluster(last_first ? dim3(grid.x - size - x, grid.y - 1 - y, grid.z - 1 - z) : dim3(x, y, z), size,
                    shared_bytes);
}

// Ends a barrier's phase where all have arrived and all bytes have landed.
void look(Barrier& b) {
  if (b.arrived < b.size || b.bytes) return;
  b.arrived = 0;
  b.parity ^= 1;
  progress = true;
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
int overlapping = 0;                 // launches that might start while the kernel before still runs

}  // namespace

int device_attribute(cudaDeviceAttr attribute) {
  if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) return shared_limit;
  return attribute == cudaDevAttrComputeCapabilityMajor ? capability_major : 0;
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
  unsigned size = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) size = config.attrs[i].val.clusterDim.x;
  for (unsigned i = 0; i < config.numAttrs; ++i)
    overlapping += config.attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization;
  if (config.numAttrs && capability_major < 9) return cudaErrorInvalidValue;
  if (config.blockDim.x % 32 || config.gridDim.x % size || size > 8) return cudaErrorInvalidValue;
  const dim3 grid = config.gridDim, threads_of_block = config.blockDim;
  const size_t shared_bytes = config.dynamicSmemBytes;
  give(config.stream, [=, body = std::move(body)] { run_grid(grid, threads_of_block, size, shared_bytes, body); });
  return cudaSuccess;
}

unsigned char* shared() { return block().base; }
void block_barrier() {
  meet(block().all, [] {});
}
int rank() { return int(current / blockDim.x); }
void* at_rank(void* place, int rank) {
  bool runs = false;
  for (unsigned i = 0; i < blockDim.x; ++i) runs |= !threads[unsigned(rank) * blockDim.x + i].done;
  if (!runs) std::abort();  // the memory of a block that has ended
  return blocks[unsigned(rank)].base + (static_cast<unsigned char*>(place) - block().base);
}
void cluster_barrier() {
  meet(cluster, [] {});
}
void make_barrier(void* barrier, int arrivals) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8) std::abort();
  barriers[barrier] = Barrier{arrivals};
}
void publish_barriers() {
  for (auto& [place, barrier] : barriers) barrier.published = true;
}
void arrive(void* barrier, int bytes) {
  Barrier& b = barriers.at(barrier);
  b.bytes += bytes;
  if (!b.published || b.bytes >= 1 << 20) std::abort();  // more bytes than a barrier counts
  if (++b.arrived > b.size) std::abort();
  progress = true;
  look(b);
}
void bring(void* barrier, int bytes, std::function<void()> land) {
  barriers.at(barrier).under_way.push_back({bytes, std::move(land)});
}
void wait_for_phase(void* barrier, int parity) {
  Barrier& b = barriers.at(barrier);
  if (!b.published) std::abort();
  for (;;) {
    const auto landing = std::move(b.under_way);
    b.under_way.clear();
    for (const auto& box : landing) {
      box.land();
      b.bytes -= box.bytes;
      progress = true;
    }
    if (!landing.empty()) look(b);
    if (b.parity != parity) return;
    pause();
  }
}
void meet_threads(int number, int count) {
  Meeting& m = block().some[number];
  m.size = unsigned(count);
  meet(m, [] {});
}
void fence_products() { threads[current].fenced = true; }
void multiply_later(std::function<void()> act) {
  if (!threads[current].fenced) std::abort();
  threads[current].open_products.push_back(std::move(act));
}
void commit_products() {
  Thread& t = threads[current];
  t.products.push_back(std::move(t.open_products));
  t.open_products.clear();
}
void wait_for_products(int pending) {
  Thread& t = threads[current];
  for (; int(t.products.size()) > pending; t.products.pop_front())
    for (const auto& act : t.products.front()) act();
  t.fenced = false;
  meet(warpgroups[current / 128], [] {});
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

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  if (std::string(name) != "cuTensorMapEncodeTiled") return cudaErrorInvalidValue;
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* base,
                                const cuuint64_t* size, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const bool aligned = reinterpret_cast<uintptr_t>(base) % 16 == 0 && strides[0] % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(map) % 64 == 0;
  const bool sized = size[0] > 0 && size[1] > 0 && size[0] <= 1ull << 32 && size[1] <= 1ull << 32 &&
                     strides[0] >= size[0] * 2 && strides[0] < 1ull << 40;
  if (rank != 2 || !aligned || !sized || box[0] != 64 || box[1] < 1 || box[1] > 256 || steps[0] != 1 || steps[1] != 1)
    return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const uint16_t*>(base),
          {int64_t(size[0]), int64_t(size[1])},
          int64_t(strides[0] / 2),
          {int(box[0]), int(box[1])}};
  return CUDA_SUCCESS;
}

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
int host_overlapping() { return overlapping; }
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
