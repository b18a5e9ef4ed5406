// Rows of tables: of token embeddings, with those of positions added, or of a step's activations; and columns of tables.
#include "cuda/launch.h"
#include "cuda/layers.h"
#include "cuda/rows.cuh"

namespace pyllm::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kRowThreads) embedding_kernel(const __grid_constant__ EmbeddingArgs a) {
  wait_for_earlier_kernels();
  let_later_kernels_start();
  const int64_t row = blockIdx.x, token = a.tokens[row], position = a.position_table ? a.positions[row] : 0;
  const bool known =
      token >= 0 && token < a.vocab && (!a.position_table || (position >= 0 && position < a.position_rows));
  const T* from = static_cast<const T*>(a.table) + token * a.table_stride;
  const float* added = a.position_table ? a.position_table + position * a.position_stride : nullptr;
  float* y = a.y + row * a.y_stride;
  for_columns(a.dim, [&](int64_t i) {
    const float v = known ? to_float(from[i]) : NAN;
    y[i] = known && added ? v + added[i] : v;
  });
}

__global__ void __launch_bounds__(kRowThreads) gather_columns_kernel(const __grid_constant__ GatherColumnsArgs a) {
  const int64_t row = blockIdx.x;
  wait_for_earlier_kernels();
  let_later_kernels_start();
  for_columns(a.columns, [&](int64_t i) { a.y[row * a.y_stride + i] = a.x[row * a.x_stride + a.index[i]]; });
}

}  // namespace

cudaError_t gather_columns(const GatherColumnsArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.columns == 0) return cudaSuccess;
  if (args.columns > kMaxRowWidth) return cudaErrorInvalidValue;
  return launch(gather_columns_kernel, args, row_grid(args.rows, args.columns), kRowThreads, 0, stream);
}

cudaError_t embedding(const EmbeddingArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.dim == 0) return cudaSuccess;
  if (args.dim > kMaxRowWidth) return cudaErrorInvalidValue;
  return launch(args.table_dtype == DType::f32 ? embedding_kernel<float> : embedding_kernel<bf16>, args,
                row_grid(args.rows, args.dim), kRowThreads, 0, stream);
}

}  // namespace pyllm::cuda
