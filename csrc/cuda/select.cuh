// Selection in a row of logits by one block of threads: the largest, the border of a given mass by radix select, the place of a given
// mass. Masses are integers. Nothing is sorted, and nothing but the row is read.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx.cuh"

namespace pyllm::cuda {

using Mass = unsigned long long;

constexpr int kSelectThreads = 1024, kSelectWarps = kSelectThreads / 32;
constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;  // of the three digits of a key: 11, 11 and 10 bits

// What a block shares; it stands at the start of its shared memory.
struct SelectScratch {
  Mass histogram[kDigits];
  Mass slots[kSelectWarps];
  Mass found_mass;
  int64_t found;
};

// A logit as an integer of the same order; both zeros are one.
__device__ __forceinline__ uint32_t order_key(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float key_value(uint32_t key) {
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

template <class T, class Op>
__device__ T block_reduce(T v, Op op, SelectScratch& s) {
  for (int offset = 16; offset; offset /= 2) v = op(v, __shfl_xor_sync(0xffffffffu, v, offset));
  T* slots = reinterpret_cast<T*>(s.slots);
  __syncthreads();
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = v;
  __syncthreads();
  v = slots[0];
  for (int i = 1; i < kSelectWarps; ++i) v = op(v, slots[i]);
  return v;
}

template <class T>
__device__ T block_sum(T v, SelectScratch& s) {
  return block_reduce(v, [](T a, T b) { return a + b; }, s);
}

// The sum of the values of all lower threads.
__device__ inline Mass block_sum_below(Mass v, SelectScratch& s) {
  Mass sum = v;
  for (int offset = 1; offset < 32; offset *= 2) {
    const Mass other = __shfl_up_sync(0xffffffffu, sum, offset);
    if (int(threadIdx.x % 32) >= offset) sum += other;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 31) s.slots[threadIdx.x / 32] = sum;
  __syncthreads();
  Mass below = sum - v;
  for (unsigned i = 0; i < threadIdx.x / 32; ++i) below += s.slots[i];
  return below;
}

// The sum of mass(i) over [0, n).
template <class Fn>
__device__ Mass total_mass(int64_t n, Fn mass, SelectScratch& s) {
  Mass sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < n; i += kSelectThreads) sum += mass(i);
  return block_sum(sum, s);
}

// A logit and its place as an integer: the largest is that of the largest logit, of equal ones the first, or of one that is NaN or +inf.
__device__ __forceinline__ Mass peak_key(float v, int64_t place) {
  return v < INFINITY ? Mass(order_key(v)) << 32 | (0xffffffffu - uint32_t(place)) : ~Mass(0);
}

// The largest logit and its first place; -1 where one is NaN or +inf, or all are -inf.
struct Peak {
  float value;
  int32_t index;
};
__device__ __forceinline__ Peak peak_of(Mass key) {
  const float value = key_value(uint32_t(key >> 32));
  if (key == ~Mass(0) || value == -INFINITY) return {value, -1};
  return {value, int32_t(0xffffffffu - uint32_t(key))};
}
__device__ inline Peak find_peak(const float* x, int64_t n, SelectScratch& s) {
  Mass best = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < n; i += kSelectThreads) {
    const Mass mine = peak_key(x[i], i);
    best = mine > best ? mine : best;
  }
  return peak_of(block_reduce(best, [](Mass a, Mass b) { return a > b ? a : b; }, s));
}

// Walking [0, n) by falling keys: the last key before which less than `needed` mass has been passed, and how much lies above it.
// `needed` is at least 1 and at most the whole.
struct Border {
  uint32_t key;
  Mass above;
};
template <class Key, class Fn>
__device__ Border find_border(int64_t n, Key key, Fn mass, Mass needed, SelectScratch& s) {
  Border border{0, 0};
  for (int digit = 0, shift = 21; digit < 3; ++digit, shift = digit == 1 ? 10 : 0) {
    const int bits = digit == 2 ? 10 : kDigitBits;
    const uint32_t lowest = (1u << bits) - 1;
    __syncthreads();
    for (int i = threadIdx.x; i < kDigits; i += kSelectThreads) s.histogram[i] = 0;
    __syncthreads();
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < n; i += kSelectThreads) {
      const uint32_t k = key(i);
      if (digit > 0 && (k ^ border.key) >> (shift + bits)) continue;
      if (const Mass m = mass(i)) atomicAdd(&s.histogram[k >> shift & lowest], m);
    }
    __syncthreads();
    // Thread t has two digits, the largest first.
    const int high = kDigits - 1 - 2 * int(threadIdx.x);
    const Mass first = s.histogram[high], second = s.histogram[high - 1];
    const Mass before = border.above + block_sum_below(first + second, s);
    if (before < needed && before + first + second >= needed) {
      const bool in_first = before + first >= needed;
      s.found = in_first ? high : high - 1;
      s.found_mass = in_first ? before : before + first;
    }
    __syncthreads();
    border.key |= uint32_t(s.found) << shift;
    border.above = s.found_mass;
  }
  __syncthreads();
  return border;
}

// The first place up to which more than `target` mass lies; target is less than the whole.
template <class Fn>
__device__ int64_t find_place(int64_t n, Fn mass, Mass target, SelectScratch& s) {
  int64_t begin = 0, end = n;
  Mass before = 0;
  while (end - begin > kSelectThreads) {  // every warp sums a piece; the one that passes the target is looked at again
    const int64_t piece = ((end - begin + kSelectThreads - 1) / kSelectThreads) * 32;
    const int64_t from = begin + threadIdx.x / 32 * piece, to = from + piece < end ? from + piece : end;
    Mass sum = 0;
    for (int64_t i = from + threadIdx.x % 32; i < to; i += 32) sum += mass(i);
    for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    __syncthreads();
    if (threadIdx.x % 32 == 0) s.slots[threadIdx.x / 32] = sum;
    __syncthreads();
    int i = 0;
    for (; i < kSelectWarps - 1 && before + s.slots[i] <= target; ++i) before += s.slots[i];
    begin += i * piece;
    end = begin + piece < end ? begin + piece : end;
  }
  const int64_t i = begin + threadIdx.x;
  const Mass mine = i < end ? mass(i) : 0, below = before + block_sum_below(mine, s);
  if (below <= target && target < below + mine) s.found = i;
  __syncthreads();
  const int64_t place = s.found;
  __syncthreads();
  return place;
}

}  // namespace pyllm::cuda
