// AMX: eight tiles of up to 16 rows of 64 bytes, and the product of two of them.
//
// Written as assembly: gcc 12's own tile loads do not tell the compiler that they read memory.
#pragma once

namespace pyllm::PYLLM_ISA::simd {

constexpr int kTiles = 8;
constexpr int kTileLines = 16;  // most rows of a tile, each of 16 floats or 32 bf16

// Owns the thread's tiles: none is configured before the first shape() or after its end, so that nobody else pays for
// saving them. Tile i of a shape has lines[i] rows of 64 bytes; 0: it is not used.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() {
    if (configured_) __asm__ volatile("tilerelease" ::: "memory");
  }

  // The tiles' contents are zero afterwards.
  void shape(const uint8_t (&lines)[kTiles]) {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t line_bytes[16] = {};
      uint8_t lines[16] = {};
    } config;
    static_assert(sizeof config == 64);
    for (int i = 0; i < kTiles; ++i) {
      config.lines[i] = lines[i];
      config.line_bytes[i] = lines[i] ? 64 : 0;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
    configured_ = true;
  }

 private:
  bool configured_ = false;
};

template <int Tile>
static inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(Tile));
}

// Rows `stride` bytes apart.
template <int Tile>
static inline void tile_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(Tile) : "memory");
}

template <int Tile>
static inline void tile_store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(Tile) : "memory");
}

// Acc[r][c] += sum over k of X[r][k] * W[k / 2][c][k % 2]: float sums of bf16 products, denormals taken for zero. Each
// row by itself, in an order that depends on nothing.
template <int Acc, int X, int W>
static inline void tile_dot_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Acc), "i"(X), "i"(W));
}

}  // namespace pyllm::PYLLM_ISA::simd
