// The functions of csrc/cuda/ptx.cuh on the host, written from the instructions' documented layouts.
#pragma once
#include <cuda_runtime.h>

namespace pyllm::cuda {

using bf16 = uint16_t;

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return __uint_as_float(uint32_t(x) << 16); }
inline uint32_t round_bf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t pack_bf16(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
inline unsigned char* shared_memory() { return emulator::shared(); }
// Shared memory begins at an address that is a multiple of 128, and not of 1,024.
inline uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const unsigned char*>(p) - emulator::shared()) + 128;
}
inline const void* at_shared_address(uint32_t address) { return emulator::shared() + address - 128; }

inline void copy16_async(void* dst, const void* src, bool valid) { emulator::copy_later(dst, src, valid); }
inline void commit_copies() { emulator::commit(); }
template <int pending>
void wait_copies() {
  emulator::wait(pending);
}
inline void wait_copies_but(int pending) { emulator::wait(pending); }

struct MatrixLoad {
  uint32_t* r;
  const void* row;
};
inline void load_8x8(uint32_t (&r)[4], const void* row, bool transposed) {
  MatrixLoad mine{r, row};
  emulator::warp_together(&mine, [transposed](void* const* lanes) {
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int lane = 0; lane < 32; ++lane)
        for (int j = 0; j < 2; ++j) {
          int i = lane / 4, k = lane % 4 * 2 + j;
          if (transposed) std::swap(i, k);
          const auto* from = static_cast<const bf16*>(static_cast<MatrixLoad*>(lanes[matrix * 8 + i])->row);
          uint32_t& to = static_cast<MatrixLoad*>(lanes[lane])->r[matrix];
          to = (to & (j ? 0xffffu : 0xffff0000u)) | uint32_t(from[k]) << (16 * j);
        }
  });
}
inline void load_matrices(uint32_t (&r)[4], const void* row) { load_8x8(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { load_8x8(r, row, true); }

struct MmaOperands {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaOperands mine{d, a, {b0, b1}};
  emulator::warp_together(&mine, [](void* const* lanes) {
    float a[16][16], b[8][16];
    for (int lane = 0; lane < 32; ++lane) {
      const auto& o = *static_cast<MmaOperands*>(lanes[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int r = 0; r < 4; ++r)
        for (int j = 0; j < 2; ++j) a[g + r % 2 * 8][2 * t + r / 2 * 8 + j] = to_float(bf16(o.a[r] >> (16 * j)));
      for (int r = 0; r < 2; ++r)
        for (int j = 0; j < 2; ++j) b[g][2 * t + r * 8 + j] = to_float(bf16(o.b[r] >> (16 * j)));
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int r = 0; r < 4; ++r) {
        const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
        float& sum = static_cast<MmaOperands*>(lanes[lane])->d[r];
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
      }
  });
}

inline void wait_for_earlier_kernels() {}
inline void let_later_kernels_start() {}

}  // namespace pyllm::cuda
