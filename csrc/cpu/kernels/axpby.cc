// Scaled sums of two arrays.
#include "cpu/kernels/math.h"
#include "cpu/kernels/rows.h"

namespace pyllm::PYLLM_ISA {

void axpby(const AxpbyArgs& args, Parallel& pool) {
  using namespace simd;
  const F a = set(args.a), b = set(args.b);
  for_rows(pool, args.rows, args.dim, [&](int64_t r) {
    const float *x = args.x + r * args.x_stride, *y = args.y ? args.y + r * args.y_stride : nullptr;
    float* out = args.out + r * args.out_stride;
    for (int64_t i = 0; i < args.dim; i += F::N) {
      const int count = int(args.dim - i < F::N ? args.dim - i : F::N);
      const F v = load_up_to(x + i, count);
      store_up_to(out + i, y ? fma(a, v, b * load_up_to(y + i, count)) : a * v, count);
    }
  });
}

}  // namespace pyllm::PYLLM_ISA
