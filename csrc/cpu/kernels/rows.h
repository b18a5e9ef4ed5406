// Row-wise kernels: how rows are dealt to threads, and how one is added to another.
#pragma once
#include "cpu/kernels/kernel.h"

namespace pyllm::PYLLM_ISA {

// fn(row) for each row, in chunks of rows that hold about this many elements: less is done sooner than a second thread
// is woken.
constexpr int64_t kChunkElements = 16384;

template <class Fn>
static inline void for_rows(Parallel& pool, int64_t rows, int64_t row_elements, Fn&& fn) {
  const int64_t most = kChunkElements / (row_elements + 1) + 1;
  const int64_t chunks = (rows + most - 1) / most;
  parallel_for(pool, chunks, [&](int64_t chunk, int) {
    const int64_t end = rows < (chunk + 1) * most ? rows : (chunk + 1) * most;
    for (int64_t r = chunk * most; r < end; ++r) fn(r);
  });
}

static inline void add_row(float* y, const float* x, int64_t n) {
  using namespace simd;
  int64_t i = 0;
  for (; i + F::N <= n; i += F::N) store(y + i, load(y + i) + load(x + i));
  if (i < n) store_n(y + i, load_n(y + i, int(n - i)) + load_n(x + i, int(n - i)), int(n - i));
}

}  // namespace pyllm::PYLLM_ISA
