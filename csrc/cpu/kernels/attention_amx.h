// Both products of attention on AMX tiles: a step is 32 channels or 32 tokens. Rows are independent of each other in a
// tile, so one row or sixteen give the same sums.
#pragma once
#include "cpu/kernels/attention_tile.h"

namespace pyllm::PYLLM_ISA {

#if PYLLM_HAS_AMX

// The tiles of a worker, in the shape for a number of rows up to simd::kTileLines: 0 to 3 are sums, 4 is of queries or
// weights, 6 and 7 of keys or values.
class StripTiles {
 public:
  void shape(int64_t rows) {
    if (rows == rows_) return;
    rows_ = rows;
    const auto lines = uint8_t(rows);
    tiles_.shape({lines, lines, lines, lines, lines, 0, simd::kTileLines, simd::kTileLines});
  }

 private:
  simd::Tiles tiles_;
  int64_t rows_ = 0;
};

// Bytes to bring into the second cache while tiles are multiplied, a part of it after each: a burst of prefetches would
// hold up the loads.
class PageAhead {
 public:
  PageAhead(const void* next, int64_t bytes, int64_t products)
      : next_(static_cast<const char*>(next)), part_(products ? round_up((bytes + products - 1) / products, 64) : 0) {}
  inline void part() {
    for (const char* end = next_ + part_; next_ < end; next_ += 64) __builtin_prefetch(next_, 0, 2);
  }

 private:
  const char* next_;
  int64_t part_;
};

constexpr int64_t kAmxGroup = 16, kAmxPairs = simd::kTileLines;  // columns of a tile; pairs of a step

template <int Sum>
inline void amx_group(const uint16_t* w, int64_t line_bytes, PageAhead& ahead) {
  constexpr int kOperand = 6 + Sum % 2;
  simd::tile_load<kOperand>(w, line_bytes);
  simd::tile_dot_bf16<Sum, 4, kOperand>();
  ahead.part();
}

// c[rows][16 * groups] (+)= x w for up to four groups of columns; x is bf16, rows x_stride apart and zero up to whole
// steps. `pairs` of w's step lines are used; where they are no whole steps, the rest is taken from a copy filled with 0.
inline void amx_product(int groups, float* c, int64_t c_stride, const uint16_t* x, int64_t x_stride,
                        PageOperand<uint16_t> w, int64_t pairs, bool fresh, PageAhead& ahead) {
  const int64_t c_line = c_stride * 4, x_line = x_stride * 2;
  if (fresh) {
    simd::tile_zero<0>();
    simd::tile_zero<1>();
    simd::tile_zero<2>();
    simd::tile_zero<3>();
  } else {
    simd::tile_load<0>(c, c_line);
    if (groups > 1) simd::tile_load<1>(c + kAmxGroup, c_line);
    if (groups > 2) simd::tile_load<2>(c + 2 * kAmxGroup, c_line);
    if (groups > 3) simd::tile_load<3>(c + 3 * kAmxGroup, c_line);
  }
  alignas(64) uint16_t rest[4 * kAmxPairs * 2 * kAmxGroup];
  for (int64_t p = 0; p < pairs; p += kAmxPairs) {
    const uint16_t* from = w.data + p * w.step;
    int64_t group = w.group, line = w.step;
    if (pairs - p < kAmxPairs) {
      std::memset(rest, 0, sizeof rest);
      for (int g = 0; g < groups; ++g)
        for (int64_t i = 0; i < pairs - p; ++i)
          std::memcpy(rest + (g * kAmxPairs + i) * 2 * kAmxGroup, from + g * group + i * line, 4 * kAmxGroup);
      from = rest;
      line = 2 * kAmxGroup;
      group = kAmxPairs * line;
    }
    simd::tile_load<4>(x + 2 * p, x_line);
    amx_group<0>(from, 2 * line, ahead);
    if (groups > 1) amx_group<1>(from + group, 2 * line, ahead);
    if (groups > 2) amx_group<2>(from + 2 * group, 2 * line, ahead);
    if (groups > 3) amx_group<3>(from + 3 * group, 2 * line, ahead);
  }
  simd::tile_store<0>(c, c_line);
  if (groups > 1) simd::tile_store<1>(c + kAmxGroup, c_line);
  if (groups > 2) simd::tile_store<2>(c + 2 * kAmxGroup, c_line);
  if (groups > 3) simd::tile_store<3>(c + 3 * kAmxGroup, c_line);
}

// The same for groups [first, last), of any number.
inline void amx_products(int first, int last, float* c, int64_t c_stride, const uint16_t* x, int64_t x_stride,
                         PageOperand<uint16_t> w, int64_t pairs, bool fresh, PageAhead& ahead) {
  for (int g = first; g < last; g += 4)
    amx_product(last - g < 4 ? last - g : 4, c + g * kAmxGroup, c_stride, x, x_stride,
                {w.data + g * w.group, w.group, w.step}, pairs, fresh, ahead);
}

#else

struct StripTiles {};

#endif

}  // namespace pyllm::PYLLM_ISA
