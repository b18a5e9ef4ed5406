// Both products of attention, scores = queries x keys and outputs += weights x values, on the matmul's register tiles.
//
// Every sum is one chain of steps in rising order, from what it holds or from zero; a step of weight 0 leaves it as it
// is. Sums of integers are exact, start from zero at each page, and join what is held by one multiply-add. So neither the
// rows beside it nor hidden keys in its range change a sum's bits.
#pragma once
#include <type_traits>

#include "cpu/kernels/matmul_tile.h"

namespace pyllm::PYLLM_ISA {

// Inlined into one function, the tiles of all sizes would compete for registers.
#define PYLLM_NOINLINE __attribute__((noinline))

// i8 integers times x in 16 bits; one step is the pair (k, k + 1). 256 products of at most 127 * 32767 fit into 32 bits.
struct StepWords {
  using X = int32_t;  // a pair of int16
  using W = int8_t;
  using Operand = simd::I;
  static constexpr int64_t kX = 1, kColumn = 2;
  static inline Operand load(const W* w) { return simd::load_i8_words(w); }
  static inline Operand broadcast(const X* x) { return simd::set_int(*x); }
  static inline simd::I step(simd::I c, Operand x, Operand w) { return simd::dot_words(c, x, w); }
};
template <class Step>
constexpr bool is_words() {
  return std::is_same<Step, StepWords>::value;
}

// Keys or values of one head's page as the right-hand side of a product, with columns in groups of kKeyGroup: tokens for
// keys, channels for values.
template <class W>
struct PageOperand {
  const W* data;
  int64_t group;  // elements from one group of columns to the next
  int64_t step;   // elements from one step to the next
};

// Rows and vectors of columns of a tile. What is widened in registers needs two for each vector.
template <class Step>
constexpr int tile_rows() {
  return sizeof(typename Step::Operand) > sizeof(simd::F) ? 4 : kTileRows;
}
template <class Step>
constexpr int tile_columns(int rows) {
  const int most = tile_vectors(rows);
  return sizeof(typename Step::Operand) > sizeof(simd::F) && most > 4 ? 4 : most;
}

// c[r][v] (+)= x[r] . w[v], of integers times unit[r] where they are added, for vectors [first, first + V) of columns. With kAhead each step asks for as many bytes from
// `ahead` on as it takes: keys and values are read as several streams, which hardware prefetchers do not guess. Into the
// second level of cache, for the first is full of what is being worked on.
template <class Step, int R, int V, bool kAhead>
PYLLM_NOINLINE void page_tile(float* c, int64_t c_stride, const typename Step::X* x, int64_t x_stride,
                              const float* unit, PageOperand<typename Step::W> w, int first, int64_t steps, bool fresh,
                              const char* ahead) {
  using simd::F;
  using Sum = std::conditional_t<is_words<Step>(), simd::I, F>;
  constexpr int kGroupVectors = kKeyGroup / F::N;
  constexpr int64_t kBytes = V * F::N * Step::kColumn * int64_t(sizeof(typename Step::W));
  Sum sum[R][V];
  const typename Step::W* column[V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    const int i = first + v;
    column[v] = w.data + i / kGroupVectors * w.group + i % kGroupVectors * (F::N * Step::kColumn);
  }
  c += first * F::N;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      if constexpr (is_words<Step>())
        sum[r][v] = simd::set_int(0);
      else
        sum[r][v] = fresh ? simd::zero() : simd::load(c + r * c_stride + v * F::N);
    }
  }
  for (int64_t s = 0; s < steps; ++s, x += Step::kX) {
    if (kAhead) {
#pragma GCC unroll 16
      for (int64_t line = 0; line < kBytes; line += 64) __builtin_prefetch(ahead + line, 0, 2);
      ahead += kBytes;
    }
    typename Step::Operand b[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) b[v] = Step::load(column[v] + s * w.step);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const auto a = Step::broadcast(x + r * x_stride);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sum[r][v] = Step::step(sum[r][v], a, b[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      float* to = c + r * c_stride + v * F::N;
      if constexpr (is_words<Step>()) {
        const F whole = simd::to_float(sum[r][v]);
        simd::store(to, fresh ? whole : simd::fma(whole, simd::set(unit[r]), simd::load(to)));
      } else {
        simd::store(to, sum[r][v]);
      }
    }
  }
}

// Calls fn(tag) with tag.value = n, 1 <= n <= most, as a constant.
template <int n>
struct Constant {
  static constexpr int value = n;
};
template <int most, class Fn>
inline void with_constant(int n, const Fn& fn) {
  if constexpr (most > 1)
    if (n < most) return with_constant<most - 1>(n, fn);
  fn(Constant<most>{});
}

// The same for up to tile_rows() rows and all vectors [first, last) of columns.
template <class Step, bool kAhead>
void page_product(int rows, float* c, int64_t c_stride, const typename Step::X* x, int64_t x_stride, const float* unit,
                  PageOperand<typename Step::W> w, int first, int last, int64_t steps, bool fresh, const char* ahead) {
  with_constant<tile_rows<Step>()>(rows, [&](auto tag) {
    constexpr int R = decltype(tag)::value, V = tile_columns<Step>(R);
    constexpr int64_t kVectorBytes = simd::F::N * Step::kColumn * int64_t(sizeof(typename Step::W));
    for (; first < last; first += V) {
      const int left = last - first < V ? last - first : V;
      with_constant<V>(left, [&](auto columns) {
        page_tile<Step, R, decltype(columns)::value, kAhead>(c, c_stride, x, x_stride, unit, w, first, steps, fresh,
                                                             ahead);
      });
      ahead += V * kVectorBytes * steps;
    }
  });
}

}  // namespace pyllm::PYLLM_ISA
