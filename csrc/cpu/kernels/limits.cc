// What this machine can do at most: how fast it reads, and how fast it multiplies and adds with nothing else in the
// way. Every other kernel's speed is given as a fraction of these.
#include "cpu/kernels/kernel.h"

namespace pyllm::PYLLM_ISA {

using namespace simd;

namespace {

// Chains in flight: enough to cover four cycles of latency on two units, few enough to stay in sixteen registers.
#define PYLLM_CHAINS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
constexpr int kChains = 12;

struct Done {
  int64_t work;
  float value;
};

template <int64_t kStreams>
Done read(const float* p) {
  constexpr int64_t kPart = kLimitsChunk / kStreams, kStep = 64;
  static_assert(kPart % kStep == 0 && kStep % (4 * F::N) == 0);
  F s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
  for (int64_t i = 0; i < kPart; i += kStep) {
    for (int64_t s = 0; s < kStreams; ++s) {
      for (const float *q = p + s * kPart + i, *end = q + kStep; q < end; q += 4 * F::N) {
        s0 = s0 + load(q);
        s1 = s1 + load(q + F::N);
        s2 = s2 + load(q + 2 * F::N);
        s3 = s3 + load(q + 3 * F::N);
      }
    }
  }
  return {kLimitsChunk * 4, sum((s0 + s1) + (s2 + s3))};
}

// `step` on every chain in turn, `rounds` times; it does this many operations on each lane.
template <class Step>
Done run_chains(int64_t rounds, int64_t operations, Step step) {
#define X(i) F a##i = set(float(i));
  PYLLM_CHAINS(X)
#undef X
  for (int64_t r = 0; r < rounds; ++r) {
#define X(i) a##i = step(a##i);
    PYLLM_CHAINS(X)
#undef X
  }
  F total = zero();
#define X(i) total = total + a##i;
  PYLLM_CHAINS(X)
#undef X
  return {rounds * kChains * F::N * operations, sum(total)};
}

Done multiply_add_f32(int64_t rounds) {
  const F scale = set(0.5f), shift = set(1.0f);  // a = a / 2 + 1 stays near 2
  return run_chains(rounds, 2, [=](F a) { return fma(a, scale, shift); });
}

Done dot_bf16_pairs(int64_t rounds) {
#if PYLLM_HAS_AMX
  Tiles tiles;
  tiles.shape({kTileLines, kTileLines, kTileLines, kTileLines, kTileLines, kTileLines, 0, 0});
  for (int64_t r = 0; r < rounds; ++r) {  // the sums are tiles 0 to 3, which cover the latency
    tile_dot_bf16<0, 4, 5>();
    tile_dot_bf16<1, 4, 5>();
    tile_dot_bf16<2, 4, 5>();
    tile_dot_bf16<3, 4, 5>();
  }
  return {rounds * 4 * kTileLines * kTileLines * kTileLines * 4, 0.0f};
#elif PYLLM_HAS_BF16_DOT
  const B x = set_pair(0x3a803a80u), w = set_pair(0x3f803f80u);  // 2^-10 and 1
  return run_chains(rounds, 4, [=](F a) { return dot_bf16(a, x, w); });
#else
  return multiply_add_f32(rounds);
#endif
}

Done dot_int8(int64_t rounds) {
  I x = set_bytes(1), w = set_bytes(0);  // products of 0: the sums stay where they are and never overflow
  opaque(w);
#define X(i) I a##i = set_bytes(0);
  PYLLM_CHAINS(X)
#undef X
  for (int64_t r = 0; r < rounds; ++r) {
    // x is made opaque before every product, so that levels which build it from several instructions run all of them.
#define X(i) \
  opaque(x); \
  a##i = dot_bytes(a##i, x, w);
    PYLLM_CHAINS(X)
#undef X
  }
  int64_t total = 0;
#define X(i) total += sum(a##i);
  PYLLM_CHAINS(X)
#undef X
  return {rounds * kChains * F::N * 8, float(total)};
}

}  // namespace

void limits(const LimitsArgs& args, Parallel& pool) {
  const int64_t chunks = args.limit == Limit::read ? args.size / kLimitsChunk : args.chunks;
  parallel_for(pool, chunks, [&](int64_t chunk, int worker) {
    Done done{0, 0};
    switch (args.limit) {
      case Limit::read:
        done =
            args.streams == 4 ? read<4>(args.data + chunk * kLimitsChunk) : read<1>(args.data + chunk * kLimitsChunk);
        break;
      case Limit::f32:
        done = multiply_add_f32(args.rounds);
        break;
      case Limit::bf16:
        done = dot_bf16_pairs(args.rounds);
        break;
      case Limit::int8:
        done = dot_int8(args.rounds);
        break;
    }
    args.work[worker] += done.work;
    args.sink[worker] += done.value;
  });
}

}  // namespace pyllm::PYLLM_ISA
