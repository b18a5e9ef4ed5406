// The instructions of Hopper that its products and its attention are made of: barriers in shared memory, tiles that the copy engine brings by itself
// (TMA), and products of a warpgroup (wgmma). One function each, of which tests/cuda_host/cuda/hopper.cuh is the counterpart on the host.
// Only code that is compiled for sm_90a has them: elsewhere a kernel that calls one traps.
#pragma once
#include <cuda.h>

#include "cuda/ptx.cuh"

namespace pyllm::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PYLLM_SM90A(...) __VA_ARGS__
#else
#define PYLLM_SM90A(...) __trap()
#endif

// A barrier in shared memory. A phase ends when as many threads as it was made for have arrived and all announced bytes have landed; the
// phases' parities are 0, 1, 0, ...
struct alignas(8) Barrier {
  uint64_t state;
};

__device__ __forceinline__ void make_barrier(Barrier* b, int arrivals) {
  PYLLM_SM90A(
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory"));
}
// Made barriers are seen by the cluster and by the copy engine.
__device__ __forceinline__ void publish_barriers() {
  PYLLM_SM90A(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"));
}
// Arrives, and announces bytes that will land in this phase.
__device__ __forceinline__ void arrive_expecting(Barrier* b, int bytes) {
  PYLLM_SM90A(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)),
                           "r"(bytes) : "memory"));
}
// Arrives at the barrier that block `rank` of the cluster has at the same place, which tells its threads no more than that: products that
// were waited for have read what they read, and a scope beyond the block's would fence all of memory each time.
__device__ __forceinline__ void arrive_at(Barrier* b, int rank) {
  PYLLM_SM90A(
      asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
                   "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(b)),
                   "r"(rank) : "memory"));
}
// Waits for the end of the phase of this parity; of the phase before the first, parity 1, that has ended already.
__device__ __forceinline__ void wait_for_phase(Barrier* b, int parity) {
  PYLLM_SM90A(
      asm volatile("{\n.reg .pred done;\nagain:\n"
                   "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                   "@done bra over;\nbra again;\nover:\n}" ::"r"(shared_address(b)),
                   "r"(parity) : "memory"));
}

__device__ __forceinline__ int rank_in_cluster() {
  uint32_t rank = 0;
  PYLLM_SM90A(asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank)));
  return int(rank);
}
__device__ __forceinline__ void cluster_barrier() {
  PYLLM_SM90A(asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" :: : "memory"));
}

// Four floats from the place where block `rank` of the cluster has what is at `from` here.
__device__ __forceinline__ float4 load_from(const float* from, int rank) {
  float4 v{};
  PYLLM_SM90A(
      asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %4, %5;\n"
                   "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n}" : "=f"(v.x),
                   "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(shared_address(from)), "r"(rank) : "memory"));
  return v;
}

// Brings the box at (column, row) of a tensor to shared memory, 16-byte piece c of its row r at c ^ (r % 8), zeros past the tensor's ends;
// its bytes land at `b`. With a mask it comes to the same places of all blocks of the cluster whose bit is set.
__device__ __forceinline__ void load_box(void* to, const CUtensorMap* map, int column, int row, Barrier* b) {
  PYLLM_SM90A(
      asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
                   "[%4];" ::"r"(shared_address(to)),
                   "l"(map), "r"(column), "r"(row), "r"(shared_address(b)) : "memory"));
}
__device__ __forceinline__ void load_box(void* to, const CUtensorMap* map, int column, int row, Barrier* b, int mask) {
  PYLLM_SM90A(
      asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                   ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
                   "l"(map), "r"(column), "r"(row), "r"(shared_address(b)), "h"(uint16_t(mask)) : "memory"));
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  PYLLM_SM90A(asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"));
}

// Gives registers back, or waits for more of them: a warpgroup's threads have `count` each afterwards.
template <int count>
__device__ __forceinline__ void keep_registers() {
  PYLLM_SM90A(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count)));
}
template <int count>
__device__ __forceinline__ void take_registers() {
  PYLLM_SM90A(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count)));
}

