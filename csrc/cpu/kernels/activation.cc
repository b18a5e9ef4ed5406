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

// One row; with `up`, of the gated product: dgate and dup from dy, gate and up.
template <Activation activation>
inline void activation_backward_row(float* dgate, float* dup, const float* dy, const float* gate, const float* up,
                                    int64_t n) {
  for (int64_t i = 0; i < n; i += F::N) {
    const int count = int(n - i < F::N ? n - i : F::N);
    const F d = load_up_to(dy + i, count);
    const Slope s = apply_with_slope<activation>(load_up_to(gate + i, count));
    if (up) {
      const F u = load_up_to(up + i, count);
      store_up_to(dup + i, d * s.y, count);
      store_up_to(dgate + i, d * u * s.slope, count);
    } else {
      store_up_to(dgate + i, d * s.slope, count);
    }
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

void activation_backward(const ActivationBackwardArgs& a, Parallel& pool) {
  with_activation(a.activation, [&](auto tag) {
    for_rows(pool, a.rows, a.dim, [&](int64_t r) {
      float* dpre = a.dpre + r * a.dpre_stride;
      const float* pre = a.pre + r * a.pre_stride;
      activation_backward_row<decltype(tag)::value>(dpre, dpre + a.dim, a.dy + r * a.dy_stride, pre,
                                                    a.gated ? pre + a.dim : nullptr, a.dim);
    });
  });
}

}  // namespace pyllm::PYLLM_ISA
