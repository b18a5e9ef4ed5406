// y = act(x W^T + bias) (* up) + residual over packed int8 and int4 weights.
//
// x is rounded to int8 first, a block of K at a time. A worker then takes rows by a few panels: each block of K of a panel
// is multiplied with all those rows, a register tile at a time (matmul_int_tile.h); between blocks the float sums rest
// in the worker's scratch, and behind the last one a tile is finished at once. Where there are many rows, int4 weights
// are unpacked to bytes once per block.
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

// One pass: at most plan::kIntRows rows of the call, and how it goes over them.
struct Pass {
  const MatmulArgs& args;
  int64_t row, rows;
  bool streams;            // few rows: the time is that of reading the weights
  bool unpack;             // int4 weights become bytes a block at a time
  int32_t* x;              // records [blocks][rows][kIntStride]
  unsigned char* scratch;  // of all workers

  float* sums(int worker, int64_t slot) const {
    return reinterpret_cast<float*>(scratch + worker * (plan::int_sums_bytes(rows) + plan::unpacked_bytes())) +
           slot * rows * kPanel;
  }
  uint8_t* unpacked(int worker) const { return reinterpret_cast<uint8_t*>(sums(worker, plan::kIntSlots)); }
};

// `count` elements of a row of x, at most one block, as a record: bytes of the largest magnitude / 127, that scale, and of
// each group of the weights the sum of its bytes. A value that is not finite makes the scale NaN; one so small that its
// inverse would not be finite makes it 0. `zero` is what is still to be taken off every stored value.
void round_block(int32_t* record, const float* x, int64_t count, int64_t group, int32_t zero) {
  constexpr int kChains = 4;
  auto* bytes = reinterpret_cast<int8_t*>(record);
  auto part = [&](int64_t k) { return load_up_to(x + k, int(least(F::N, count - k))); };
  F largest[kChains], probe[kChains];
  for (int i = 0; i < kChains; ++i) largest[i] = probe[i] = simd::zero();
  auto look = [&](int i, F v) {
    largest[i] = max(largest[i], abs(v));
    probe[i] = fma(v, simd::zero(), probe[i]);
  };
  int64_t whole = 0;
  for (; whole + kChains * F::N <= count; whole += kChains * F::N) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) look(i, simd::load(x + whole + i * F::N));
  }
  for (int64_t k = whole; k < count; k += F::N) look(0, part(k));
  const float most = simd::max(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
  const bool finite = simd::sum((probe[0] + probe[1]) + (probe[2] + probe[3])) == 0.0f;
  const float inverse = finite && most > 1e-30f ? 127.0f / most : 0.0f;
  const float scale = !finite ? std::nanf("") : inverse > 0.0f ? most / 127.0f : 0.0f;
  std::memcpy(record + plan::kIntScale, &scale, sizeof scale);
  if (!finite || count < plan::kIntBlock) std::memset(bytes, 0, plan::kIntBlock);

  const F by = simd::set(inverse);
  for (int64_t g = 0; g * group < count; ++g) {
    F sum = simd::zero();
    if (finite)
      for (int64_t k = g * group; k < least(count, (g + 1) * group); k += F::N) {
        const F v = round(part(k) * by);
        simd::store_bytes(bytes + k, v);
        sum = sum + v;
      }
    const float total = 0.0f - simd::sum(sum);
    record[plan::kIntStarts + g] = int32_t(total) * zero;
    std::memcpy(record + plan::kIntTotals + g, &total, sizeof total);
  }
}

// Elements of a block of K that share a scale: a group, or where one scale holds for a row all of them.
int64_t group_of(const PackedView& w) { return w.group ? w.group : plan::kIntBlock; }

