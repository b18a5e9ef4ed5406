// The gradients of y = x W^T: dx = dy W and dW += dy^T x.
//
// Both go through the register tile of the forward (matmul_tile.h), in blocks of the inner dimension. dx multiplies rows of
// dy, copied into blocks as the forward copies x, with blocks of W that a worker transposes in its scratch. dW multiplies
// rows of x^T, transposed once, with strips of dy, and adds to the panels of dW where they stand.
#include "cpu/kernels/math.h"
#include "cpu/kernels/matmul_tile.h"
#include "cpu/kernels/panel_rows.h"
#include "cpu/kernels/transpose.h"

namespace pyllm::PYLLM_ISA {
namespace {

namespace plan = cpu::matmul_plan;
using plan::divide_up;
using plan::kGradientBlock;
using plan::kGradientStride;

constexpr int64_t kChunks = 2;  // per thread, at least

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

// All columns of a panel for Rows rows.
template <int Rows>
void tile_panel(float* sums, const float* x, const float* w, int64_t steps, bool first, const Ahead& ahead) {
  constexpr int64_t kColumns = tile_vectors(Rows) * F::N;
  for (int64_t c = 0; c < kPanel; c += kColumns)
    tile<StepF32, Rows, Fetch::next>(sums + c, x, kGradientStride, w + c, steps, first, ahead);
}

// What will be needed after a block, to be brought into the cache meanwhile: two pieces, each walked by all tiles.
struct Coming {
  const void* a = nullptr;
  const void* b = nullptr;
  int64_t a_bytes = 0, b_bytes = 0;
};

// sums[rows][kPanel] (+)= x w over one block: x rows kGradientStride apart, w [steps][kPanel]. Calls between(t, tiles) before
// tile t.
template <class Between>
void multiply_block(float* sums, const float* x, const float* w, int64_t rows, int64_t steps, bool first,
                    const Coming& coming, Between&& between) {
  using Tile = void (*)(float*, const float*, const float*, int64_t, bool, const Ahead&);
  static constexpr Tile kTiles[] = {
      tile_panel<1>, tile_panel<2>, tile_panel<3>, tile_panel<4>,
#if !defined(PYLLM_ISA_BASELINE)
      tile_panel<5>, tile_panel<6>,
#endif
  };
  static_assert(sizeof kTiles / sizeof kTiles[0] == kTileRows);
  const int64_t tiles = divide_up(rows, kTileRows);
  const int64_t a_share = coming.a_bytes / tiles, b_share = coming.b_bytes / tiles;
  const int64_t a_advance = divide_up(a_share, steps), b_advance = divide_up(b_share, steps);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = rows * t / tiles, end = rows * (t + 1) / tiles;
    between(t, tiles);
    const Ahead ahead{static_cast<const char*>(coming.a) + a_share * t,
                      a_advance,
                      static_cast<const char*>(coming.b) + b_share * t,
                      b_advance,
                      reinterpret_cast<const char*>(sums),
                      0,
                      0};
    kTiles[end - begin - 1](sums + begin * kPanel, x + begin * kGradientStride, w, steps, first, ahead);
  }
}

// Columns [column, column + count) of the gradient, which belong to packed panel `panel`.
struct PanelColumns {
  int64_t column, count;
};
PanelColumns columns_of(const PackedView& w, int64_t panel) {
  const int64_t begin = panel / w.parts * kPanel;
  return {panel % w.parts * w.n + begin, least(kPanel, w.n - begin)};
}

// `count` floats, then zeros up to a panel's width.
void copy_padded(float* dst, const float* src, int64_t count) {
  std::memcpy(dst, src, size_t(count) * sizeof(float));
  std::memset(dst + count, 0, size_t(kPanel - count) * sizeof(float));
}

// One pass of dx: some rows, and some packed panels of W.
struct DxPass {
  const MatmulDxArgs& args;
  int64_t row, rows, panel, panels;
  float* dy;               // copy [blocks][rows][kGradientStride]
  unsigned char* scratch;  // of all workers

