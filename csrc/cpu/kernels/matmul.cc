// y = act(x W^T + bias) (* up) + residual over packed weights.
//
// A worker takes some rows by some panels of 64 outputs. K is cut into blocks, and each block of a panel is multiplied
// with all those rows, a register tile at a time (matmul_tile.h); between blocks the partial sums rest in the worker's
// scratch, so that every output is one chain over rising k. Rows of x are read where they stand, or from a copy laid
// out by blocks, and where there are many of them, weights that must be widened are widened once per block. A tile that
// has met its last block goes through the epilogue at once, so that y is written while the next tile is multiplied.
#include "cpu/cores.h"
#include "cpu/kernels/kernel.h"
#include "cpu/kernels/matmul_amx.h"
#include "cpu/kernels/matmul_finish.h"
#include "cpu/kernels/matmul_int.h"
#include "cpu/kernels/matmul_tile.h"

namespace pyllm::PYLLM_ISA {
namespace {

namespace plan = cpu::matmul_plan;
using simd::F;

constexpr int64_t kInlineCopy =
    16384;  // elements of x below which copying it on several threads costs more than it saves
constexpr int64_t kDepthBytes = 32 * 1024;  // of a panel, which few rows multiply at once: what the first cache holds
constexpr int64_t kChunkBytes = 64 * 1024;  // of weights, at least, that a worker takes at a time
constexpr int64_t kStreamChunks = 8;        // per thread, at least, so that threads finish together: of few rows
constexpr int64_t kBlockChunks = 4;         // of many

// From so many rows on it is cheaper to widen a block of weights first than anew for every tile.
constexpr int64_t kWidenF16 = 24, kWidenBf16 = 96;

constexpr int64_t kStreamTiles =
    8;  // up to this many row tiles the weights come from memory faster than they are used up
constexpr int64_t kStreamAhead =
    8192;  // bytes; measured on Sapphire Rapids: 0.62 of the read bandwidth without, 0.93 with

// Intel's cores need prefetching to read one stream at full speed; on AMD's Zen 4 it was measured to hurt.
inline bool streams_need_prefetch() { return __builtin_cpu_is("intel"); }

// So few rows are bound by memory even where bf16 dot products are slow.
constexpr int64_t kDotRows = 2;

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }
using plan::divide_up;

// One pass: at most plan::kMaxRows rows of the call, and how it goes over them.
struct Pass {
  const MatmulArgs& args;
  int64_t row, rows;
  bool rounded;  // x is rounded to bf16 and multiplied as the bf16 dot product does, whether by it or not
  bool pairs;    // by it: x is bf16, a step is two k
  bool streams;  // few rows: the time is that of reading the weights
  bool widen;    // weights become float32 a block at a time
  int64_t steps, block, depth;  // of K in all, of a block of x, and of what is multiplied at once
  const void* x;                // copy [blocks][rows][x_stride] of float or bf16 pairs, or the rows themselves
  int64_t x_stride, x_block;    // of its rows and blocks, in 4-byte elements
  unsigned char* scratch;       // of all workers

