// One row from those of each sequence (last, first, mean, maximum), and the gradient.
#include "cpu/kernels/rows.h"

namespace pyllm::PYLLM_ISA {
namespace {

constexpr int64_t kColumns = 256;  // of a sequence that one thread takes at a time

// fn(sequence, first column, number of columns)
template <class Fn>
void for_pieces(Parallel& pool, int64_t sequences, int64_t dim, Fn&& fn) {
  const int64_t pieces = (dim + kColumns - 1) / kColumns;
  parallel_for(pool, sequences * pieces, [&](int64_t chunk, int) {
    const int64_t begin = chunk % pieces * kColumns;
    fn(chunk / pieces, begin, dim - begin < kColumns ? dim - begin : kColumns);
  });
}

inline bool exceeds(float x, float y) { return x > y || x != x; }  // a NaN is what remains

}  // namespace

void pool(const PoolArgs& a, Parallel& threads) {
  for_pieces(threads, a.sequences, a.dim, [&](int64_t b, int64_t begin, int64_t n) {
    const int64_t first = a.starts[b], count = a.starts[b + 1] - first;
    float* y = a.y + b * a.y_stride + begin;
    if (count == 0) {
      std::memset(y, 0, size_t(n) * sizeof(float));
      return;
    }
    const float* x = a.x + (first + (a.pooling == Pooling::last ? count - 1 : 0)) * a.x_stride + begin;
    std::memcpy(y, x, size_t(n) * sizeof(float));
    if (a.pooling == Pooling::mean) {
      for (int64_t r = 1; r < count; ++r) add_row(y, x + r * a.x_stride, n);
      for (int64_t i = 0; i < n; ++i) y[i] /= float(count);
    } else if (a.pooling == Pooling::max) {
      for (int64_t r = 1; r < count; ++r)
        for (int64_t i = 0; i < n; ++i) y[i] = exceeds(x[r * a.x_stride + i], y[i]) ? x[r * a.x_stride + i] : y[i];
    }
  });
}

void pool_backward(const PoolBackwardArgs& a, Parallel& threads) {
  for_pieces(threads, a.sequences, a.dim, [&](int64_t b, int64_t begin, int64_t n) {
    const int64_t first = a.starts[b], count = a.starts[b + 1] - first;
    if (count == 0) return;
    float* dx = a.dx + first * a.dx_stride + begin;
    const float* dy = a.dy + b * a.dy_stride + begin;
    if (a.pooling == Pooling::mean) {
      for (int64_t r = 0; r < count; ++r)
        for (int64_t i = 0; i < n; ++i) dx[r * a.dx_stride + i] = dy[i] / float(count);
      return;
    }
    for (int64_t r = 0; r < count; ++r) std::memset(dx + r * a.dx_stride, 0, size_t(n) * sizeof(float));
    if (a.pooling != Pooling::max) {
      std::memcpy(dx + (a.pooling == Pooling::last ? count - 1 : 0) * a.dx_stride, dy, size_t(n) * sizeof(float));
      return;
    }
    const float* x = a.x + first * a.x_stride + begin;
    for (int64_t i = 0; i < n; ++i) {
      int64_t most = 0;
      for (int64_t r = 1; r < count; ++r)
        if (exceeds(x[r * a.x_stride + i], x[most * a.x_stride + i])) most = r;
      dx[most * a.dx_stride + i] = dy[i];
    }
  });
}

}  // namespace pyllm::PYLLM_ISA
