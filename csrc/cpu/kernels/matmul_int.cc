// y = act(x W^T + bias) (* up) + residual over packed int8 and int4 weights.
//
// x is rounded to int8 first, a group of K at a time. A worker then takes some rows by some panels, as in matmul.cc: K is
// cut into blocks, and each block of a panel is multiplied with all those rows, a register tile at a time
// (matmul_int_tile.h); between blocks the float sums rest in the worker's scratch. Where there are many rows, int4
// weights are unpacked to bytes once per block.
#include "cpu/kernels/matmul_int.h"

#include <cmath>

#include "cpu/kernels/matmul_finish.h"
#include "cpu/kernels/matmul_int_tile.h"

namespace pyllm::PYLLM_ISA {
namespace {

constexpr int64_t kInlineRecords = 16384;   // elements of x below which rounding it on several threads costs more
constexpr int64_t kChunkBytes = 64 * 1024;  // of weights, at least, that a worker takes at a time
constexpr int64_t kStreamChunks = 8;        // per thread, at least, so that threads finish together: of few rows
constexpr int64_t kBlockChunks = 2;         // of many
constexpr int64_t kUnpackRows =
    2 * kNibbleRows + 1;                // from this many rows on, unpacking a block of int4 first is cheaper
constexpr int64_t kStreamRows = 64;     // up to so many rows weights come from memory no faster than they are used up
constexpr int64_t kStreamTiles = 3;     // up to so many, a tile asks for more lines than it has steps
constexpr int64_t kStreamAhead = 8192;  // bytes

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }
using plan::divide_up;

// One pass: at most plan::kMaxRows rows of the call, and how it goes over them.
struct Pass {
  const MatmulArgs& args;
  int64_t row, rows;
  bool streams;            // few rows: the time is that of reading the weights
  bool unpack;             // int4 weights become bytes a block at a time
  int32_t* x;              // records [blocks][rows][kIntStride]
  unsigned char* scratch;  // of all workers

