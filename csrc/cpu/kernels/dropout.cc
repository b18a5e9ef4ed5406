// Dropout of activations, with the residual addition behind it. Applied to a gradient it is its own backward pass.
#include "cpu/kernels/dropout.h"

#include "cpu/kernels/rows.h"

namespace pyllm::PYLLM_ISA {

void dropout(const DropoutArgs& a, Parallel& pool) {
  using namespace simd;
  const DropoutRule rule(a.dropout, 1.0f / (1.0f - a.dropout.rate));
  for_rows(pool, a.rows, a.dim, [&](int64_t r) {
    const DropoutRow row = a.dropout.seed ? dropout_row(a.dropout, r, 0) : DropoutRow{0, 0};
    const float *x = a.x + r * a.x_stride, *residual = a.residual ? a.residual + r * a.residual_stride : nullptr;
    float* y = a.y + r * a.y_stride;
    int64_t i = 0;
    for (; i + F::N <= a.dim; i += F::N) {
      const F kept = rule.keep(row, i, load(x + i));
      store(y + i, residual ? kept + load(residual + i) : kept);
    }
    if (i < a.dim) {
      const int n = int(a.dim - i);
      const F kept = rule.keep(row, i, load_n(x + i, n));
      store_n(y + i, residual ? kept + load_n(residual + i, n) : kept, n);
    }
  });
}

}  // namespace pyllm::PYLLM_ISA
