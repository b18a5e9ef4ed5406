// Values kept between two limits. The gradient of one that was outside is 0.
#include "cpu/kernels/math.h"
#include "cpu/kernels/rows.h"

namespace pyllm::PYLLM_ISA {

void clamp(const ClampArgs& args, Parallel& pool) {
  using namespace simd;
  const F most = set(args.limit), least = set(-args.limit);
  for_rows(pool, args.rows, args.dim, [&](int64_t r) {
    float* x = args.x + r * args.x_stride;
    for (int64_t i = 0; i < args.dim; i += F::N) {
      const int count = int(args.dim - i < F::N ? args.dim - i : F::N);
      const F v = load_up_to(x + i, count);
      const F below = select_gt(v, most, most, v);
      store_up_to(x + i, select_gt(least, below, least, below), count);
    }
  });
}

void clamp_backward(const ClampBackwardArgs& args, Parallel& pool) {
  using namespace simd;
  const F limit = set(args.limit);
  for_rows(pool, args.rows, args.dim, [&](int64_t r) {
    const float* x = args.x + r * args.x_stride;
    float* dx = args.dx + r * args.dx_stride;
    for (int64_t i = 0; i < args.dim; i += F::N) {
      const int count = int(args.dim - i < F::N ? args.dim - i : F::N);
      const F inside = select_gt(limit, abs(load_up_to(x + i, count)), load_up_to(dx + i, count), set(0.0f));
      store_up_to(dx + i, inside, count);
    }
  });
}

}  // namespace pyllm::PYLLM_ISA