  float* sums(int worker, int64_t slot) const {
    return reinterpret_cast<float*>(scratch + worker * (plan::sums_bytes(rows) + plan::unpacked_bytes())) +
           slot * plan::even_part(rows, plan::kRows) * kPanel;
  }
  uint8_t* unpacked(int worker) const { return reinterpret_cast<uint8_t*>(sums(worker, plan::kSlots)); }
};

// One group of a row of x: its bytes, its scale, and the sum of the bytes. A value that is not finite makes the scale
// NaN; one so small that its inverse would not be finite makes it 0.
struct RoundedGroup {
  float scale, total;
};
RoundedGroup round_group(int8_t* bytes, const float* x, int64_t count) {
  F largest = simd::zero(), probe = simd::zero(), total = simd::zero();
  for (int64_t k = 0; k < count; k += F::N) {
    const F v = load_up_to(x + k, int(least(F::N, count - k)));
    largest = max(largest, abs(v));
    probe = fma(v, simd::zero(), probe);
  }
  const float most = simd::max(largest);
  const bool finite = simd::sum(probe) == 0.0f;
  const float inverse = finite && most > 1e-30f ? 127.0f / most : 0.0f;
  if (!finite) {
    std::memset(bytes, 0, size_t(round_up(count, F::N)));
    return {std::nanf(""), 0.0f};
  }
  for (int64_t k = 0; k < count; k += F::N) {
    const F v = round(load_up_to(x + k, int(least(F::N, count - k))) * simd::set(inverse));
    simd::store_bytes(bytes + k, v);
    total = total + v;
  }
  return {inverse > 0.0f ? most / 127.0f : 0.0f, simd::sum(total)};
}

// Fills the records of x.
void round_x(const Pass& p, Parallel& pool) {
  const MatmulArgs& a = p.args;
  const int64_t blocks = divide_up(a.w.k, plan::kIntBlock), group = a.w.x_group();
  // What is still to be taken off every stored value: its zero, unless that varies, less what products take off.
  const bool nibbles = a.w.dtype == DType::i4;
  const int32_t zero = a.w.has_zeros ? 0 : nibbles ? 8 : 128, offset = zero - (nibbles ? 0 : simd::kByteOffset);
  auto convert = [&](int64_t chunk, int) {
    const int64_t b = chunk / p.rows, r = chunk % p.rows;
    int32_t* record = p.x + chunk * plan::kIntStride;
    auto* bytes = reinterpret_cast<int8_t*>(record);
    const float* x = a.x + (p.row + r) * a.x_stride + b * plan::kIntBlock;
    const int64_t count = least(plan::kIntBlock, a.w.k - b * plan::kIntBlock);
    if (count < plan::kIntBlock) std::memset(bytes, 0, plan::kIntBlock);
    for (int64_t g = 0; g * group < count; ++g) {
      const RoundedGroup rounded = round_group(bytes + g * group, x + g * group, least(group, count - g * group));
      const float total = 0.0f - rounded.total;
      record[plan::kIntStarts + g] = int32_t(total) * offset;
      std::memcpy(record + plan::kIntScales + g, &rounded.scale, sizeof(float));
      std::memcpy(record + plan::kIntTotals + g, &total, sizeof(float));
    }
  };
  if (p.rows * a.w.k < kInlineRecords) {
    for (int64_t c = 0; c < blocks * p.rows; ++c) convert(c, 0);
  } else {
    parallel_for(pool, blocks * p.rows, convert);
  }
}

// Int4 values of `count` padded k as bytes [count / 4][kPanel][4].
void unpack_values(uint8_t* out, const uint8_t* values, int64_t count) {
  constexpr int64_t kQuad = 4 * kPanel;
  for (int64_t k = 0; k < count; k += 8, out += 2 * kQuad, values += kQuad) {
    for (int64_t c = 0; c < kQuad; c += 4 * F::N) {
      const simd::I both = simd::load_bytes(values + c), low = low_nibbles(both), high = high_nibbles(both);
      std::memcpy(out + c, &low.v, sizeof low.v);
      std::memcpy(out + kQuad + c, &high.v, sizeof high.v);
    }
  }
}

// All columns of a panel for Rows rows.
template <class Step, int Rows, bool Scaled, int Lines>
void int_tile_panel(float* sums, const int32_t* x, const IntBlock& block, IntAhead ahead) {
  constexpr int64_t kColumns = int_vectors(Rows) * F::N;
  for (int64_t c = 0; c < kPanel; c += kColumns)
    int_tile<Step, Rows, Scaled, kColumns == kPanel || Lines == 1 ? Lines : 0>(sums + c, x, block, c, ahead);
}

// What will be needed after this block: the next one of weights, and a part of the next one of x.
struct Next {
  const char *w, *x;
  int64_t w_bytes, x_bytes;
};

using IntTile = void (*)(float*, const int32_t*, const IntBlock&, IntAhead);

// The tile for a number of rows that prefetches so many lines at each step: 0, 1, 2 or 4.
template <class Step, bool Scaled>
IntTile tile_of(int64_t rows, int lines) {
#define PYLLM_TILE(rows)                                                             \
  {                                                                                  \
    int_tile_panel<Step, rows, Scaled, 0>, int_tile_panel<Step, rows, Scaled, 1>,    \
        int_tile_panel<Step, rows, Scaled, 2>, int_tile_panel<Step, rows, Scaled, 4> \
  }
  static constexpr IntTile kTiles[][4] = {
      PYLLM_TILE(1), PYLLM_TILE(2), PYLLM_TILE(3), PYLLM_TILE(4),
#if PYLLM_HAS_VNNI
      PYLLM_TILE(5), PYLLM_TILE(6),
#endif
  };
#undef PYLLM_TILE
  static_assert(sizeof kTiles / sizeof kTiles[0] == kIntRows);
  return kTiles[rows - 1][lines == 4 ? 3 : lines];
}

// One block of K for all rows: sums[rows][kPanel] += x w^T. Meanwhile what is next is brought into the cache: by a single
// tile, which meets its weights in memory, what follows in the panel; else by each tile its share.
template <class Step>
void multiply_block(float* sums, const int32_t* x, const IntBlock& block, int64_t rows, const Next& next) {
  const int64_t tiles = divide_up(rows, Step::kRows), steps = greatest(1, block.k / 4 / Step::kQuads);
  const int lines = tiles == 1 ? 4 : tiles <= kStreamTiles ? 2 : 1;
  const int64_t bytes = next.w_bytes + next.x_bytes;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = rows * t / tiles, end = rows * (t + 1) / tiles, share = bytes * t / tiles;
    IntAhead ahead{share < next.w_bytes ? next.w + share : next.x + share - next.w_bytes,
                   divide_up(divide_up(bytes, tiles), steps)};
    if (tiles == 1) ahead = {reinterpret_cast<const char*>(block.values) + kStreamAhead, 64 * lines};
    const IntTile tile =
        block.scales ? tile_of<Step, true>(end - begin, lines) : tile_of<Step, false>(end - begin, lines);
    tile(sums + begin * kPanel, x + begin * plan::kIntStride, block, ahead);
  }
}