  float* sums(int worker, int64_t slot) const {
    return reinterpret_cast<float*>(scratch + worker * (plan::float_sums_bytes(rows) + plan::widened_bytes())) +
           slot * plan::even_part(rows, plan::kFloatRows) * kPanel;
  }
  float* widened(int worker) const { return sums(worker, plan::kFloatSlots); }
};

// Whether x can be multiplied where it stands: as float32, and without rows that fall into the same cache sets.
bool reads_in_place(const Pass& p) {
  constexpr int64_t kSets = 4096 / int64_t(sizeof(float));  // rows this far apart share those of a first-level cache
  const MatmulArgs& a = p.args;
  return !p.rounded && a.w.padded_k() == a.w.k && (p.rows == 1 || a.x_stride % kSets != 0);
}

// Copies x to dst [blocks][rows][x_stride], as bf16 where `pairs`, and as float that bf16 holds, the second of a pair
// first, where only `rounded`. Odd K is padded with zero. Rows that a worker copies are mostly those it multiplies.
void copy_x(const Pass& p, void* dst, Parallel& pool) {
  const MatmulArgs& a = p.args;
  const int64_t elements = p.pairs ? 2 : 1, blocks = divide_up(p.steps, p.block);
  auto copy = [&](int64_t chunk, int) {
    const int64_t b = chunk % blocks, r = chunk / blocks;
    const int64_t k0 = b * p.block * elements;
    const int64_t steps = least(p.block, p.steps - b * p.block), count = least(steps * elements, a.w.k - k0);
    const int64_t padded = round_up(steps, p.pairs ? kStepPairs : 1) * elements;
    const float* src = a.x + (p.row + r) * a.x_stride + k0;
    float* row = static_cast<float*>(dst) + (b * p.rows + r) * p.x_stride;
    auto* narrow = reinterpret_cast<uint16_t*>(row);
    if (p.pairs) {
      int64_t k = 0;
      for (; k + F::N <= count; k += F::N) simd::store_bf16(narrow + k, simd::load(src + k));
      if (k < count) simd::store_bf16_n(narrow + k, simd::load_n(src + k, int(count - k)), int(count - k));
      for (k = count; k < padded; ++k) narrow[k] = 0;
#if PYLLM_HAS_BF16_DOT
    } else if (p.rounded) {
      int64_t k = 0;
      for (; k + F::N <= count; k += F::N)
        simd::store(row + k, simd::swap_pairs(simd::round_bf16(simd::load(src + k))));
      if (k < count) simd::store(row + k, simd::swap_pairs(simd::round_bf16(simd::load_n(src + k, int(count - k)))));
#endif
    } else {
      std::memcpy(row, src, size_t(count) * sizeof(float));
      if (count < padded) row[count] = 0.0f;
    }
  };
  if (p.rows * a.w.k < kInlineCopy) {
    for (int64_t c = 0; c < blocks * p.rows; ++c) copy(c, 0);
  } else {
    parallel_for(pool, blocks * p.rows, copy);
  }
}

// What will be needed after this block: the next one of weights, and a part of the next one of x.
struct Next {
  const char *w, *x;
  int64_t w_bytes, x_bytes;
};

// All columns of a panel for Rows rows.
template <class Step, int Rows, Fetch kFetch>
void tile_panel(float* sums, const typename Step::X* x, int64_t x_stride, const typename Step::W* w, int64_t steps,
                int64_t columns, bool first, const Ahead& ahead) {
  constexpr int64_t kColumns = tile_vectors(Rows) * F::N;
  constexpr Fetch kUsed = kColumns == kPanel || kFetch == Fetch::next ? kFetch : Fetch::none;
  for (int64_t c = 0; c < columns; c += kColumns)
    tile<Step, Rows, kUsed>(sums + c, x, x_stride, w + c * Step::kColumn, steps, first, ahead);
}

// The epilogue of one panel, rows [r, r + count) of the chunk at a time; of a block that is not the last, nothing.
struct Finish {
  const MatmulArgs& args;
  bool last;
  int64_t row, panel;  // of y: where the chunk begins
  const float *sums, *up_sums;

