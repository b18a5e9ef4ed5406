// Layer norm and RMS norm. A vector is taken by one warp where it is short, as heads are, else by a block; each thread keeps its
// elements in shared memory between the passes.
#include "cuda/launch.h"
#include "cuda/layers.h"
#include "cuda/rows.cuh"
#include "cuda/warp.cuh"

namespace pyllm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kWarpDim = 512;  // a warp takes no longer vectors

// The sum over kWarps warps in rising order, the same bits in each of their threads.
template <int kWarps>
__device__ __forceinline__ float team_sum(float v, float* slots) {
  v = warp_sum(v);
  if (kWarps == 1) return v;
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = v;
  __syncthreads();
  v = 0.0f;
  for (int i = 0; i < kWarps; ++i) v += slots[i];
  __syncthreads();
  return v;
}

template <int kWarps, class Y>
__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ NormArgs a) {
  constexpr int kTeam = kWarps * 32, kTeams = kThreads / kTeam;
  const int team = threadIdx.x / kTeam, lane = threadIdx.x % kTeam;
  float* slots = reinterpret_cast<float*>(shared_memory());
  float* kept = slots + kThreads / 32 + team * a.dim;
  const int64_t vector = int64_t(blockIdx.x) * kTeams + team, row = vector / a.heads, head = vector % a.heads;
  wait_for_earlier_kernels();
  let_later_kernels_start();
  if (row >= a.rows) return;

  const float* x = a.x + row * a.x_stride + head * a.dim;
  const float* residual = a.residual ? a.residual + row * a.residual_stride + head * a.dim : nullptr;
  float* sum = a.sum ? a.sum + row * a.sum_stride + head * a.dim : nullptr;
  float total = 0.0f;
  for (int64_t i = lane; i < a.dim; i += kTeam) {
    const float v = residual ? x[i] + residual[i] : x[i];
    if (sum) sum[i] = v;
    kept[i] = v;
    total += v;
  }
  const float mean = a.kind == NormKind::layer ? team_sum<kWarps>(total, slots) / float(a.dim) : 0.0f;
  total = 0.0f;
  for (int64_t i = lane; i < a.dim; i += kTeam) {
    const float d = kept[i] - mean;
    total += d * d;
  }
  const float scale = 1.0f / sqrtf(team_sum<kWarps>(total, slots) / float(a.dim) + a.eps);
  Y* y = static_cast<Y*>(a.y) + row * a.y_stride + head * a.dim;
  for (int64_t i = lane; i < a.dim; i += kTeam) {
    float v = (kept[i] - mean) * scale;
    if (a.weight) v *= a.weight[i];
    if (a.bias) v += a.bias[i];
    store(y + i, v);
  }
}

template <int kWarps>
cudaError_t launch_teams(const NormArgs& a, cudaStream_t stream) {
  constexpr int kTeams = kThreads / 32 / kWarps;
  const dim3 grid(unsigned((a.rows * a.heads + kTeams - 1) / kTeams));
  return launch(a.y_dtype == DType::f32 ? norm_kernel<kWarps, float> : norm_kernel<kWarps, bf16>, a, grid, kThreads,
                (kThreads / 32 + kTeams * a.dim) * 4, stream);
}

}  // namespace

cudaError_t norm(const NormArgs& args, cudaStream_t stream) {
  if (args.rows * args.heads * args.dim == 0) return cudaSuccess;
  if (args.dim > kMaxNormDim) return cudaErrorInvalidValue;
  return args.dim <= kWarpDim ? launch_teams<1>(args, stream) : launch_teams<kThreads / 32>(args, stream);
}

}  // namespace pyllm::cuda
