// Which elements dropout keeps. A row (of an array, or a head's query) has two keys, of a Philox draw on (seed, site, head,
// row); a column's number is mixed with them. So the mask is a function of an element's place, and a backward pass makes it
// anew.
#pragma once
#include "core/random.h"
#include "cpu/kernels/kernel.h"

namespace pyllm::PYLLM_ISA {

struct DropoutRow {
  uint32_t start, twist;
};

// Head 0 is that of arrays which have none: attention counts its heads from 1.
static inline DropoutRow dropout_row(const Dropout& d, int64_t row, int64_t head_number) {
  const Philox r = philox4x32({{uint32_t(row), uint32_t(head_number), uint32_t(d.site), 1}}, uint32_t(*d.seed),
                              uint32_t(*d.seed >> 32));
  return {r.words[0], r.words[1]};
}

// keep(row, column, x): x times `factor` in the lanes whose columns, from `column` on, are kept, and 0 in the others.
class DropoutRule {
 public:
  DropoutRule(const Dropout& d, float factor)
      : least_(simd::set(d.rate * 0x1p24f - 0.5f)), factor_(simd::set(factor)), places_(simd::places()) {}

  simd::F keep(DropoutRow row, int64_t column, simd::F x) const {
    using namespace simd;
    // Two rounds of shift and multiply, with the constants of least bias that the hash-prospector search has found.
    I h = places_ + set_int(int32_t(uint32_t(column) + row.start));
    h = multiply(h ^ shift_down(h, 16), 0x21f0aaadu) ^ set_int(int32_t(row.twist));
    h = multiply(h ^ shift_down(h, 15), 0xd35a2d97u);
    h = h ^ shift_down(h, 15);
    return select_gt(to_float(shift_down(h, 8)), least_, x * factor_, zero());
  }

 private:
  simd::F least_, factor_;
  simd::I places_;
};

}  // namespace pyllm::PYLLM_ISA
