// y = act(x W^T + bias) (* up) + residual over packed weights.
//
// A worker takes whole panels of 64 outputs. Over a panel K is cut into blocks, and each block is multiplied with all rows, a
// register tile at a time (matmul_tile.h); between blocks the partial sums rest in the worker's scratch, so that every output is
// one chain over rising k. Many rows read x from a copy laid out by blocks, and weights that must be widened are widened once
// per block. The epilogue then goes over the finished panel.
#include "cpu/kernels/kernel.h"
#include "cpu/kernels/math.h"
#include "cpu/kernels/matmul_tile.h"

namespace pyllm::PYLLM_ISA {
namespace {

namespace plan = cpu::matmul_plan;
using simd::F;

constexpr int64_t kInlineCopy = 16384;         // elements of x below which copying it on several threads costs more than it saves
constexpr int64_t kChunkBytes = 64 * 1024;     // of weights, at least, that a worker takes at a time
constexpr int64_t kWidenRows = 2 * kTileRows;  // from this many rows on, widening a block of weights first is cheaper

constexpr int64_t kStreamTiles = 8;            // up to this many row tiles the weights come from memory faster than they are used up
constexpr int64_t kStreamAhead = 8192;         // bytes; measured on Sapphire Rapids: 0.62 of the read bandwidth without, 0.93 with

// Intel's cores need prefetching to read one stream at full speed; on AMD's Zen 4 it was measured to hurt.
inline bool streams_need_prefetch() { return __builtin_cpu_is("intel"); }

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One pass: at most plan::kMaxRows rows of the call, and how it goes over them.
struct Pass {
  const MatmulArgs& args;
  int64_t row, rows;
  bool pairs;              // bf16 dot products: x is bf16, a step is two k
  bool widen;              // weights become float32 a block at a time
  int64_t steps, block;    // of K in all, and per block
  const void* x;           // copy [blocks][rows][kRowStride] of float or bf16 pairs, or the one row itself
  int64_t x_block;         // between blocks of x, in 4-byte elements
  unsigned char* scratch;  // of all workers

