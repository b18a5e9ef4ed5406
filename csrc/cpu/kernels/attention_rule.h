// Which keys a query sees: see AttentionRule in core/args.h.
#pragma once
#include "cpu/kernels/kernel.h"

namespace pyllm::PYLLM_ISA {

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Keys [first, last), and where first > 0 those below `sinks`, which is less than first. All three rise, or stay, from
// one position to the next.
struct Seen {
  int64_t first, last, sinks;

  bool any(int64_t begin, int64_t end) const { return (first < end && last > begin) || sinks > begin; }
};

// One sequence of a batch.
class SequenceRule {
 public:
  template <class Args>
  SequenceRule(const Args& a, int64_t sequence)
      : start(a.starts[sequence]),
        rows(a.starts[sequence + 1] - start),
        length(a.lengths[sequence]),
        rule_(a.rule),
        prefix_(a.rule.prefix ? a.rule.prefix[sequence] : 0) {}

  Seen seen(int64_t row) const {
    const int64_t p = position(row);
    Seen s{0, rule_.causal ? max_of(p + 1, prefix_) : length, 0};
    if (rule_.window == 0) return s;
    if (!rule_.causal) s.last = min_of(length, max_of(p + rule_.window, rule_.sinks));
    const int64_t first = p - rule_.window + 1;
    if (first > rule_.sinks) s.first = first, s.sinks = rule_.sinks;
    return s;
  }

  // The first row that sees a key or one after it, and the end of those that see it within the window; neither is held
  // within the rows.
  int64_t first_row(int64_t key) const {
    if (rule_.causal) return key < prefix_ ? 0 : key - position(0);
    return rule_.window > 0 && key >= rule_.sinks ? key - position(0) - rule_.window + 1 : 0;
  }
  int64_t end_row(int64_t key) const {
    return rule_.window > 0 && key >= rule_.sinks ? key - position(0) + rule_.window : rows;
  }

  int64_t position(int64_t row) const { return length - rows + row; }

  const int64_t start, rows, length;  // its first row, rows and keys

 private:
  const AttentionRule& rule_;
  const int64_t prefix_;
};

}  // namespace pyllm::PYLLM_ISA