// Operands of wgmma in shared memory, boxes of rows of 64 bf16 (128 bytes) as load_box leaves them from a multiple of 1,024 bytes on. Bits
// 0-13 of a description: address / 16; 32-45: bytes from 8 rows to the next / 16; 62-63: 1, pieces at c ^ (r % 8).
// Rows of 64 k, for one product of 16 k after the other: 16 k further are 2 more.
__device__ __forceinline__ uint64_t operand(const void* rows) {
  return uint64_t(shared_address(rows) >> 4 & 0x3fff) | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
// 16 rows, each one k of 64 columns; the next 64 columns `box` bytes further (bits 16-29).
__device__ __forceinline__ uint64_t operand_by_columns(const void* rows, int box) {
  return operand(rows) | uint64_t(box >> 4) << 16;
}
// What this thread wrote to shared memory by itself is seen by products and boxes.
__device__ __forceinline__ void publish_writes() {
  PYLLM_SM90A(asm volatile("fence.proxy.async.shared::cta;" :: : "memory"));
}
// A barrier of `count` threads of a block: those that name the same number, 1 to 15.
__device__ __forceinline__ void meet_threads(int number, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(count) : "memory");
}
__device__ __forceinline__ void wgmma_begin() { PYLLM_SM90A(asm volatile("wgmma.fence.sync.aligned;" :: : "memory")); }
__device__ __forceinline__ void wgmma_commit() {
  PYLLM_SM90A(asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory"));
}
// Waits until at most `pending` groups of this warpgroup's products are under way.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  PYLLM_SM90A(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory"));
}
// Sums are as products have left them from here on, not before.
template <int tiles>
__device__ __forceinline__ void wgmma_settle(float (&d)[tiles][4]) {
#pragma unroll
  for (int i = 0; i < tiles * 4; ++i) asm volatile("" : "+f"(d[i / 4][i % 4])::"memory");
}

// d[64, n] = a[64, 16] b[n, 16]^T, added to d where `add`, by the 128 threads of a warpgroup. Warp w of them has rows 16 w to 16 w + 15, and
// of 8 columns each d[j] as in mma_bf16 (cuda/ptx.cuh).
template <int n>
__device__ __forceinline__ void wgmma(float (&d)[n / 8][4], uint64_t a, uint64_t b, bool add);

// d[64, n] += a[64, 16] b[16, n], a in registers as in mma_bf16; they stay as they are until the product was waited for.
template <int n>
__device__ __forceinline__ void wgmma_of_rows(float (&d)[n / 8][4], const uint32_t (&a)[4], uint64_t b);

#define PYLLM_TILE(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define PYLLM_TILES4(d, i) PYLLM_TILE(d, i), PYLLM_TILE(d, i + 1), PYLLM_TILE(d, i + 2), PYLLM_TILE(d, i + 3)
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
template <>
__device__ __forceinline__ void wgmma<128>(float (&d)[16][4], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, p, 1, 1, 0, 0;\n}"
      : PYLLM_TILES4(d, 0), PYLLM_TILES4(d, 4), PYLLM_TILES4(d, 8), PYLLM_TILES4(d, 12)
      : "l"(a), "l"(b), "r"(int(add)));
}
template <>
__device__ __forceinline__ void wgmma<192>(float (&d)[24][4], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
      "}, %96, %97, p, 1, 1, 0, 0;\n}"
      : PYLLM_TILES4(d, 0), PYLLM_TILES4(d, 4), PYLLM_TILES4(d, 8), PYLLM_TILES4(d, 12), PYLLM_TILES4(d, 16),
        PYLLM_TILES4(d, 20)
      : "l"(a), "l"(b), "r"(int(add)));
}
template <>
__device__ __forceinline__ void wgmma<256>(float (&d)[32][4], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
      "}, %128, %129, p, 1, 1, 0, 0;\n}"
      : PYLLM_TILES4(d, 0), PYLLM_TILES4(d, 4), PYLLM_TILES4(d, 8), PYLLM_TILES4(d, 12), PYLLM_TILES4(d, 16),
        PYLLM_TILES4(d, 20), PYLLM_TILES4(d, 24), PYLLM_TILES4(d, 28)
      : "l"(a), "l"(b), "r"(int(add)));
}
template <>
__device__ __forceinline__ void wgmma_of_rows<64>(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
      : PYLLM_TILES4(d, 0), PYLLM_TILES4(d, 4)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <>
__device__ __forceinline__ void wgmma_of_rows<128>(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
      : PYLLM_TILES4(d, 0), PYLLM_TILES4(d, 4), PYLLM_TILES4(d, 8), PYLLM_TILES4(d, 12)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#else
template <int n>
__device__ __forceinline__ void wgmma(float (&)[n / 8][4], uint64_t, uint64_t, bool) {
  __trap();
}
template <int n>
__device__ __forceinline__ void wgmma_of_rows(float (&)[n / 8][4], const uint32_t (&)[4], uint64_t) {
  __trap();
}
#endif
#undef PYLLM_TILE
#undef PYLLM_TILES4
#undef PYLLM_SM90A

}  // namespace pyllm::cuda