// What a worker takes at once: rows of the pass, from `row` on, by panels of each part.
struct Chunk {
  int64_t row, rows, panel, panels;
};

// Block `b` of K of a packed panel.
IntBlock block_of(const PackedView& w, const uint8_t* panel, int64_t b) {
  IntBlock block{};
  block.group = w.x_group();
  block.k = least(plan::kIntBlock, w.padded_k() - b * plan::kIntBlock);
  if (w.group == 0) {
    const uint8_t* scales = panel + w.values_bytes(w.padded_k());
    block.values = panel + b * w.values_bytes(plan::kIntBlock);
    block.values_stride = w.values_bytes(kRowGroup);
    block.zeros = w.has_zeros ? scales + kPanel * sizeof(float) : nullptr;
    return block;
  }
  const int64_t last = block.k / w.group, left = block.k % w.group;
  block.values = panel + b * (plan::kIntBlock / w.group) * w.group_bytes();
  block.values_stride = block.scales_stride = w.group_bytes();
  block.scales = block.values + w.values_bytes(w.group);
  block.zeros = w.has_zeros ? block.scales + kPanel * dtype_bytes(w.scale_dtype) : nullptr;
  block.last_group = last * w.group_bytes() - w.values_bytes(w.group) + w.values_bytes(left);
  block.half_scales = w.scale_dtype == DType::f16;
  return block;
}

// The sums of packed panels [begin, end), which are those of both parts in turn, into the worker's slots from `slot` on.
void multiply_panels(const Pass& p, const Chunk& chunk, int64_t begin, int64_t end, int64_t slot, int worker) {
  const PackedView& w = p.args.w;
  const auto* data = static_cast<const uint8_t*>(w.data);
  const int64_t blocks = divide_up(w.k, plan::kIntBlock), panel_bytes = w.panel_bytes();
  for (int64_t panel = begin; panel < end; ++panel)
    std::memset(p.sums(worker, slot + panel - begin), 0, size_t(chunk.rows * kPanel) * sizeof(float));
  for (int64_t b = 0; b < blocks; ++b) {
    const int32_t* x = p.x + (b * p.rows + chunk.row) * plan::kIntStride;
    // Each panel fetches its share of the next block of x, which for the last is the first one.
    const auto* next_x = reinterpret_cast<const char*>(b + 1 < blocks ? x + p.rows * plan::kIntStride
                                                                      : p.x + chunk.row * plan::kIntStride);
    const int64_t x_bytes = p.streams ? 0 : chunk.rows * plan::kIntStride * 4 / (end - begin);
    for (int64_t panel = begin; panel < end; ++panel) {
      IntBlock block = block_of(w, data + panel * panel_bytes, b);
      float* sums = p.sums(worker, slot + panel - begin);
      const int64_t bytes = w.values_bytes(block.k) + (w.group ? divide_up(block.k, w.group) * w.scales_bytes() : 0);
      Next next{reinterpret_cast<const char*>(block.values) + panel_bytes, next_x + (panel - begin) * x_bytes, bytes,
                x_bytes};
      if (panel + 1 == end && b + 1 < blocks)
        next.w = reinterpret_cast<const char*>(block_of(w, data + begin * panel_bytes, b + 1).values);
      if (w.dtype == DType::i8) {
        multiply_block<StepI8>(sums, x, block, chunk.rows, next);
      } else if (!p.unpack) {
        multiply_block<StepI4>(sums, x, block, chunk.rows, next);
      } else {
        uint8_t* bytes = p.unpacked(worker);
        for (int64_t k = 0, g = 0; k < block.k; k += block.group, ++g)
          unpack_values(bytes + k * kPanel, block.values + g * block.values_stride, least(block.group, block.k - k));
        block.values = bytes;
        block.values_stride = block.group * kPanel;
        multiply_block<StepUnpackedI4>(sums, x, block, chunk.rows, next);
      }
    }
  }
}

