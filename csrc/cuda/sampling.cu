// The choice of the next token from a row of logits, and log-probabilities: a block of threads for a row.
#include "core/random.h"
#include "cuda/launch.h"
#include "cuda/sampling.h"
#include "cuda/select.cuh"

namespace pyllm::cuda {
namespace {

// Penalties, biases and the list of allowed ids, in place.
__device__ void adjust(const SampleArgs& a, int64_t r, float* x) {
  const SampleRow& row = a.rows[r];
  if (a.history.starts) {
    for (int64_t i = a.history.starts[r] + threadIdx.x; i < a.history.starts[r + 1]; i += kSelectThreads) {
      float v = x[a.history.ids[i]];
      v = v < 0 ? v * row.repetition_penalty : v / row.repetition_penalty;
      const int32_t count = a.history_counts[i];
      if (count > 0) v -= row.frequency_penalty * float(count) + row.presence_penalty;
      x[a.history.ids[i]] = v;
    }
    __syncthreads();
  }
  if (a.bias.starts) {  // an id may stand twice: with a number, and with -inf
    for (int64_t i = a.bias.starts[r] + threadIdx.x; i < a.bias.starts[r + 1]; i += kSelectThreads)
      atomicAdd(x + a.bias.ids[i], a.bias_values[i]);
    __syncthreads();
  }
  if (a.allowed.starts && a.allowed.starts[r + 1] > a.allowed.starts[r]) {
    float* kept = static_cast<float*>(a.workspace);
    for (int64_t i = a.allowed.starts[r] + threadIdx.x; i < a.allowed.starts[r + 1]; i += kSelectThreads)
      kept[i] = x[a.allowed.ids[i]];
    __syncthreads();
    for (int64_t i = threadIdx.x; i < a.vocab; i += kSelectThreads) x[i] = -INFINITY;
    __syncthreads();
    for (int64_t i = a.allowed.starts[r] + threadIdx.x; i < a.allowed.starts[r + 1]; i += kSelectThreads)
      x[a.allowed.ids[i]] = kept[i];
    __syncthreads();
  }
}

// Token of a row: which tokens stay is told by the key of the least one, and the last of those that equal it.
__device__ int32_t choose(const SampleRow& row, const float* x, int64_t n, SelectScratch& s) {
  constexpr float kUnit = 1099511627776.0f;  // 2^40, the mass of the largest
  const Peak peak = find_peak(x, n, s);
  if (peak.index < 0 || row.temperature < kGreedyBelow) return peak.index;
  const auto key = [&](int64_t i) { return order_key(x[i]); };
  const float sharpness = 1.0f / row.temperature;
  uint32_t least = 0;
  if (row.top_k > 0 && row.top_k < n)
    least = find_border(n, key, [](int64_t) { return Mass(1); }, Mass(row.top_k), s).key;
  const auto weigh = [&](float v) { return expf((v - peak.value) * sharpness); };
  const auto mass = [&](int64_t i) { return key(i) >= least ? Mass(weigh(x[i]) * kUnit) : Mass(0); };
  int64_t last_equal = n;
  if (row.top_p < 1) {
    const double share = double(row.top_p) * double(total_mass(n, mass, s));
    Mass needed = Mass(share);
    if (double(needed) < share || needed == 0) ++needed;
    const Border border = find_border(n, key, mass, needed, s);
    const Mass each = Mass(weigh(key_value(border.key)) * kUnit);
    const Mass equals = (needed - border.above + each - 1) / each;
    last_equal = find_place(n, [&](int64_t i) { return Mass(key(i) == border.key); }, equals - 1, s);
    least = border.key;
  }
  const auto kept = [&](int64_t i) {
    const uint32_t k = key(i);
    if (k < least || (k == least && i > last_equal)) return Mass(0);
    const float w = weigh(x[i]);
    return w >= row.min_p ? Mass(w * kUnit) : Mass(0);
  };
  const Mass total = total_mass(n, kept, s);
  Mass target = Mass(uniform(row.seed, row.stream, row.position) * double(total));
  if (target >= total) target = total - 1;
  return int32_t(find_place(n, kept, target, s));
}

__global__ void __launch_bounds__(kSelectThreads) sample_kernel(const __grid_constant__ SampleArgs a) {
  wait_for_earlier_kernels();
  let_later_kernels_start();
  SelectScratch& s = *reinterpret_cast<SelectScratch*>(shared_memory());
  const int64_t r = blockIdx.x;
  float* x = a.logits + r * a.stride;
  adjust(a, r, x);
  const int32_t token = choose(a.rows[r], x, a.vocab, s);
  if (threadIdx.x == 0) a.tokens[r] = token;
}

struct TopScratch {
  SelectScratch select;
  Mass largest[kMaxTop];  // key, then places falling
  uint32_t count;
};

// The `top_n` largest, falling; ids -1 past the last finite one.
template <class Logprob>
__device__ void find_top(const LogprobsArgs& a, int64_t r, const float* x, Logprob logprob, TopScratch& s) {
  const auto key = [&](int64_t i) { return order_key(x[i]); };
  const auto finite = [&](int64_t i) { return Mass(x[i] != -INFINITY); };
  const Mass available = total_mass(a.vocab, finite, s.select);
  const int64_t wanted = available < Mass(a.top_n) ? int64_t(available) : a.top_n;
  const Border border = find_border(a.vocab, key, finite, Mass(wanted), s.select);
  const int64_t last_equal = find_place(
      a.vocab, [&](int64_t i) { return Mass(key(i) == border.key); }, Mass(wanted) - border.above - 1, s.select);
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < a.vocab; i += kSelectThreads)
    if (key(i) > border.key || (key(i) == border.key && i <= last_equal))
      s.largest[atomicAdd(&s.count, 1u)] = Mass(key(i)) << 32 | (0xffffffffu - uint32_t(i));
  __syncthreads();
  for (int64_t j = threadIdx.x; j < a.top_n; j += kSelectThreads) {
    int64_t place = j;
    float value = -INFINITY;
    int32_t id = -1;
    if (j < wanted) {
      place = 0;
      for (int64_t i = 0; i < wanted; ++i) place += s.largest[i] > s.largest[j];
      id = int32_t(0xffffffffu - uint32_t(s.largest[j]));
      value = logprob(x[id]);
    }
    a.top[r * a.top_n + place] = value;
    a.top_ids[r * a.top_n + place] = id;
  }
}

__global__ void __launch_bounds__(kSelectThreads) logprobs_kernel(const __grid_constant__ LogprobsArgs a) {
  wait_for_earlier_kernels();
  let_later_kernels_start();
  TopScratch& s = *reinterpret_cast<TopScratch*>(shared_memory());
  const int64_t r = blockIdx.x, id = a.ids[r];
  const float* x = a.logits + r * a.stride;
  const Peak peak = find_peak(x, a.vocab, s.select);
  const bool known = peak.index >= 0 && id >= 0 && id < a.vocab;
  if (threadIdx.x == 0 && !known) {
    a.chosen[r] = NAN;
    a.ranks[r] = 0;
  }
  if (peak.index < 0) {
    for (int64_t j = threadIdx.x; j < a.top_n; j += kSelectThreads) {
      a.top[r * a.top_n + j] = NAN;
      a.top_ids[r * a.top_n + j] = -1;
    }
    return;
  }
  const float mark = known ? x[id] : INFINITY;
  double sum = 0.0;
  Mass above = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < a.vocab; i += kSelectThreads) {
    sum += double(expf(x[i] - peak.value));
    above += x[i] > mark;
  }
  const double log_total = log(block_sum(sum, s.select));
  above = block_sum(above, s.select);
  const auto logprob = [&](float v) { return float(double(v) - double(peak.value) - log_total); };
  if (threadIdx.x == 0 && known) {
    a.chosen[r] = logprob(mark);
    a.ranks[r] = int32_t(above) + 1;
  }
  if (a.top_n > 0) find_top(a, r, x, logprob, s);
}

}  // namespace

cudaError_t sample(const SampleArgs& args, cudaStream_t stream) {
  if (args.count == 0) return cudaSuccess;
  if (args.vocab > kMaxVocab) return cudaErrorInvalidValue;
  return launch(sample_kernel, args, dim3(unsigned(args.count)), kSelectThreads, int64_t(sizeof(SelectScratch)),
                stream);
}

cudaError_t logprobs(const LogprobsArgs& args, cudaStream_t stream) {
  if (args.count == 0) return cudaSuccess;
  if (args.vocab > kMaxVocab || args.top_n > kMaxTop) return cudaErrorInvalidValue;
  return launch(logprobs_kernel, args, dim3(unsigned(args.count)), kSelectThreads, int64_t(sizeof(TopScratch)), stream);
}

}  // namespace pyllm::cuda