  float* sums(int worker) const { return reinterpret_cast<float*>(scratch + worker * plan::dx_worker_bytes()); }
  float* block(int worker) const { return sums(worker) + plan::kDxSums * kPanel; }
  float* widened(int worker) const { return block(worker) + kGradientBlock * kPanel; }
};

void copy_dy(const DxPass& p, Parallel& pool) {
  const MatmulDxArgs& a = p.args;
  parallel_for(pool, p.rows, [&](int64_t r, int) {
    const float* src = a.dy + (p.row + r) * a.dy_stride;
    for (int64_t i = 0; i < p.panels; ++i) {
      const PanelColumns from = columns_of(a.w, p.panel + i);
      float* dst = p.dy + (i / plan::kBlockPanels * p.rows + r) * kGradientStride + i % plan::kBlockPanels * kPanel;
      copy_padded(dst, src + from.column, from.count);
    }
  });
}

// Panels [begin, end) of kPanel columns of dx, for all rows of the pass.
void dx_columns(const DxPass& p, int64_t begin, int64_t end, int worker) {
  const MatmulDxArgs& a = p.args;
  const PackedView& w = a.w;
  float *sums = p.sums(worker), *block = p.block(worker);
  const bool goes_on = a.add || p.panel > 0;
  float* dx = a.dx + p.row * a.dx_stride;
  const auto columns = [&](int64_t c) { return least(kPanel, w.k - c * kPanel); };
  if (goes_on)
    for (int64_t r = 0; r < p.rows; ++r)
      for (int64_t c = begin; c < end; ++c)
        copy_padded(sums + ((c - begin) * p.rows + r) * kPanel, dx + r * a.dx_stride + c * kPanel, columns(c));
  if (columns(end - 1) < kPanel) std::memset(block, 0, size_t(kGradientBlock * kPanel) * sizeof(float));
  for (int64_t i = 0; i < p.panels; i += plan::kBlockPanels) {
    const int64_t panels = least(plan::kBlockPanels, p.panels - i);
    const float* dy = p.dy + i / plan::kBlockPanels * p.rows * kGradientStride;
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t j = 0; j < panels; ++j)
        transpose(block + j * kPanel * kPanel, kPanel,
                  rows_of_panel(w, p.panel + i + j, c * kPanel, columns(c), p.widened(worker)), kPanel, columns(c),
                  kPanel);
      // Next are weights of the same panels, or of the next ones, and a share of the next block of dy.
      const bool wraps = c + 1 == end;
      const int64_t next_panel = p.panel + i + (wraps ? plan::kBlockPanels : 0), next_c = wraps ? begin : c + 1;
      const char* next =
          static_cast<const char*>(w.data) + next_panel * w.panel_bytes() + w.values_bytes(next_c * kPanel);
      const int64_t share = p.rows * kGradientStride / (end - begin);
      const Coming coming{next, dy + p.rows * kGradientStride + (c - begin) * share, w.values_bytes(kPanel), share * 4};
      multiply_block(sums + (c - begin) * p.rows * kPanel, dy, block, p.rows, panels * kPanel, i == 0 && !goes_on,
                     coming, [&](int64_t t, int64_t tiles) {
                       for (int64_t at = w.values_bytes(kPanel) * t / tiles / 64 * 64;
                            at < w.values_bytes(kPanel) * (t + 1) / tiles; at += 64)
                         __builtin_prefetch(next + w.panel_bytes() + at, 0, 2);
                     });
    }
  }
  for (int64_t r = 0; r < p.rows; ++r)
    for (int64_t c = begin; c < end; ++c)
      std::memcpy(dx + r * a.dx_stride + c * kPanel, sums + ((c - begin) * p.rows + r) * kPanel,
                  size_t(columns(c)) * sizeof(float));
}

// One pass of dW: some rows of x, transposed.
struct DwPass {
  const MatmulDwArgs& args;
  int64_t row, rows;
  float* x;                // [blocks][K][kGradientStride]
  unsigned char* scratch;  // of all workers

  float* strip(int worker) const { return reinterpret_cast<float*>(scratch + worker * plan::strip_bytes()); }
};

void transpose_x(const DwPass& p, Parallel& pool) {
  const MatmulDwArgs& a = p.args;
  const int64_t groups = divide_up(a.dw.k, kPanel);
  parallel_for(pool, divide_up(p.rows, kGradientBlock) * groups, [&](int64_t chunk, int) {
    const int64_t block = chunk / groups, k = chunk % groups * kPanel, first = block * kGradientBlock;
    transpose(p.x + (block * a.dw.k + k) * kGradientStride, kGradientStride, a.x + (p.row + first) * a.x_stride + k,
              a.x_stride, least(kGradientBlock, p.rows - first), least(kPanel, a.dw.k - k));
  });
}

