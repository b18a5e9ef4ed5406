// As much of CUDA as the kernels use, on the host: every thread of a block is a coroutine, so that barriers, shuffles and the
// instructions of whole warps mean what they mean on a GPU. Blocks run one after the other. Shared memory starts as NaN, and a
// copy that is under way lands no sooner than its thread waits for it.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 threadIdx, blockIdx, gridDim, blockDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace emulator {
constexpr size_t kSharedLimit = 227 * 1024;
cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& body);
unsigned char* shared();
void block_barrier();
// The last of a warp's lanes to come calls act(operands of all 32 lanes); then all go on.
void warp_together(void* mine, const std::function<void(void* const*)>& act);
void copy_later(void* dst, const void* src, bool valid);
void commit();
void wait(int pending);
}  // namespace emulator

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return size_t(bytes) <= emulator::kSharedLimit ? cudaSuccess : cudaErrorInvalidValue;
}
template <class... Parameters, class... Values>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Values&... values) {
  return emulator::run(*config, [&] { kernel(values...); });
}

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp() {
  emulator::warp_together(nullptr, [](void* const*) {});
}
inline void __threadfence() {}
inline uint32_t atomicAdd(uint32_t* p, uint32_t by) {
  const uint32_t before = *p;
  *p += by;
  return before;
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  struct {
    T in, out;
    int mask;
  } mine{value, value, mask};
  emulator::warp_together(&mine, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      auto* to = static_cast<decltype(mine)*>(lanes[i]);
      to->out = static_cast<decltype(mine)*>(lanes[i ^ to->mask])->in;
    }
  });
  return mine.out;
}