// The scales of whole rows at the end of a packed panel; null where groups have them.
const float* row_scales(const PackedView& w, int64_t panel) {
  if (w.group) return nullptr;
  const auto* data = static_cast<const uint8_t*>(w.data) + panel * w.panel_bytes();
  return reinterpret_cast<const float*>(data + w.values_bytes(w.padded_k()));
}

// Few rows take one panel after the other, so that its weights stream from memory in order; many take a block of K of
// all panels, which share the block of x.
void multiply_chunk(const Pass& p, const Chunk& chunk, int worker) {
  const MatmulArgs& a = p.args;
  const int64_t begin = chunk.panel * a.w.parts, end = begin + chunk.panels * a.w.parts;
  const int64_t width = p.streams ? 1 : end - begin;
  for (int64_t i = begin; i < end; i += width) multiply_panels(p, chunk, i, i + width, i - begin, worker);
  // Row by row, so that each is written from one end to the other: down a panel, every row is on another page.
  for (int64_t r = 0; r < chunk.rows; ++r)
    for (int64_t i = 0; i < chunk.panels; ++i)
      finish_panel(a, p.row + chunk.row + r, 1, chunk.panel + i, p.sums(worker, i * a.w.parts) + r * kPanel,
                   p.sums(worker, i * a.w.parts + 1) + r * kPanel, row_scales(a.w, (chunk.panel + i) * a.w.parts),
                   row_scales(a.w, (chunk.panel + i) * a.w.parts + a.w.parts - 1));
}

void multiply_rows(const MatmulArgs& a, int64_t row, int64_t rows, Parallel& pool) {
  auto* workspace = static_cast<unsigned char*>(a.workspace);
  const Pass p{a,
               row,
               rows,
               rows <= kStreamRows,
               a.w.dtype == DType::i4 && rows >= kUnpackRows,
               reinterpret_cast<int32_t*>(workspace),
               workspace + plan::int_x_bytes(rows, a.w.k)};
  round_x(p, pool);

  // Few rows: single panels (several where they are small), each of which streams from memory. Many rows: blocks of
  // rows by groups of panels that share a block of x. No larger than leaves every thread several chunks.
  const int64_t panels = a.w.panels(), most = plan::kSlots / a.w.parts;
  const int64_t chunk_rows = plan::even_part(rows, plan::kRows), row_chunks = divide_up(rows, chunk_rows);
  const int64_t wanted = p.streams ? kChunkBytes / (a.w.panel_bytes() * a.w.parts + 1) : most;
  const int64_t share = panels * row_chunks / ((p.streams ? kStreamChunks : kBlockChunks) * pool.threads());
  const int64_t group = greatest(1, least(least(wanted, most), share));
  const int64_t groups = divide_up(panels, group);
  parallel_for(pool, groups * row_chunks, [&](int64_t index, int worker) {
    const int64_t first = index / groups * chunk_rows, panel = index % groups * group;
    multiply_chunk(p, {first, least(chunk_rows, rows - first), panel, least(group, panels - panel)}, worker);
  });
}

}  // namespace

void matmul_int(const MatmulArgs& a, Parallel& pool) {
  const int64_t most = plan::even_part(a.rows, plan::kMaxRows);
  for (int64_t row = 0; row < a.rows; row += most) multiply_rows(a, row, least(most, a.rows - row), pool);
}

}  // namespace pyllm::PYLLM_ISA
