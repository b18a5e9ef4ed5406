// Row lookups: token and position embeddings, and the gather of the rows that need logits.
#include "cpu/kernels/kernel.h"

namespace pyllm::PYLLM_ISA {

void embedding(const EmbeddingArgs&, Parallel&) {}

void gather(const GatherArgs& a, Parallel& pool) {
  parallel_for(pool, a.rows, [&](int64_t r, int) {
    std::memcpy(a.y + r * a.y_stride, a.x + a.index[r] * a.x_stride, size_t(a.dim) * sizeof(float));
  });
}

}  // namespace pyllm::PYLLM_ISA