// Fills the records of x.
void round_x(const Pass& p, Parallel& pool) {
  const MatmulArgs& a = p.args;
  const int64_t blocks = divide_up(a.w.k, plan::kIntBlock);
  // A weight's zero, unless that varies, less what products take off.
  const bool nibbles = a.w.dtype == DType::i4;
  const int32_t zero = a.w.has_zeros ? 0 : nibbles ? 8 : 128, offset = zero - (nibbles ? 0 : simd::kByteOffset);
  auto convert = [&](int64_t chunk, int) {
    const int64_t r = chunk / blocks, b = chunk % blocks, k = b * plan::kIntBlock;
    round_block(p.x + (b * p.rows + r) * plan::kIntStride, a.x + (p.row + r) * a.x_stride + k,
                least(plan::kIntBlock, a.w.k - k), group_of(a.w), offset);
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

// One block of K for all rows of a chunk: sums[rows][kPanel] += x w^T. `begin(row, rows)` comes before each register
// tile, `end` behind it. Meanwhile what is next is brought into the cache: by a single tile, which meets its weights in
// memory, what follows in the panel; else by each tile its share.
template <class Step, class Begin, class End>
void multiply_block(float* sums, const int32_t* x, const IntBlock& block, int64_t rows, const Next& next, Begin begin,
                    End end) {
  const int64_t tiles = divide_up(rows, Step::kRows), steps = greatest(1, block.k / 4 / Step::kQuads);
  const int lines = tiles == 1 ? 4 : tiles <= kStreamTiles ? 2 : 1;
  const int64_t bytes = next.w_bytes + next.x_bytes;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t row = rows * t / tiles, count = rows * (t + 1) / tiles - row, share = bytes * t / tiles;
    IntAhead ahead{share < next.w_bytes ? next.w + share : next.x + share - next.w_bytes,
                   divide_up(divide_up(bytes, tiles), steps)};
    if (tiles == 1) ahead = {reinterpret_cast<const char*>(block.values) + kStreamAhead, 64 * lines};
    const IntTile tile = block.scales ? tile_of<Step, true>(count, lines) : tile_of<Step, false>(count, lines);
    begin(row, count);
    tile(sums + row * kPanel, x + row * plan::kIntStride, block, ahead);
    end(row, count);
  }
}

// Rows of the pass that a worker takes at once.
struct Chunk {
  int64_t row, rows;
};

// Brings rows of an output panel, and of the residual, into the cache.
void prefetch_outputs(const MatmulArgs& a, int64_t row, int64_t rows, int64_t panel) {
  const int64_t column = panel * kPanel, columns = least(kPanel, a.w.n - column);
  for (int64_t r = row; r < row + rows; ++r)
    for (int64_t c = 0; c < columns; c += 16) {
      __builtin_prefetch(a.y + r * a.y_stride + column + c, 1);
      if (a.residual && a.residual != a.y) __builtin_prefetch(a.residual + r * a.residual_stride + column + c);
    }
}

// Block `b` of K of a packed panel.
IntBlock block_of(const PackedView& w, const uint8_t* panel, int64_t b) {
  IntBlock block{};
  block.group = group_of(w);
  block.k = least(plan::kIntBlock, w.padded_k() - b * plan::kIntBlock);
  if (w.group == 0) {
    const uint8_t* scales = panel + w.values_bytes(w.padded_k());
    block.values = panel + b * w.values_bytes(plan::kIntBlock);
    block.values_stride = w.values_bytes(plan::kIntBlock);
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

// The scales of whole rows at the end of a packed panel; null where groups have them.
const float* row_scales(const PackedView& w, int64_t panel) {
  if (w.group) return nullptr;
  const auto* data = static_cast<const uint8_t*>(w.data) + panel * w.panel_bytes();
  return reinterpret_cast<const float*>(data + w.values_bytes(w.padded_k()));
}

// Rows [row, row + rows) of packed panels [begin, end), which are those of both parts in turn: a block of K of all panels,
// which share the block of x, after the other. The last one finishes each tile while its sums are at hand.
void multiply_panels(const Pass& p, const Chunk& chunk, int64_t begin, int64_t end, int worker) {
  const MatmulArgs& a = p.args;
  const PackedView& w = a.w;
  const auto* data = static_cast<const uint8_t*>(w.data);
  const int64_t blocks = greatest(1, divide_up(w.k, plan::kIntBlock));  // an empty one where there is no K
  const int64_t panel_bytes = w.panel_bytes();
  for (int64_t b = 0; b < blocks; ++b) {
    const int32_t* x = p.x + (b * p.rows + chunk.row) * plan::kIntStride;
    // Each panel fetches its share of the next block of x, which for the last is the first one.
    const auto* next_x = reinterpret_cast<const char*>(b + 1 < blocks ? x + p.rows * plan::kIntStride
                                                                      : p.x + chunk.row * plan::kIntStride);
    const int64_t x_bytes = p.streams ? 0 : chunk.rows * plan::kIntStride * 4 / (end - begin);
    for (int64_t panel = begin; panel < end; ++panel) {
      IntBlock block = block_of(w, data + panel * panel_bytes, b);
      float* sums = p.sums(worker, panel - begin);
      const int64_t bytes = w.values_bytes(block.k) + (w.group ? divide_up(block.k, w.group) * w.scales_bytes() : 0);
      Next next{reinterpret_cast<const char*>(block.values) + panel_bytes, next_x + (panel - begin) * x_bytes, bytes,
                x_bytes};
      if (panel + 1 == end && b + 1 < blocks)
        next.w = reinterpret_cast<const char*>(block_of(w, data + begin * panel_bytes, b + 1).values);
      const int64_t output = panel / w.parts, first = output * w.parts;
      auto start = [&](int64_t row, int64_t rows) {
        if (b == 0) std::memset(sums + row * kPanel, 0, size_t(rows * kPanel) * sizeof(float));
        if (b + 1 == blocks && panel + 1 == first + w.parts) prefetch_outputs(a, p.row + chunk.row + row, rows, output);
      };
      auto finish = [&](int64_t row, int64_t rows) {
        if (b + 1 < blocks || panel + 1 < first + w.parts) return;
        finish_panel(a, p.row + chunk.row + row, rows, output, p.sums(worker, first - begin) + row * kPanel,
                     sums + row * kPanel, row_scales(w, first), row_scales(w, panel));
      };
      if (w.dtype == DType::i8) {
        multiply_block<StepI8>(sums, x, block, chunk.rows, next, start, finish);
      } else if (!p.unpack) {
        multiply_block<StepI4>(sums, x, block, chunk.rows, next, start, finish);
      } else {
        uint8_t* bytes = p.unpacked(worker);
        for (int64_t k = 0, g = 0; k < block.k; k += block.group, ++g)
          unpack_values(bytes + k * kPanel, block.values + g * block.values_stride, least(block.group, block.k - k));
        block.values = bytes;
        block.values_stride = block.group * kPanel;
        multiply_block<StepUnpackedI4>(sums, x, block, chunk.rows, next, start, finish);
      }
    }
  }
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

  // Few rows: single panels (several where they are small), each of which streams from memory. Many rows: groups of
  // panels that share a block of x. No larger than leaves every thread several chunks; where single panels are too few
  // for that, rows are cut as well.
  const int64_t panels = a.w.panels(), most = plan::kIntSlots / a.w.parts;
  const int64_t chunks = (p.streams ? kStreamChunks : kBlockChunks) * pool.threads();
  const int64_t wanted = p.streams ? kChunkBytes / (a.w.panel_bytes() * a.w.parts + 1) : most;
  const int64_t group = greatest(1, least(least(wanted, most), panels / chunks));
  const int64_t groups = divide_up(panels, group);
  const int64_t row_chunks = p.streams ? 1 : greatest(1, least(divide_up(chunks, groups), rows / kStreamRows));
  parallel_for(pool, groups * row_chunks, [&](int64_t index, int worker) {
    const int64_t part = index / groups, panel = index % groups * group, width = p.streams ? 1 : group;
    const int64_t first = rows * part / row_chunks, last = rows * (part + 1) / row_chunks;
    const int64_t end = least(panels, panel + group);
    for (int64_t i = panel; i < end; i += width)
      multiply_panels(p, {first, last - first}, i * a.w.parts, least(end, i + width) * a.w.parts, worker);
  });
}

}  // namespace

void matmul_int(const MatmulArgs& a, Parallel& pool) {
  const int64_t most = plan::even_part(a.rows, plan::kIntRows);
  for (int64_t row = 0; row < a.rows; row += most) multiply_rows(a, row, least(most, a.rows - row), pool);
}

}  // namespace pyllm::PYLLM_ISA
