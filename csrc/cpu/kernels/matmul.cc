// y = act(x W^T + bias) (* up) + residual over packed weights.
//
// A worker takes some rows by some panels of 64 outputs. K is cut into blocks, and each block of a panel is multiplied
// with all those rows, a register tile at a time (matmul_tile.h); between blocks the partial sums rest in the worker's
// scratch, so that every output is one chain over rising k. Rows of x are read from a copy laid out by blocks, and
// where there are many of them, weights that must be widened are widened once per block. The epilogue then goes over
// the finished panels.
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
constexpr int64_t kChunkBytes = 64 * 1024;     // of weights, at least, that a worker takes at a time
constexpr int64_t kStreamChunks = 8;           // per thread, at least, so that threads finish together: of few rows
constexpr int64_t kBlockChunks = 2;            // of many
constexpr int64_t kWidenRows = 2 * kTileRows;  // from this many rows on, widening a block of weights first is cheaper

constexpr int64_t kStreamTiles =
    8;  // up to this many row tiles the weights come from memory faster than they are used up
constexpr int64_t kStreamAhead =
    8192;  // bytes; measured on Sapphire Rapids: 0.62 of the read bandwidth without, 0.93 with

// Intel's cores need prefetching to read one stream at full speed; on AMD's Zen 4 it was measured to hurt.
inline bool streams_need_prefetch() { return __builtin_cpu_is("intel"); }

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }
using plan::divide_up;

// One pass: at most plan::kMaxRows rows of the call, and how it goes over them.
struct Pass {
  const MatmulArgs& args;
  int64_t row, rows;
  bool pairs;              // bf16 dot products: x is bf16, a step is two k
  bool streams;            // few rows: the time is that of reading the weights
  bool widen;              // weights become float32 a block at a time
  int64_t steps, block;    // of K in all, and per block
  const void* x;           // copy [blocks][rows][kRowStride] of float or bf16 pairs, or the one row itself
  int64_t x_block;         // between blocks of x, in 4-byte elements
  unsigned char* scratch;  // of all workers

  float* sums(int worker, int64_t slot) const {
    return reinterpret_cast<float*>(scratch + worker * (plan::sums_bytes(rows) + plan::widened_bytes())) +
           slot * plan::even_part(rows, plan::kRows) * kPanel;
  }
  float* widened(int worker) const { return sums(worker, plan::kSlots); }
};