void dw_panel(const DwPass& p, int64_t panel, int worker) {
  const MatmulDwArgs& a = p.args;
  const PanelColumns from = columns_of(a.dw, panel);
  float* dw = static_cast<float*>(const_cast<void*>(a.dw.data)) + panel * a.dw.k * kPanel;
  float* strip = p.strip(worker);
  for (int64_t t = 0; t < p.rows; t += kGradientBlock) {
    const int64_t steps = least(kGradientBlock, p.rows - t), block = a.dw.k * kGradientStride;
    const float* dy = a.dy + (p.row + t) * a.dy_stride + from.column;
    for (int64_t i = 0; i < steps; ++i) copy_padded(strip + i * kPanel, dy + i * a.dy_stride, from.count);
    // Next is the following block, or the first one and the following panel.
    const bool last = t + kGradientBlock >= p.rows;
    const float* x = p.x + t / kGradientBlock * block;
    const float* next_dy = last ? a.dy + p.row * a.dy_stride + from.column + kPanel : dy + kGradientBlock * a.dy_stride;
    const int64_t next_rows = last ? least(kGradientBlock, p.rows) : least(kGradientBlock, p.rows - t - kGradientBlock);
    const Coming coming{dw + a.dw.k * kPanel, last ? p.x : x + block, last ? a.dw.k * kPanel * 4 : 0, block * 4};
    multiply_block(dw, x, strip, a.dw.k, steps, false, coming, [&](int64_t tile, int64_t tiles) {
      for (int64_t i = next_rows * tile / tiles; i < next_rows * (tile + 1) / tiles; ++i)
        for (int64_t c = 0; c < kPanel; c += 16) __builtin_prefetch(next_dy + i * a.dy_stride + c, 0, 2);
    });
  }
}

}  // namespace

void matmul_dx(const MatmulDxArgs& a, Parallel& pool) {
  const int64_t panels = a.w.panels() * a.w.parts, most = plan::even_part(a.rows, plan::kDxRows);
  if (panels == 0 && !a.add)
    for (int64_t r = 0; r < a.rows; ++r) std::memset(a.dx + r * a.dx_stride, 0, size_t(a.w.k) * sizeof(float));
  auto* workspace = static_cast<unsigned char*>(a.workspace);
  for (int64_t row = 0; row < a.rows; row += most) {
    for (int64_t panel = 0; panel < panels; panel += plan::kDxPanels) {
      DxPass p{a, row, least(most, a.rows - row), panel, least(plan::kDxPanels, panels - panel), nullptr, nullptr};
      p.dy = reinterpret_cast<float*>(workspace);
      p.scratch = workspace + plan::dy_bytes(p.rows, p.panels);
      copy_dy(p, pool);
      const int64_t columns = divide_up(a.w.k, kPanel), most_columns = greatest(1, plan::kDxSums / p.rows);
      const int64_t group = greatest(1, least(most_columns, columns / (kChunks * pool.threads())));
      parallel_for(pool, divide_up(columns, group), [&](int64_t chunk, int worker) {
        dx_columns(p, chunk * group, least(columns, (chunk + 1) * group), worker);
      });
    }
  }
}

void matmul_dw(const MatmulDwArgs& a, Parallel& pool) {
  if (a.dw.k == 0) return;
  const int64_t most = plan::even_part(a.rows, plan::kDwTokens);
  auto* workspace = static_cast<unsigned char*>(a.workspace);
  for (int64_t row = 0; row < a.rows; row += most) {
    DwPass p{a, row, least(most, a.rows - row), reinterpret_cast<float*>(workspace), nullptr};
    p.scratch = workspace + plan::transposed_bytes(p.rows, a.dw.k);
    transpose_x(p, pool);
    parallel_for(pool, a.dw.panels() * a.dw.parts, [&](int64_t panel, int worker) { dw_panel(p, panel, worker); });
  }
}

void column_sum(const ColumnSumArgs& a, Parallel& pool) {
  constexpr int kVectors = 8;  // columns in flight, which hide the latency of the addition
  constexpr int64_t kColumns = kVectors * F::N;
  parallel_for(pool, divide_up(a.columns, kColumns), [&](int64_t chunk, int) {
    const int64_t column = chunk * kColumns, count = least(kColumns, a.columns - column);
    if (count == kColumns) {
      F sums[kVectors];
      for (int v = 0; v < kVectors; ++v) sums[v] = simd::load(a.out + column + v * F::N);
      for (int64_t r = 0; r < a.rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[v] = sums[v] + simd::load(a.x + r * a.x_stride + column + v * F::N);
      for (int v = 0; v < kVectors; ++v) simd::store(a.out + column + v * F::N, sums[v]);
      return;
    }
    for (int64_t c = 0; c < count; c += F::N) {
      const int n = int(least(F::N, count - c));
      F sum = load_up_to(a.out + column + c, n);
      for (int64_t r = 0; r < a.rows; ++r) sum = sum + load_up_to(a.x + r * a.x_stride + column + c, n);
      store_up_to(a.out + column + c, sum, n);
    }
  });
}

}  // namespace pyllm::PYLLM_ISA
