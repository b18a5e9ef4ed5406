// Rotary position embedding: the angles of a step, once for all layers, and the rotation of heads in place.
#include <math.h>

#include "cpu/kernels/kernel.h"
#include "cpu/kernels/rotate.h"

namespace pyllm::PYLLM_ISA {
namespace {
constexpr int64_t kTokensPerChunk = 16;  // a decode step stays on the calling thread
}

// The product is taken in float32 before the cosine, as the published models do: at large positions its rounding is
// part of what they were trained with.
void rope_angles(const RopeAnglesArgs& a, Parallel& pool) {
  parallel_for(pool, (a.rows + kTokensPerChunk - 1) / kTokensPerChunk, [&](int64_t chunk, int) {
    const int64_t begin = chunk * kTokensPerChunk,
                  end = begin + kTokensPerChunk < a.rows ? begin + kTokensPerChunk : a.rows;
    for (int64_t t = begin; t < end; ++t) {
      const float* inv_freq = a.inv_freq + (a.table ? a.table[t] : 0) * a.half;
      for (int64_t i = 0; i < a.half; ++i) {
        const float angle = float(a.positions[t]) * inv_freq[i];
        a.cos[t * a.half + i] = cosf(angle) * a.scaling;
        a.sin[t * a.half + i] = sinf(angle) * a.scaling;
      }
    }
  });
}

void rope(const RopeArgs& a, Parallel& pool) {
  parallel_for(pool, (a.rows + kTokensPerChunk - 1) / kTokensPerChunk, [&](int64_t chunk, int) {
    const int64_t begin = chunk * kTokensPerChunk,
                  end = begin + kTokensPerChunk < a.rows ? begin + kTokensPerChunk : a.rows;
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t h = 0; h < a.heads; ++h) {
        float* x = a.x + t * a.x_stride + h * a.head_size;
        const float *cos = a.cos + t * a.half, *sin = a.sin + t * a.half;
        if (a.inverse)
          rotate<true>(x, x, cos, sin, a.half, a.head_size);
        else
          rotate(x, x, cos, sin, a.half, a.head_size);
      }
    }
  });
}

}  // namespace pyllm::PYLLM_ISA
