// The matmul's blocks on AMX tiles: bf16 x and weights, one step being 32 k.
//
// Four tiles of sums are in flight, enough to hide the latency of their products: 32 rows by 32 columns, or where there
// are at most 16 rows, these by the 64 columns of a panel. Rows are independent of each other in a tile, and every sum
// takes the same steps over k whatever the tile's shape is.
#pragma once
#include "cpu/kernels/kernel.h"
#include "cpu/kernels/matmul_tile.h"

namespace pyllm::PYLLM_ISA {

#if PYLLM_HAS_AMX

constexpr int64_t kStepPairs = simd::kTileLines;    // steps of the pass are pairs of k; it takes so many at once
constexpr int64_t kAmxPairs = simd::kTileLines;     // pairs of k in a step
constexpr int64_t kAmxRows = 2 * simd::kTileLines;  // most rows in flight
constexpr int64_t kAmxStepWeights = 2 * kPanel * kAmxPairs;  // bf16 elements of a panel in a step
constexpr int64_t kAmxStepBytes = 2 * kAmxStepWeights;
constexpr int64_t kAmxXRow = 4 * kRowStride, kAmxWRow = 4 * kPanel;  // bytes between a tile's rows
constexpr int64_t kAmxAhead = 8192;  // bytes that the prefetching of a stream of weights runs ahead

// The tiles of a worker in the shape for a number of rows, 1 to kAmxRows. Sums are tiles 0 to 3.
class RowTiles {
 public:
  void shape(int64_t rows) {
    if (rows == rows_) return;
    rows_ = rows;
    const auto low = uint8_t(rows < kFull ? rows : kFull), high = uint8_t(rows - low);
    if (high == 0)
      tiles_.shape({low, low, low, low, low, kFull, kFull, kFull});
    else
      tiles_.shape({low, low, high, high, low, high, kFull, kFull});
  }

 private:
  static constexpr uint8_t kFull = simd::kTileLines;
  simd::Tiles tiles_;
  int64_t rows_ = 0;
};

// How the four tiles of sums lie: kColumns columns wide, tile i from `offset(i)` on.
struct AmxFlat {
  static constexpr int64_t kColumns = kPanel;
  static constexpr int64_t offset(int i) { return i * 16; }
  static inline void step(const uint32_t* x, const uint16_t* w) {
    simd::tile_load<4>(x, kAmxXRow);
    simd::tile_load<5>(w, kAmxWRow);
    simd::tile_dot_bf16<0, 4, 5>();
    simd::tile_load<6>(w + 32, kAmxWRow);
    simd::tile_dot_bf16<1, 4, 6>();
    simd::tile_load<7>(w + 64, kAmxWRow);
    simd::tile_dot_bf16<2, 4, 7>();
    simd::tile_load<5>(w + 96, kAmxWRow);
    simd::tile_dot_bf16<3, 4, 5>();
  }
};

struct AmxSquare {
  static constexpr int64_t kColumns = kPanel / 2;
  static constexpr int64_t offset(int i) { return i / 2 * simd::kTileLines * kPanel + i % 2 * 16; }
  static inline void step(const uint32_t* x, const uint16_t* w) {
    simd::tile_load<4>(x, kAmxXRow);
    simd::tile_load<6>(w, kAmxWRow);
    simd::tile_dot_bf16<0, 4, 6>();
    simd::tile_load<7>(w + 32, kAmxWRow);
    simd::tile_dot_bf16<1, 4, 7>();
    simd::tile_load<5>(x + simd::kTileLines * kRowStride, kAmxXRow);
    simd::tile_dot_bf16<2, 5, 6>();
    simd::tile_dot_bf16<3, 5, 7>();
  }
};

// sums (+)= x w^T for the rows and columns of one shape: `steps` whole steps, then one on `rest` unless that is null.
// Every step asks for `ahead.advance` bytes of what comes next.
template <class Shape>
void amx_tile(float* sums, const uint32_t* x, const uint16_t* w, int64_t steps, const uint16_t* rest, bool first,
              Ahead ahead) {
  constexpr int64_t kRow = kPanel * 4;
  if (first) {
    simd::tile_zero<0>();
    simd::tile_zero<1>();
    simd::tile_zero<2>();
    simd::tile_zero<3>();
  } else {
    simd::tile_load<0>(sums + Shape::offset(0), kRow);
    simd::tile_load<1>(sums + Shape::offset(1), kRow);
    simd::tile_load<2>(sums + Shape::offset(2), kRow);
    simd::tile_load<3>(sums + Shape::offset(3), kRow);
  }
  for (int64_t s = 0; s < steps; ++s, x += kAmxPairs, w += kAmxStepWeights) {
    for (int64_t line = 0; line < ahead.advance; line += 64) __builtin_prefetch(ahead.next + line, 0, 2);
    ahead.next += ahead.advance;
    Shape::step(x, w);
  }
  if (rest) Shape::step(x, rest);
  simd::tile_store<0>(sums + Shape::offset(0), kRow);
  simd::tile_store<1>(sums + Shape::offset(1), kRow);
  simd::tile_store<2>(sums + Shape::offset(2), kRow);
  simd::tile_store<3>(sums + Shape::offset(3), kRow);
}

// One block of K for all rows: sums[rows][kPanel] (+)= x w^T over a panel, `pairs` of k deep; x is zero up to a whole
// step. Meanwhile the next block is brought into the cache.
inline void multiply_block_amx(RowTiles& tiles, float* sums, const uint32_t* x, const uint16_t* w, int64_t rows,
                               int64_t pairs, bool first, const char* next, int64_t next_bytes) {
  const int64_t steps = pairs / kAmxPairs, left = pairs % kAmxPairs;
  alignas(64) uint16_t rest[kAmxStepWeights];
  if (left) {  // a copy, as the weights end here
    std::memcpy(rest, w + steps * kAmxStepWeights, size_t(left) * kAmxWRow);
    std::memset(rest + left * 2 * kPanel, 0, size_t(kAmxPairs - left) * kAmxWRow);
  }
  const uint16_t* end = left ? rest : nullptr;
  if (rows <= simd::kTileLines) {  // the time is that of reading the weights
    tiles.shape(rows);
    amx_tile<AmxFlat>(sums, x, w, steps, end, first, {reinterpret_cast<const char*>(w) + kAmxAhead, kAmxStepBytes});
    return;
  }
  const int64_t row_tiles = cpu::matmul_plan::divide_up(rows, kAmxRows);
  const int64_t share = round_up(next_bytes / (row_tiles * (kPanel / AmxSquare::kColumns) * (steps + 1)), 64);
  for (int64_t c = 0; c < kPanel; c += AmxSquare::kColumns) {
    for (int64_t r = 0; r < rows; r += kAmxRows, next += share * steps) {
      const int64_t count = rows - r < kAmxRows ? rows - r : kAmxRows;
      tiles.shape(count);
      const Ahead ahead{next, share};
      const uint16_t* tail = end ? end + 2 * c : nullptr;
      float* out = sums + r * kPanel + c;
      const uint32_t* in = x + r * kRowStride;
      if (count > simd::kTileLines)
        amx_tile<AmxSquare>(out, in, w + 2 * c, steps, tail, first, ahead);
      else if (c == 0)
        amx_tile<AmxFlat>(out, in, w, steps, end, first, ahead);
    }
  }
}

#else

constexpr int64_t kStepPairs = 1;
struct RowTiles {};

#endif

}  // namespace pyllm::PYLLM_ISA
