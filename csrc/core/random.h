// Counter-based random numbers: Philox 4x32 with ten rounds (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as
// easy as 1, 2, 3; SC 2011). A number is a pure function of key and counter, so a draw depends on nothing but the two.
// Both functions are constexpr, which CUDA kernels may call.
#pragma once
#include <cstdint>

namespace pyllm {

struct Philox {
  uint32_t words[4];
};

static constexpr Philox philox4x32(Philox counter, uint32_t key0, uint32_t key1) {
  uint32_t* c = counter.words;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xd2511f53u) * c[0], b = uint64_t(0xcd9e8d57u) * c[2];
    const uint32_t next[4] = {uint32_t(b >> 32) ^ c[1] ^ key0, uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ key1,
                              uint32_t(a)};
    for (int i = 0; i < 4; ++i) c[i] = next[i];
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return counter;
}

// Uniform in [0, 1) with 53 random bits: number `position` of stream `stream` of `seed`.
static constexpr double uniform(uint64_t seed, uint32_t stream, uint64_t position) {
  const Philox r =
      philox4x32({{uint32_t(position), uint32_t(position >> 32), stream, 0}}, uint32_t(seed), uint32_t(seed >> 32));
  return double(uint64_t(r.words[0]) << 21 ^ r.words[1] >> 11) * 0x1p-53;
}

}  // namespace pyllm
