// Writes keys and values into the paged cache, in the layouts of CacheView.
#include "cpu/kernels/kernel.h"
#include "cpu/kernels/rotate.h"
#include "cpu/kernels/transpose.h"

namespace pyllm::PYLLM_ISA {
namespace {

using namespace simd;

constexpr int64_t kTokensPerChunk = 16;

// src[0, E) rounded to bfloat16, zeros up to Ep.
void narrow(uint16_t* dst, const float* src, int64_t E, int64_t Ep) {
  int64_t e = 0;
  for (; e + F::N <= E; e += F::N) store_bf16(dst + e, load(src + e));
  if (e < E) store_bf16_n(dst + e, load_n(src + e, int(E - e)), int(E - e));
  for (e = E; e < Ep; ++e) dst[e] = 0;
}

// One head of tokens that follow each other.
struct HeadRows {
  const float* data;
  int64_t stride;

  const float* row(int64_t i) const { return data + i * stride; }
};

// Asks for the lines that write_f32 will write: another head's are on another page.
void expect_f32(const float* head, const CacheView& cache, int64_t at, int64_t tokens) {
  const int64_t E = cache.head_size, Ep = cache.padded_head();
  const float* keys = head + at / kKeyGroup * (E * kKeyGroup);
  for (int64_t i = 0; i < E * kKeyGroup; i += 16) __builtin_prefetch(keys + i, 1, 2);
  const float* values = head + cache.half_elements() + at * Ep;
  for (int64_t i = 0; i < tokens * Ep; i += 16) __builtin_prefetch(values + i, 1, 2);
}

// One head of tokens that stand one behind the other in one group of keys, from place `at` of their block on. Tokens of
// one group or pair may be written by different threads at once: each stores only elements of its own.
void write_f32(float* head, const CacheView& cache, int64_t at, int64_t tokens, HeadRows k, HeadRows v) {
  const int64_t E = cache.head_size, Ep = cache.padded_head();
  float* keys = head + at / kKeyGroup * (E * kKeyGroup) + at % kKeyGroup;
  transpose(keys, kKeyGroup, k.data, k.stride, tokens, E);
  float* values = head + cache.half_elements() + at * Ep;
  for (int64_t i = 0; i < tokens; ++i, values += Ep) {
    std::memcpy(values, v.row(i), size_t(E) * sizeof(float));
    for (int64_t e = E; e < Ep; ++e) values[e] = 0;
  }
}

void write_bf16(uint16_t* head, const CacheView& cache, int64_t at, const float* k, const float* v) {
  const int64_t Ep = cache.padded_head();
  alignas(64) uint16_t row[kMaxHead];
  narrow(row, k, cache.head_size, Ep);
  uint16_t* keys = head + at / kKeyGroup * (Ep * kKeyGroup) + at % kKeyGroup * 2;
  for (int64_t e = 0; e < Ep; e += 2) std::memcpy(keys + e * kKeyGroup, row + e, 2 * sizeof(uint16_t));
  narrow(row, v, cache.head_size, Ep);
  uint16_t* values = head + cache.half_elements() + at / 2 * (Ep * 2) + at % 2;
  for (int64_t e = 0; e < Ep; ++e) values[e * 2] = row[e];
}

// Quantizes src[0, E): row[e] = the integer nearest to src[e] / scale, zeros up to Ep. The scale is max|src| / 127 as bf16,
// whose rounding takes no integer past 127. A vector that is not finite in every channel gets a scale of NaN, and one so
// small that float32 would lose it a scale of 0.
uint16_t quantize(int8_t* row, const float* src, int64_t E, int64_t Ep) {
  F most = zero(), wrong = zero();  // x * 0 is 0 unless x is infinite or NaN
  const auto take = [&](F x) {
    most = max(most, abs(x));
    wrong = fma(x, zero(), wrong);
  };
  int64_t e = 0;
  for (; e + F::N <= E; e += F::N) take(load(src + e));
  if (e < E) take(load_n(src + e, int(E - e)));
  std::memset(row, 0, size_t(Ep));
  if (sum(wrong) != 0.0f) return 0x7fc0;
  alignas(64) uint16_t scales[F::N];
  store_bf16(scales, set(max(most) / 127.0f));
  const F scale = load_bf16(scales);
  if (max(scale) < 0x1p-100f) return 0;
  alignas(64) float integers[kMaxHead + F::N];
  for (e = 0; e + F::N <= E; e += F::N) store(integers + e, round(load(src + e) / scale));
  if (e < E) store(integers + e, round(load_n(src + e, int(E - e)) / scale));
  for (e = 0; e < E; ++e) row[e] = int8_t(integers[e]);
  return scales[0];
}

void write_i8(int8_t* head, const CacheView& cache, int64_t at, const float* k, const float* v) {
  const int64_t Ep = cache.padded_head(), half = cache.half_elements(), scales = kBlockTokens * Ep + at * 2;
  int8_t row[kMaxHead];
  uint16_t scale = quantize(row, k, cache.head_size, Ep);
  std::memcpy(head + scales, &scale, sizeof scale);
  int8_t* keys = head + at / kKeyGroup * (Ep * kKeyGroup) + at % kKeyGroup * 2;
  for (int64_t e = 0; e < Ep; e += 2) std::memcpy(keys + e * kKeyGroup, row + e, 2);
  scale = quantize(row, v, cache.head_size, Ep);
  std::memcpy(head + half + scales, &scale, sizeof scale);
  int8_t* values = head + half + at / 2 * (Ep * 2) + at % 2;
  for (int64_t e = 0; e < Ep; ++e) values[e * 2] = row[e];
}

// How many tokens from t on, which has a slot, stand one behind the other in one group of keys; end at most.
int64_t tokens_together(const int64_t* slots, int64_t t, int64_t end) {
  const int64_t most = kKeyGroup - slots[t] % kKeyGroup;
  int64_t count = 1;
  while (count < most && t + count < end && slots[t + count] == slots[t] + count) ++count;
  return count;
}

}  // namespace

void kv_write(const KvWriteArgs& a, Parallel& pool) {
  const CacheView& cache = a.cache;
  const int64_t E = cache.head_size;
  parallel_for(pool, (a.rows + kTokensPerChunk - 1) / kTokensPerChunk, [&](int64_t chunk, int) {
    const int64_t begin = chunk * kTokensPerChunk,
                  end = begin + kTokensPerChunk < a.rows ? begin + kTokensPerChunk : a.rows;
    float rotated[kKeyGroup * kMaxHead];
    for (int64_t t = begin, tokens = 1; t < end; t += tokens) {
      tokens = 1;
      if (a.slots[t] < 0) continue;
      tokens = tokens_together(a.slots, t, end);
      const int64_t block = a.slots[t] / kBlockTokens, at = a.slots[t] % kBlockTokens;
      for (int64_t g = 0; g < cache.kv_heads; ++g) {
        HeadRows k{a.k + t * a.k_stride + g * E, a.k_stride};
        const HeadRows v{a.v + t * a.v_stride + g * E, a.v_stride};
        if (a.cos) {
          for (int64_t i = 0; i < tokens; ++i)
            rotate(rotated + i * E, k.row(i), a.cos + (t + i) * a.half, a.sin + (t + i) * a.half, a.half, E);
          k = {rotated, E};
        }
        const int64_t head = block * cache.block_elements() + g * cache.head_elements();
        if (cache.dtype == DType::f32) {
          float* to = static_cast<float*>(cache.data) + head;
          if (g + 1 < cache.kv_heads) expect_f32(to + cache.head_elements(), cache, at, tokens);
          write_f32(to, cache, at, tokens, k, v);
          continue;
        }
        for (int64_t i = 0; i < tokens; ++i) {
          if (cache.dtype == DType::bf16)
            write_bf16(static_cast<uint16_t*>(cache.data) + head, cache, at + i, k.row(i), v.row(i));
          else
            write_i8(static_cast<int8_t*>(cache.data) + head, cache, at + i, k.row(i), v.row(i));
        }
      }
    }
  });
}

}  // namespace pyllm::PYLLM_ISA