// Copies x to dst [blocks][rows][kRowStride], rounded to bf16 where `pairs`; odd K is padded with zero.
void copy_x(const Pass& p, void* dst, Parallel& pool) {
  const MatmulArgs& a = p.args;
  const int64_t elements = p.pairs ? 2 : 1, blocks = divide_up(p.steps, p.block);
  auto copy = [&](int64_t chunk, int) {
    const int64_t b = chunk / p.rows, r = chunk % p.rows;
    const int64_t k0 = b * p.block * elements;
    const int64_t steps = least(p.block, p.steps - b * p.block), count = least(steps * elements, a.w.k - k0);
    const int64_t padded = round_up(steps, p.pairs ? kStepPairs : 1) * elements;
    const float* src = a.x + (p.row + r) * a.x_stride + k0;
    float* row = static_cast<float*>(dst) + (b * p.rows + r) * kRowStride;
    auto* narrow = reinterpret_cast<uint16_t*>(row);
    if (p.pairs) {
      int64_t k = 0;
      for (; k + F::N <= count; k += F::N) simd::store_bf16(narrow + k, simd::load(src + k));
      if (k < count) simd::store_bf16_n(narrow + k, simd::load_n(src + k, int(count - k)), int(count - k));
      for (k = count; k < padded; ++k) narrow[k] = 0;
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
void tile_panel(float* sums, const typename Step::X* x, const typename Step::W* w, int64_t steps, int64_t columns,
                bool first, Ahead ahead) {
  constexpr int64_t kColumns = tile_vectors(Rows) * F::N;
  constexpr Fetch kUsed = kColumns == kPanel || kFetch == Fetch::next ? kFetch : Fetch::none;
  for (int64_t c = 0; c < columns; c += kColumns)
    tile<Step, Rows, kUsed>(sums + c, x, w + c * Step::kColumn, steps, first, ahead);
}

// One block of K for all rows: sums[rows][kPanel] (+)= x w^T over the first `columns` columns of the panel. Meanwhile
// what is next is brought into the cache.
template <class Step>
void multiply_block(float* sums, const typename Step::X* x, const void* weights, int64_t rows, int64_t steps,
                    int64_t columns, bool first, Next next) {
  using Tile = void (*)(float*, const typename Step::X*, const typename Step::W*, int64_t, int64_t, bool, Ahead);
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
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = rows * t / tiles, end = rows * (t + 1) / tiles;
    const Ahead ahead = alone ? Ahead{static_cast<const char*>(weights) + kStreamAhead, step_bytes, nullptr, 0}
                              : Ahead{next.w + w_share * t, divide_up(w_share, spread), next.x + x_share * t,
                                      divide_up(x_share, spread)};
    kTiles[end - begin - 1][int(fetch)](sums + begin * kPanel, x + begin * kRowStride, w, steps, columns, first, ahead);
  }
}

// Packed bf16 or f16 weights of `k` (even for bf16) inner elements as float32 [k][kPanel].
void widen_block(float* out, const uint16_t* w, DType dtype, int64_t k) {
  if (dtype == DType::f16) {
    for (int64_t i = 0; i < k * kPanel; i += F::N) simd::store(out + i, simd::load_f16(w + i));
    return;
  }
  for (int64_t i = 0; i < k; i += 2, out += 2 * kPanel, w += 2 * kPanel) {
    for (int64_t c = 0; c < kPanel; c += F::N) {
      F even, odd;
      simd::load_bf16_pairs(w + 2 * c, even, odd);
      simd::store(out + c, even);
      simd::store(out + kPanel + c, odd);
    }
  }
}

// What a worker takes at once: rows of the pass, from `row` on, by panels of each part.
struct Chunk {
  int64_t row, rows, panel, panels;
};

// The sums of packed panels [begin, end), which are those of both parts in turn, into the worker's slots from `slot` on.
void multiply_panels(const Pass& p, const Chunk& chunk, RowTiles& tiles, int64_t begin, int64_t end, int64_t slot,
                     int worker) {
  const PackedView& w = p.args.w;
  const auto* data = static_cast<const char*>(w.data);
  const int64_t panel_bytes = w.panel_bytes(), step_bytes = kPanel * (p.pairs ? 4 : dtype_bytes(w.dtype));
  int64_t s = 0;
  do {
    const int64_t steps = least(p.block, p.steps - s);
    const bool last = s + steps == p.steps;
    const auto* x = static_cast<const float*>(p.x) + s / p.block * p.x_block + chunk.row * kRowStride;
    // Each panel fetches its share of the next block of x, which for the last is the first one.
    const auto* next_x = reinterpret_cast<const char*>(last ? x - s / p.block * p.x_block : x + p.x_block);
    const int64_t x_bytes = p.streams ? 0 : chunk.rows * kRowStride * 4 / (end - begin);
    for (int64_t panel = begin; panel < end; ++panel) {
      const void* block = data + panel * panel_bytes + s * step_bytes;
      const int64_t columns = least(kPanel, w.n - panel / w.parts * kPanel);
      float* sums = p.sums(worker, slot + panel - begin);
      Next next{data + (panel + 1) * panel_bytes + s * step_bytes, next_x + (panel - begin) * x_bytes,
                steps * step_bytes, x_bytes};
      if (panel + 1 == end && !last) next.w = data + begin * panel_bytes + (s + steps) * step_bytes;
      if (p.widen) {
        widen_block(p.widened(worker), static_cast<const uint16_t*>(block), w.dtype, steps);
        block = p.widened(worker);
      }
      if (p.widen || w.dtype == DType::f32)
        multiply_block<StepF32>(sums, x, block, chunk.rows, steps, columns, s == 0, next);
      else if (w.dtype == DType::f16)
        multiply_block<StepF16>(sums, x, block, chunk.rows, steps, columns, s == 0, next);
      else
#if PYLLM_HAS_AMX
        multiply_block_amx(tiles, sums, reinterpret_cast<const uint32_t*>(x), static_cast<const uint16_t*>(block),
                           chunk.rows, steps, s == 0, {next.w, next.w_bytes, next.x, next.x_bytes});
#elif PYLLM_HAS_BF16_DOT
        multiply_block<StepBf16Dot>(sums, reinterpret_cast<const uint32_t*>(x), block, chunk.rows, steps, columns,
                                    s == 0, next);
#else
        multiply_block<StepBf16Wide>(sums, x, block, chunk.rows, steps / 2, columns, s == 0, next);
#endif
    }
    s += p.block;
  } while (s < p.steps);
}

// Few rows take one panel after the other, so that its weights stream from memory in order; many take a block of K of all panels,
// which share the block of x.
void multiply_chunk(const Pass& p, const Chunk& chunk, int worker) {
  const int64_t begin = chunk.panel * p.args.w.parts, end = begin + chunk.panels * p.args.w.parts;
  const int64_t width = p.streams ? 1 : end - begin;
  RowTiles tiles;
  for (int64_t i = begin; i < end; i += width) multiply_panels(p, chunk, tiles, i, i + width, i - begin, worker);
}

void multiply_rows(const MatmulArgs& a, int64_t row, int64_t rows, Parallel& pool) {
  Pass p{a, row, rows, false, rows <= kStreamTiles * kTileRows, false, 0, 0, nullptr, 0, nullptr};
  p.pairs = PYLLM_HAS_BF16_DOT && a.w.dtype == DType::bf16;
  p.widen = !p.pairs && a.w.dtype != DType::f32 && rows >= kWidenRows;
  p.steps = p.pairs ? a.w.padded_k() / 2 : a.w.padded_k();
  p.block = p.steps == 0 ? 2 : round_up(plan::even_part(p.steps, kBlock), p.pairs && PYLLM_HAS_AMX ? kStepPairs : 2);
  auto* workspace = static_cast<unsigned char*>(a.workspace);
  p.scratch = workspace + plan::x_bytes(rows, round_up(a.w.k, 2));
  if (rows == 1 && !p.pairs && a.w.padded_k() == a.w.k) {
    p.x = a.x + row * a.x_stride;
    p.x_block = p.block;
  } else {
    p.x = workspace;
    p.x_block = rows * kRowStride;
    copy_x(p, workspace, pool);
  }

  // Few rows: single panels (several where they are small), each of which streams from memory. Many rows: blocks of
  // rows by groups of panels that share a block of x. No larger than leaves every thread several chunks.
  const int64_t panels = a.w.panels(), most = plan::kSlots / a.w.parts;
  const int64_t chunk_rows = plan::even_part(rows, plan::kRows), row_chunks = divide_up(rows, chunk_rows);
  const int64_t wanted = p.streams ? kChunkBytes / (a.w.panel_bytes() * a.w.parts + 1) : most;
  const int64_t share = panels * row_chunks / ((p.streams ? kStreamChunks : kBlockChunks) * pool.threads());
  const int64_t group = greatest(1, least(least(wanted, most), share));
  const int64_t groups = divide_up(panels, group);
  parallel_for(pool, groups * row_chunks, [&](int64_t index, int worker) {
    const int64_t row = index / groups * chunk_rows, panel = index % groups * group;
    const Chunk chunk{row, least(chunk_rows, rows - row), panel, least(group, panels - panel)};
    multiply_chunk(p, chunk, worker);
    // Row by row, so that each is written from one end to the other: down a panel, every row is on another page.
    for (int64_t r = 0; r < chunk.rows; ++r)
      for (int64_t i = 0; i < chunk.panels; ++i)
        finish_panel(a, p.row + row + r, 1, panel + i, p.sums(worker, i * a.w.parts) + r * kPanel,
                     p.sums(worker, i * a.w.parts + 1) + r * kPanel);
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
