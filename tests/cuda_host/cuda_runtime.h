// As much of CUDA as the kernels use, on the host: every thread of a block is a coroutine, so that barriers, shuffles and the
// instructions of whole warps mean what they mean on a GPU. Blocks run one after the other. Shared memory starts as NaN, a copy that
// is under way lands no sooner than its thread waits for it, and a stream does nothing before somebody waits for it.
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

#define CUDART_VERSION 13000
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNotSupported = 801 };
inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : error == 1 ? "cudaErrorInvalidValue" : "cudaErrorNotSupported";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : error == 1 ? "invalid argument" : "operation not supported";
}
using cudaStream_t = void*;
enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
    struct {
      unsigned x, y, z;
    } clusterDim;
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
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0 };
enum { cudaEnableDefault = 0 };
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             unsigned long long flags, cudaDriverEntryPointQueryResult* result);
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulator {
int device_attribute(cudaDeviceAttr attribute);
cudaError_t allow_shared(const void* kernel, int bytes);
cudaError_t run(const void* kernel, const cudaLaunchConfig_t& config, std::function<void()> body);
unsigned char* shared();
void block_barrier();
// The last of a warp's lanes to come calls act(operands of all 32 lanes); then all go on.
void warp_together(void* mine, const std::function<void(void* const*)>& act);
void copy_later(void* dst, const void* src, bool valid);
void commit();
void wait(int pending);
// Blocks of a cluster, which run together: this one's number, and what lies at the same place in another's shared memory.
int rank();
void* at_rank(void* place, int rank);
void cluster_barrier();
// Barriers in shared memory; `land` puts bytes there that a barrier counts.
void make_barrier(void* barrier, int arrivals);
void publish_barriers();
void arrive(void* barrier, int bytes);
void bring(void* barrier, int bytes, std::function<void()> land);
void wait_for_phase(void* barrier, int parity);
// Products of a warpgroup.
void meet_threads(int number, int count);
void fence_products();
void multiply_later(std::function<void()> act);
void commit_products();
void wait_for_products(int pending);
void memory_info(size_t* free, size_t* total);
}  // namespace emulator

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  emulator::memory_info(free, total);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = emulator::device_attribute(attribute);
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  return emulator::allow_shared(kernel, bytes);
}
template <class... Parameters, class... Values>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Values&... values) {
  return emulator::run(reinterpret_cast<const void*>(kernel), *config, [=] { kernel(values...); });
}

// A GPU of 128 multiprocessors, each of which takes one block.
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t* config) {
  *clusters = 128 / int(config->attrs[0].val.clusterDim.x);
  return cudaSuccess;
}

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp() {
  emulator::warp_together(nullptr, [](void* const*) {});
}
inline void __threadfence() {}
template <class T>
T atomicAdd(T* p, T by) {
  const T before = *p;
  *p += by;
  return before;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
inline float __uint_as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t __float_as_uint(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}
inline double cospi(double x) { return std::cos(std::fmod(x, 2.0) * M_PI); }
inline double sinpi(double x) { return std::sin(std::fmod(x, 2.0) * M_PI); }
// Lane i gets the value of lane from(i).
template <class T>
T shuffle(T value, int (*from)(int lane, int by), int by) {
  struct {
    T in, out;
    int from;
  } mine{value, value, from(int(threadIdx.x % 32), by)};
  emulator::warp_together(&mine, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      auto* to = static_cast<decltype(mine)*>(lanes[i]);
      to->out = static_cast<decltype(mine)*>(lanes[to->from])->in;
    }
  });
  return mine.out;
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return shuffle<T>(value, [](int lane, int by) { return lane ^ by; }, mask);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int by) {
  return shuffle<T>(value, [](int lane, int by) { return lane < by ? lane : lane - by; }, by);
}