  // Asks for what the epilogue will touch: each row of y is on another page, which takes a while to reach. `y` is null
  // where that is fetched in the meantime.
  void expect(int64_t r, int64_t count, const float* y) const {
    const float* residual = args.residual == args.y ? nullptr : args.residual;
    if (!last || (!y && !residual)) return;
    const int64_t column = panel * kPanel;
    for (int64_t i = row + r; i < row + r + count; ++i) {
      for (int64_t c = column; c < least(column + kPanel, args.w.n); c += 16) {
        if (y) __builtin_prefetch(y + i * args.y_stride + c, 1, 2);
        if (residual) __builtin_prefetch(residual + i * args.residual_stride + c, 0, 2);
      }
    }
  }
  float* y(int64_t r) const { return args.y + (row + r) * args.y_stride + panel * kPanel; }
  void run(int64_t r, int64_t count) const {
    if (last) finish_panel(args, row + r, count, panel, sums + r * kPanel, up_sums + r * kPanel);
  }
};

// One block of K for all rows: sums[rows][kPanel] (+)= x w^T over the first `columns` columns of the panel, and what
// comes of them. Meanwhile what is next is brought into the cache.
template <class Step>
void multiply_block(float* sums, const typename Step::X* x, int64_t x_stride, const void* weights, int64_t rows,
                    int64_t steps, int64_t columns, bool first, Next next, const Finish& finish) {
  using Tile =
      void (*)(float*, const typename Step::X*, int64_t, const typename Step::W*, int64_t, int64_t, bool, const Ahead&);
  static constexpr Tile kTiles[][3] = {
#define PYLLM_TILE(rows) \
  {tile_panel<Step, rows, Fetch::none>, tile_panel<Step, rows, Fetch::stream>, tile_panel<Step, rows, Fetch::next>}
      PYLLM_TILE(1), PYLLM_TILE(2), PYLLM_TILE(3), PYLLM_TILE(4),
#if !defined(PYLLM_ISA_BASELINE)
      PYLLM_TILE(5), PYLLM_TILE(6),
#endif
#undef PYLLM_TILE
  };
  static_assert(sizeof kTiles / sizeof kTiles[0] == kTileRows);
  const auto* w = static_cast<const typename Step::W*>(weights);
  const int64_t step_bytes = Step::kW * int64_t(sizeof(typename Step::W));
  const int64_t tiles = divide_up(rows, kTileRows);
  const bool alone = tiles == 1;
  const Fetch fetch = !alone                    ? tiles <= kStreamTiles ? Fetch::stream : Fetch::next
                      : streams_need_prefetch() ? Fetch::stream
                                                : Fetch::none;
  // With several tiles only the first meets weights that are not in the cache yet, so each fetches its share of what
  // comes next.
  const int64_t w_share = next.w_bytes / tiles, x_share = next.x_bytes / tiles, spread = greatest(1, steps);
  const int64_t w_advance = alone ? step_bytes : divide_up(w_share, spread), x_advance = divide_up(x_share, spread);
  // Where no other block of x comes next, the rows of the next tile do, if they stand close together.
  const bool fetches_rows = next.x_bytes == 0 && x_stride < 2 * steps * Step::kX;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = rows * t / tiles, end = rows * (t + 1) / tiles, count = end - begin;
    Ahead ahead{next.w + w_share * t,
                w_advance,
                next.x + x_share * t,
                x_advance,
                reinterpret_cast<const char*>(sums + begin * kPanel),
                0,
                0};
    if (alone) ahead.w = static_cast<const char*>(weights) + kStreamAhead;
    if (fetches_rows) {
      ahead.x = reinterpret_cast<const char*>(x + end % rows * x_stride);
      ahead.x_advance = divide_up(count * x_stride * int64_t(sizeof *x), spread);
    }
    if (finish.last) {
      ahead.y = reinterpret_cast<const char*>(finish.y(begin));
      ahead.y_stride = finish.args.y_stride * int64_t(sizeof(float));
      ahead.y_advance = divide_up(kPanel * int64_t(sizeof(float)) * count, spread);
    }
    finish.expect(begin, count, fetch == Fetch::next ? nullptr : finish.args.y);
    kTiles[count - 1][int(fetch)](sums + begin * kPanel, x + begin * x_stride, x_stride, w, steps, columns, first,
                                  ahead);
    finish.run(begin, count);
  }
}

