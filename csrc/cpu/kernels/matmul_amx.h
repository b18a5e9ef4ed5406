// The matmul's blocks on AMX tiles: bf16 x and weights, a step being 32 k.
//
// Four tiles of sums are in flight, enough to hide the latency of their products: 32 rows by 32 columns, or where there
// are at most 16 rows, these by the 64 columns of a panel. Rows are independent of each other in a tile, and every sum
// takes the same steps over k whatever the shape is.
#pragma once
#include "cpu/kernels/kernel.h"
#include "cpu/kernels/matmul_tile.h"

namespace pyllm::PYLLM_ISA {

#if PYLLM_HAS_AMX

using cpu::matmul_plan::kAmxRowStride;

constexpr int64_t kStepPairs = simd::kTileLines;       // pairs of k in a step
constexpr int64_t kAmxRows = 2 * simd::kTileLines;     // most rows in flight
constexpr int64_t kAmxColumns = 16;                    // of a tile
constexpr int64_t kAmxStep = 2 * kPanel * kStepPairs;  // bf16 weights of a panel in a step
constexpr int64_t kAmxXLine = 4 * kAmxRowStride,
                  kAmxWLine = 4 * kPanel;  // bytes between a tile's rows; of sums as of w

// The tiles of a worker, in the shape for a number of rows from 1 to kAmxRows. Sums are tiles 0 to 3.
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

// What to bring into the caches during a step, a quarter of it after each tile: tile loads that miss wait for one line
// after the other, and a burst of prefetches would hold them up.
//
// A stream of weights: the step after this one into the first cache, one further on into the second. Measured on
// Sapphire Rapids, one row, memory shared with others: 5.8 GB/s with one prefetch 8 KB ahead, 8.3 with both.
class FetchStream {
 public:
  explicit FetchStream(const uint16_t* w) : now_(reinterpret_cast<const char*>(w)) {}
  inline void quarter(int q) const {
    const char* p = now_ + q * (kBytes / 4);
#pragma GCC unroll 16
    for (int64_t line = 0; line < kBytes / 4; line += 64) {
      __builtin_prefetch(p + 4 * kBytes + line, 0, 2);
      __builtin_prefetch(p + kBytes + line, 0, 3);
    }
  }
  inline void step() { now_ += kBytes; }

 private:
  static constexpr int64_t kBytes = 2 * kAmxStep;
  const char* now_;
};

// What the next blocks will need: weights, and a part of x.
struct Coming {
  const char* w;
  int64_t w_bytes;
  const char* x;
  int64_t x_bytes;
};

// Brings that into the second cache, spread over a number of steps.
class FetchNext {
 public:
  FetchNext(Coming coming, int64_t steps)
      : w_(coming.w),
        x_(coming.x),
        w_quarter_(quarter_of(coming.w_bytes, steps)),
        x_quarter_(quarter_of(coming.x_bytes, steps)) {}
  inline void quarter(int q) const {
    for (int64_t line = 0; line < w_quarter_; line += 64) __builtin_prefetch(w_ + q * w_quarter_ + line, 0, 2);
    for (int64_t line = 0; line < x_quarter_; line += 64) __builtin_prefetch(x_ + q * x_quarter_ + line, 0, 2);
  }
  inline void step() {
    w_ += 4 * w_quarter_;
    x_ += 4 * x_quarter_;
  }

 private:
  static int64_t quarter_of(int64_t bytes, int64_t steps) { return round_up(bytes / (4 * (steps ? steps : 1)), 64); }
  const char *w_, *x_;
  int64_t w_quarter_, x_quarter_;
};

// The shapes: tile i of the sums starts at `offset(i)` in rows of kPanel, and step() multiplies 32 k.
struct AmxFlat {  // up to 16 rows, all columns
  static constexpr int64_t offset(int i) { return i * kAmxColumns; }
  template <class Fetch>
  static inline void step(const uint32_t* x, const uint16_t* w, const Fetch& fetch) {
    simd::tile_load<4>(x, kAmxXLine);
    simd::tile_load<5>(w, kAmxWLine);
    simd::tile_dot_bf16<0, 4, 5>();
    fetch.quarter(0);
    simd::tile_load<6>(w + 2 * kAmxColumns, kAmxWLine);
    simd::tile_dot_bf16<1, 4, 6>();
    fetch.quarter(1);
    simd::tile_load<7>(w + 4 * kAmxColumns, kAmxWLine);
    simd::tile_dot_bf16<2, 4, 7>();
    fetch.quarter(2);
    simd::tile_load<5>(w + 6 * kAmxColumns, kAmxWLine);
    simd::tile_dot_bf16<3, 4, 5>();
    fetch.quarter(3);
  }
};

// The weights of the following step, which stand in the second cache, are brought into the first as well: measured on a
// Sapphire Rapids core that is shared, 400 GFLOP/s without and 540 with; the same on one that is not.
struct AmxSquare {  // up to 32 rows, half the columns
  static constexpr int64_t offset(int i) { return i / 2 * simd::kTileLines * kPanel + i % 2 * kAmxColumns; }
  template <class Fetch>
  static inline void step(const uint32_t* x, const uint16_t* w, const Fetch& fetch) {
    simd::tile_load<4>(x, kAmxXLine);
    simd::tile_load<6>(w, kAmxWLine);
    simd::tile_dot_bf16<0, 4, 6>();
    following(w, 0, fetch);
    simd::tile_load<7>(w + 2 * kAmxColumns, kAmxWLine);
    simd::tile_dot_bf16<1, 4, 7>();
    following(w, 1, fetch);
    simd::tile_load<5>(x + simd::kTileLines * kAmxRowStride, kAmxXLine);
    simd::tile_dot_bf16<2, 5, 6>();
    following(w, 2, fetch);
    simd::tile_dot_bf16<3, 5, 7>();
    following(w, 3, fetch);
  }