  float* sums(int worker, int part) const {
    return reinterpret_cast<float*>(scratch + worker * (plan::sums_bytes(rows) + plan::widened_bytes())) + part * rows * kPanel;
  }
  float* widened(int worker) const { return sums(worker, 2); }
};

// Copies x to dst [blocks][rows][kRowStride], rounded to bf16 where `pairs`; odd K is padded with zero.
void copy_x(const Pass& p, void* dst, Parallel& pool) {
  const MatmulArgs& a = p.args;
  const int64_t elements = p.pairs ? 2 : 1, blocks = divide_up(p.steps, p.block);
  auto copy = [&](int64_t chunk, int) {
    const int64_t b = chunk / p.rows, r = chunk % p.rows;
    const int64_t k0 = b * p.block * elements;
    const int64_t padded = least(p.block, p.steps - b * p.block) * elements, count = least(padded, a.w.k - k0);
    const float* src = a.x + (p.row + r) * a.x_stride + k0;
    float* row = static_cast<float*>(dst) + (b * p.rows + r) * kRowStride;
    auto* narrow = reinterpret_cast<uint16_t*>(row);
    if (p.pairs) {
      int64_t k = 0;
      for (; k + F::N <= count; k += F::N) simd::store_bf16(narrow + k, simd::load(src + k));
      if (k < count) simd::store_bf16_n(narrow + k, simd::load_n(src + k, int(count - k)), int(count - k));
      if (count < padded) narrow[count] = 0;
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

// All columns of a panel for Rows rows.
template <class Step, int Rows, bool Prefetch>
void tile_panel(float* sums, const typename Step::X* x, const typename Step::W* w, int64_t steps, int64_t columns, bool first,
                Ahead ahead) {
  constexpr int64_t kColumns = tile_vectors(Rows) * F::N;
  constexpr bool kWhole = kColumns == kPanel;
  for (int64_t c = 0; c < columns; c += kColumns)
    tile<Step, Rows, Prefetch && kWhole>(sums + c, x, w + c * Step::kColumn, steps, first, ahead);
}

// One block of K for all rows: sums[rows][kPanel] (+)= x w^T over the first `columns` columns of the panel.
template <class Step>
void multiply_block(float* sums, const typename Step::X* x, const void* weights, int64_t rows, int64_t steps, int64_t columns,
                    bool first) {
  using Tile = void (*)(float*, const typename Step::X*, const typename Step::W*, int64_t, int64_t, bool, Ahead);
  static constexpr Tile kTiles[][2] = {
#define PYLLM_TILE(rows) {tile_panel<Step, rows, false>, tile_panel<Step, rows, true>}
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
  // With several tiles only the first meets weights that are not in the cache yet, so each fetches its share of the next block.
  const bool prefetch = tiles <= kStreamTiles && (tiles > 1 || streams_need_prefetch());
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = rows * t / tiles, end = rows * (t + 1) / tiles;
    const int64_t distance = tiles == 1 ? kStreamAhead : step_bytes * steps * (tiles + t) / tiles;
    const Ahead ahead{static_cast<const char*>(weights) + distance, step_bytes / tiles};
    kTiles[end - begin - 1][prefetch](sums + begin * kPanel, x + begin * kRowStride, w, steps, columns, first, ahead);
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

void multiply_panel(const Pass& p, int64_t panel, int part, int64_t columns, int worker) {
  const PackedView& w = p.args.w;
  const auto* data = static_cast<const unsigned char*>(w.data) + (panel * w.parts + part) * w.panel_bytes();
  const int64_t step_bytes = kPanel * (p.pairs ? 4 : dtype_bytes(w.dtype));
  float* sums = p.sums(worker, part);
  int64_t s = 0;
  do {
    const int64_t steps = least(p.block, p.steps - s);
    const auto* x = static_cast<const float*>(p.x) + s / p.block * p.x_block;
    const void* block = data + s * step_bytes;
    const bool first = s == 0;
    if (p.widen) {
      widen_block(p.widened(worker), static_cast<const uint16_t*>(block), w.dtype, steps);
      block = p.widened(worker);
    }
    if (p.widen || w.dtype == DType::f32)
      multiply_block<StepF32>(sums, x, block, p.rows, steps, columns, first);
    else if (w.dtype == DType::f16)
      multiply_block<StepF16>(sums, x, block, p.rows, steps, columns, first);
    else
#if PYLLM_HAS_BF16_DOT
      multiply_block<StepBf16Dot>(sums, reinterpret_cast<const uint32_t*>(x), block, p.rows, steps, columns, first);
#else
      multiply_block<StepBf16Wide>(sums, x, block, p.rows, steps / 2, columns, first);
#endif
    s += p.block;
  } while (s < p.steps);
}

// Bias, activation, gate and residual for one vector of outputs; n < F::N at the end of a row.
inline F load_up_to(const float* p, int n) { return n == F::N ? simd::load(p) : simd::load_n(p, n); }

void finish_panel(const Pass& p, int64_t column, int64_t columns, int worker) {
  const MatmulArgs& a = p.args;
  const bool gated = a.w.parts == 2;
  for (int64_t r = 0; r < p.rows; ++r) {
    const float* sums = p.sums(worker, 0) + r * kPanel;
    const float* up = p.sums(worker, 1) + r * kPanel;
    float* y = a.y + (p.row + r) * a.y_stride + column;
    const float* residual = a.residual ? a.residual + (p.row + r) * a.residual_stride + column : nullptr;
    for (int64_t c = 0; c < columns; c += F::N) {
      const int n = int(least(F::N, columns - c));
      F v = simd::load(sums + c);
      if (a.bias) v = v + load_up_to(a.bias + column + c, n);
      if (a.activation != Activation::none) v = apply(a.activation, v);
      if (gated) {
        F u = simd::load(up + c);
        if (a.bias_up) u = u + load_up_to(a.bias_up + column + c, n);
        v = v * u;
      }
      if (residual) v = v + load_up_to(residual + c, n);
      if (n == F::N)
        simd::store(y + c, v);
      else
        simd::store_n(y + c, v, n);
    }
  }
}

void multiply_rows(const MatmulArgs& a, int64_t row, int64_t rows, Parallel& pool) {
  Pass p{a, row, rows, false, false, 0, 0, nullptr, 0, nullptr};
  p.pairs = PYLLM_HAS_BF16_DOT && a.w.dtype == DType::bf16;
  p.widen = !p.pairs && a.w.dtype != DType::f32 && rows >= kWidenRows;
  p.steps = p.pairs ? a.w.padded_k() / 2 : a.w.padded_k();
  const int64_t blocks = divide_up(p.steps, kBlock);
  p.block = blocks == 0 ? 2 : round_up(divide_up(p.steps, blocks), 2);
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

  const int64_t panels = a.w.panels();
  const int64_t per_chunk = 1 + least(kChunkBytes / (a.w.panel_bytes() * a.w.parts + 1), panels / (4 * pool.threads()));
  parallel_for(pool, divide_up(panels, per_chunk), [&](int64_t chunk, int worker) {
    const int64_t end = least(panels, (chunk + 1) * per_chunk);
    for (int64_t panel = chunk * per_chunk; panel < end; ++panel) {
      const int64_t columns = least(kPanel, a.w.n - panel * kPanel);
      for (int part = 0; part < a.w.parts; ++part) multiply_panel(p, panel, part, columns, worker);
      finish_panel(p, panel * kPanel, columns, worker);
    }
  });
}

}  // namespace

void matmul(const MatmulArgs& a, Parallel& pool) {
  if (a.w.n == 0) return;
  const int64_t most = plan::pass_rows(a.rows);
  for (int64_t row = 0; row < a.rows; row += most) multiply_rows(a, row, least(most, a.rows - row), pool);
}

}  // namespace pyllm::PYLLM_ISA