// Packed bf16 or f16 weights of `k` (even for bf16) inner elements as float32 [k][kPanel]; of bf16 pairs the second comes
// first where x is so.
void widen_block(float* out, const uint16_t* w, const Pass& p, int64_t k) {
  if (p.args.w.dtype == DType::f16) {
    for (int64_t i = 0; i < k * kPanel; i += F::N) simd::store(out + i, simd::load_f16(w + i));
    return;
  }
  const int64_t even_at = p.rounded ? kPanel : 0, odd_at = kPanel - even_at;
  for (int64_t i = 0; i < k; i += 2, out += 2 * kPanel, w += 2 * kPanel) {
    for (int64_t c = 0; c < kPanel; c += F::N) {
      F even, odd;
      simd::load_bf16_pairs(w + 2 * c, even, odd);
      simd::store(out + even_at + c, even);
      simd::store(out + odd_at + c, odd);
    }
  }
}

// What a worker takes at once: rows of the pass, from `row` on, by panels of each part.
struct Chunk {
  int64_t row, rows, panel, panels;
};

// y of packed panels [begin, end), which are those of both parts in turn.
void multiply_panels(const Pass& p, const Chunk& chunk, RowTiles& tiles, int64_t begin, int64_t end, int worker) {
  const PackedView& w = p.args.w;
  const auto* data = static_cast<const char*>(w.data);
  const int64_t panel_bytes = w.panel_bytes(), step_bytes = kPanel * (p.pairs ? 4 : dtype_bytes(w.dtype));
  int64_t s = 0;
  do {
    const int64_t block = s / p.block, within = s - block * p.block;
    const int64_t steps = least(least(p.depth, p.block - within), p.steps - s);
    const bool first = s == 0, last = s + steps == p.steps;
    const auto* x = static_cast<const float*>(p.x) + block * p.x_block + chunk.row * p.x_stride + within;
    // Each panel fetches its share of the next block of x, which for the last is the first one.
    const auto* next_x = reinterpret_cast<const char*>(last ? x - block * p.x_block : x + p.x_block);
    const int64_t x_bytes = p.streams || (first && last) ? 0 : chunk.rows * p.x_stride * 4 / (end - begin);
    for (int64_t panel = begin; panel < end; ++panel) {
      const void* weights = data + panel * panel_bytes + s * step_bytes;
      const int64_t part = panel % w.parts, columns = least(kPanel, w.n - panel / w.parts * kPanel);
      // What needs no second block, or has it next, needs no place of its own.
      const int64_t slot = p.streams || (first && last) ? part : panel - begin;
      float* sums = p.sums(worker, slot);
      const Finish finish{p.args,          last && part == w.parts - 1, p.row + chunk.row,
                          panel / w.parts, p.sums(worker, slot - part), sums};
      Next next{data + (panel + 1) * panel_bytes + s * step_bytes, next_x + (panel - begin) * x_bytes,
                steps * step_bytes, x_bytes};
      if (panel + 1 == end)
        next.w = last ? data + end * panel_bytes : data + begin * panel_bytes + (s + steps) * step_bytes;
      if (p.widen) {
        widen_block(p.widened(worker), static_cast<const uint16_t*>(weights), p, steps);
        weights = p.widened(worker);
      }
      if (p.widen || w.dtype == DType::f32)
        multiply_block<StepF32>(sums, x, p.x_stride, weights, chunk.rows, steps, columns, first, next, finish);
      else if (w.dtype == DType::f16)
        multiply_block<StepF16>(sums, x, p.x_stride, weights, chunk.rows, steps, columns, first, next, finish);
      else if (!p.pairs)
        multiply_block<StepBf16Wide<PYLLM_HAS_BF16_DOT>>(sums, x, p.x_stride, weights, chunk.rows, steps / 2, columns,
                                                         first, next, finish);
      else {
#if PYLLM_HAS_AMX
        multiply_block_amx(tiles, sums, reinterpret_cast<const uint32_t*>(x), static_cast<const uint16_t*>(weights),
                           chunk.rows, steps, first, {next.w, next.w_bytes, next.x, next.x_bytes});
        finish.run(0, chunk.rows);
#elif PYLLM_HAS_BF16_DOT
        multiply_block<StepBf16Dot>(sums, reinterpret_cast<const uint32_t*>(x), p.x_stride, weights, chunk.rows, steps,
                                    columns, first, next, finish);
#endif
      }
    }
    s += steps;
  } while (s < p.steps);
}