 private:
  template <class Fetch>
  static inline void following(const uint16_t* w, int q, const Fetch& fetch) {
#pragma GCC unroll 4
    for (int64_t pair = 4 * q; pair < 4 * q + 4; ++pair) {
      __builtin_prefetch(w + kAmxStep + pair * 2 * kPanel, 0, 3);
      __builtin_prefetch(w + kAmxStep + pair * 2 * kPanel + 2 * kAmxColumns, 0, 3);
    }
    fetch.quarter(q);
  }
};

// sums (+)= x w^T for the rows and columns of one shape: `steps` whole steps, then one on `rest` unless that is null.
template <class Shape, class Fetch>
void amx_tile(float* sums, const uint32_t* x, const uint16_t* w, int64_t steps, const uint16_t* rest, bool first,
              Fetch& fetch) {
  if (first) {
    simd::tile_zero<0>();
    simd::tile_zero<1>();
    simd::tile_zero<2>();
    simd::tile_zero<3>();
  } else {
    simd::tile_load<0>(sums + Shape::offset(0), kAmxWLine);
    simd::tile_load<1>(sums + Shape::offset(1), kAmxWLine);
    simd::tile_load<2>(sums + Shape::offset(2), kAmxWLine);
    simd::tile_load<3>(sums + Shape::offset(3), kAmxWLine);
  }
  for (int64_t s = 0; s < steps; ++s, x += kStepPairs, w += kAmxStep, fetch.step()) Shape::step(x, w, fetch);
  if (rest) Shape::step(x, rest, fetch);
  simd::tile_store<0>(sums + Shape::offset(0), kAmxWLine);
  simd::tile_store<1>(sums + Shape::offset(1), kAmxWLine);
  simd::tile_store<2>(sums + Shape::offset(2), kAmxWLine);
  simd::tile_store<3>(sums + Shape::offset(3), kAmxWLine);
}

// One block of K for all rows: sums[rows][kPanel] (+)= x w^T over a panel, `pairs` of k deep; x is zero up to a whole
// step. Meanwhile what is coming is brought into the cache.
inline void multiply_block_amx(RowTiles& tiles, float* sums, const uint32_t* x, const uint16_t* w, int64_t rows,
                               int64_t pairs, bool first, Coming coming) {
  const int64_t steps = pairs / kStepPairs, left = pairs % kStepPairs;
  alignas(64) uint16_t copy[kAmxStep];
  if (left) {  // the weights end here
    std::memcpy(copy, w + steps * kAmxStep, size_t(left) * kAmxWLine);
    std::memset(copy + left * 2 * kPanel, 0, size_t(kStepPairs - left) * kAmxWLine);
  }
  const uint16_t* rest = left ? copy : nullptr;
  if (rows <= simd::kTileLines) {  // the time is that of reading the weights
    FetchStream fetch(w);
    tiles.shape(rows);
    amx_tile<AmxFlat>(sums, x, w, steps, rest, first, fetch);
    return;
  }
  FetchNext fetch(coming, 2 * steps * cpu::matmul_plan::divide_up(rows, kAmxRows));
  for (int64_t r = 0; r < rows; r += kAmxRows, sums += kAmxRows * kPanel, x += kAmxRows * kAmxRowStride) {
    const int64_t count = rows - r < kAmxRows ? rows - r : kAmxRows;
    tiles.shape(count);
    if (count <= simd::kTileLines) {
      amx_tile<AmxFlat>(sums, x, w, steps, rest, first, fetch);
      continue;
    }
    for (int64_t c = 0; c < kPanel; c += 2 * kAmxColumns)
      amx_tile<AmxSquare>(sums + c, x, w + 2 * c, steps, rest ? rest + 2 * c : nullptr, first, fetch);
  }
}

#else

constexpr int64_t kStepPairs = 1;
struct RowTiles {};

#endif

}  // namespace pyllm::PYLLM_ISA
