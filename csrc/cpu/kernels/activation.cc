// Activation functions and gated products.
#include "cpu/kernels/math.h"
#include "cpu/kernels/rows.h"

namespace pyllm::PYLLM_ISA {
namespace {

template <Activation activation>
inline void activation_row(float* y, const float* x, const float* up, int64_t n) {
  using namespace simd;
  int64_t i = 0;
  for (; i + F::N <= n; i += F::N) {
    const F v = apply<activation>(load(x + i));
    store(y + i, up ? v * load(up + i) : v);
  }
  if (i < n) {
    const int count = int(n - i);
    const F v = apply<activation>(load_n(x + i, count));
    store_n(y + i, up ? v * load_n(up + i, count) : v, count);
  }
}

}  // namespace

void activation(const ActivationArgs& a, Parallel& pool) {
  with_activation(a.activation, [&](auto tag) {
    for_rows(pool, a.rows, a.dim, [&](int64_t r) {
      const float* up = a.up ? a.up + r * a.up_stride : nullptr;
      activation_row<decltype(tag)::value>(a.y + r * a.y_stride, a.x + r * a.x_stride, up, a.dim);
    });
  });
}

}  // namespace pyllm::PYLLM_ISA
