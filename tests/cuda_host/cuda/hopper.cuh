// The functions of csrc/cuda/hopper.cuh on the host, written from the instructions' documented layouts. Boxes land no sooner than somebody
// waits for their barrier, products are made no sooner than they are waited for, and then by all threads of a warpgroup together.
#pragma once
#include <cuda.h>

#include "cuda/ptx.cuh"

namespace pyllm::cuda {

struct alignas(8) Barrier {
  uint64_t state;
};

inline void make_barrier(Barrier* b, int arrivals) { emulator::make_barrier(b, arrivals); }
inline void publish_barriers() { emulator::publish_barriers(); }
inline void arrive_expecting(Barrier* b, int bytes) { emulator::arrive(b, bytes); }
inline void arrive_at(Barrier* b, int rank) { emulator::arrive(emulator::at_rank(b, rank), 0); }
inline void wait_for_phase(Barrier* b, int parity) { emulator::wait_for_phase(b, parity); }
inline int rank_in_cluster() { return emulator::rank(); }
inline void cluster_barrier() { emulator::cluster_barrier(); }

inline float4 load_from(const float* from, int rank) {
  return *static_cast<const float4*>(emulator::at_rank(const_cast<float*>(from), rank));
}

inline void load_box(void* to, const CUtensorMap* map, int column, int row, Barrier* b, int mask) {
  if (shared_address(to) % 1024) std::abort();  // pieces would be exchanged otherwise
  for (int rank = 0; mask >> rank; ++rank) {
    if (!(mask >> rank & 1)) continue;
    auto* there = static_cast<uint16_t*>(emulator::at_rank(to, rank));
    emulator::bring(emulator::at_rank(b, rank), map->box[0] * map->box[1] * 2, [=, map = *map] {
      for (int r = 0; r < map.box[1]; ++r)
        for (int k = 0; k < map.box[0]; ++k) {
          const bool inside = row + r < map.size[1] && column + k < map.size[0];
          there[r * 64 + (k / 8 ^ r % 8) * 8 + k % 8] = inside ? map.base[(row + r) * map.stride + column + k] : 0;
        }
    });
  }
}
inline void load_box(void* to, const CUtensorMap* map, int column, int row, Barrier* b) {
  load_box(to, map, column, row, b, 1 << emulator::rank());
}
inline void prefetch_map(const CUtensorMap*) {}
template <int>
void keep_registers() {}
template <int>
void take_registers() {}

inline void publish_writes() {}
inline void meet_threads(int number, int count) { emulator::meet_threads(number, count); }

inline uint64_t operand(const void* rows) {
  if (shared_address(rows) % 1024) std::abort();  // bits 49 to 51 would not be 0
  return uint64_t(shared_address(rows) >> 4 & 0x3fff) | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
inline uint64_t operand_by_columns(const void* rows, int box) { return operand(rows) | uint64_t(box >> 4) << 16; }
// What lies `offset` bytes behind an operand's begin, whose pieces are exchanged: bits 4 to 6 of an address with bits 7 to 9.
inline float operand_at(uint64_t operand, uint32_t offset) {
  if (operand >> 62 != 1) std::abort();
  uint32_t address = (uint32_t(operand & 0x3fff) << 4) + offset;
  address ^= (address >> 7 & 7) << 4;
  return to_float(*static_cast<const bf16*>(at_shared_address(address)));
}
// Element (row, k) of rows of k, and (k, column) of rows of columns.
inline float operand_element(uint64_t operand, int row, int k) {
  return operand_at(operand, row / 8 * (uint32_t(operand >> 32 & 0x3fff) << 4) + row % 8 * 128 + k * 2);
}
inline float operand_column(uint64_t operand, int k, int column) {
  const uint32_t groups = uint32_t(operand >> 32 & 0x3fff) << 4, boxes = uint32_t(operand >> 16 & 0x3fff) << 4;
  return operand_at(operand, k / 8 * groups + k % 8 * 128 + column / 64 * boxes + column % 64 * 2);
}
inline void wgmma_begin() { emulator::fence_products(); }
inline void wgmma_commit() { emulator::commit_products(); }
template <int pending>
void wgmma_wait() {
  emulator::wait_for_products(pending);
}
template <int tiles>
void wgmma_settle(float (&)[tiles][4]) {}

// A lane's sums of n columns: d (+)= rows x [g, g + 8][16 k] times w(column, k).
template <int n, class W>
void multiply_rows(float (&d)[n / 8][4], const float (&x)[2][16], bool add, W w) {
  for (int i = 0; i < n / 4; ++i) {  // of those columns that this lane has
    float values[16];
    for (int k = 0; k < 16; ++k) values[k] = w(i / 2 * 8 + int(threadIdx.x) % 4 * 2 + i % 2, k);
    for (int half = 0; half < 2; ++half) {
      float& sum = d[i / 2][half * 2 + i % 2];
      if (!add) sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += x[half][k] * values[k];
    }
  }
}

template <int n>
void wgmma(float (&d)[n / 8][4], uint64_t a, uint64_t b, bool add) {
  emulator::multiply_later([&d, a, b, add] {
    const int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    float x[2][16];
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < 16; ++k) x[half][k] = operand_element(a, row + half * 8, k);
    multiply_rows<n>(d, x, add, [b](int column, int k) { return operand_element(b, column, k); });
  });
}

template <int n>
void wgmma_of_rows(float (&d)[n / 8][4], const uint32_t (&a)[4], uint64_t b) {
  struct Registers {
    const uint32_t* of[32];
  };
  struct Mine {
    const uint32_t* a;
    Registers all;
  } mine{a, {}};
  emulator::warp_together(&mine, [](void* const* lanes) {
    for (int to = 0; to < 32; ++to)
      for (int from = 0; from < 32; ++from)
        static_cast<Mine*>(lanes[to])->all.of[from] = static_cast<Mine*>(lanes[from])->a;
  });
  emulator::multiply_later([&d, all = mine.all, b] {
    const int g = threadIdx.x % 32 / 4;
    float x[2][16];
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < 16; ++k)
        x[half][k] = to_float(bf16(all.of[g * 4 + k % 8 / 2][half + k / 8 * 2] >> k % 2 * 16));
    multiply_rows<n>(d, x, true, [b](int column, int k) { return operand_column(b, k, column); });
  });
}

}  // namespace pyllm::cuda