// Few rows take one panel after the other, so that its weights stream from memory in order; many take a block of K of all panels,
// which share the block of x.
void multiply_chunk(const Pass& p, const Chunk& chunk, int worker) {
  const int64_t begin = chunk.panel * p.args.w.parts, end = begin + chunk.panels * p.args.w.parts;
  const int64_t width = p.streams ? 1 : end - begin;
  RowTiles tiles;
  for (int64_t i = begin; i < end; i += width) multiply_panels(p, chunk, tiles, i, i + width, worker);
}

void multiply_rows(const MatmulArgs& a, int64_t row, int64_t rows, Parallel& pool) {
  Pass p{a, row, rows, false, false, rows <= kStreamTiles * kTileRows, false, 0, 0, 0, nullptr, 0, 0, nullptr};
  p.rounded = PYLLM_HAS_BF16_DOT && a.w.dtype == DType::bf16;
  p.pairs = p.rounded && (PYLLM_HAS_AMX || rows <= kDotRows || cpu::vectors_dot_bf16_fast());
  p.widen = !p.pairs && a.w.dtype != DType::f32 && rows >= (a.w.dtype == DType::f16 ? kWidenF16 : kWidenBf16);
  p.steps = p.pairs ? a.w.padded_k() / 2 : a.w.padded_k();
  const bool amx = p.pairs && PYLLM_HAS_AMX;
  const int64_t even = amx ? kStepPairs : 2, step_bytes = kPanel * (p.pairs ? 4 : dtype_bytes(a.w.dtype));
  p.block = greatest(even, round_up(plan::even_part(p.steps, amx ? plan::kAmxBlock : kBlock), even));
  p.depth = p.streams ? greatest(even, round_up(plan::even_part(p.block, kDepthBytes / step_bytes), even)) : p.block;
  auto* workspace = static_cast<unsigned char*>(a.workspace);
  p.scratch = workspace + plan::x_bytes(rows, round_up(a.w.k, 2));
  if (reads_in_place(p)) {
    p.x = a.x + row * a.x_stride;
    p.x_stride = a.x_stride;
    p.x_block = p.block;
  } else {
    p.x = workspace;
    p.x_stride = amx ? plan::kAmxRowStride : plan::kRowStride;
    p.x_block = rows * p.x_stride;
    copy_x(p, workspace, pool);
  }

  // Few rows: single panels (several where they are small), each of which streams from memory. Many rows: blocks of
  // rows by groups of panels that share a block of x. No larger than leaves every thread several chunks.
  const int64_t panels = a.w.panels(), chunk_rows = plan::even_part(rows, plan::kFloatRows);
  const int64_t row_chunks = divide_up(rows, chunk_rows);
  const int64_t wanted = p.streams           ? kChunkBytes / (a.w.panel_bytes() * a.w.parts + 1)
                         : p.block < p.steps ? plan::kFloatSlots / a.w.parts
                                             : panels;
  const int64_t share = panels * row_chunks / ((p.streams ? kStreamChunks : kBlockChunks) * pool.threads());
  const int64_t group = greatest(1, least(wanted, share));
  const int64_t groups = divide_up(panels, group);
  parallel_for(pool, groups * row_chunks, [&](int64_t index, int worker) {
    const int64_t row = index / groups * chunk_rows, panel = index % groups * group;
    const simd::FlushDenormals flush(p.rounded);
    multiply_chunk(p, {row, least(chunk_rows, rows - row), panel, least(group, panels - panel)}, worker);
  });
}

}  // namespace

void matmul(const MatmulArgs& a, Parallel& pool) {
  if (a.w.n == 0) return;
  if (a.w.integers()) return matmul_int(a, pool);
  const int64_t most = plan::even_part(a.rows, plan::kMaxRows);
  for (int64_t row = 0; row < a.rows; row += most) multiply_rows(a, row, least(most, a.rows - row), pool);
}

}  // namespace pyllm::PYLLM_ISA
