// The small kernels of a forward pass on an NVIDIA GPU. Letters as in core/args.h, whose structs are used where nothing is added;
// activations are float32, and where a dtype is named float32 or bf16. The launchers return cudaErrorInvalidValue for what they cannot take.
#pragma once
#include <cuda_runtime.h>

#include "core/args.h"

namespace pyllm::cuda {

// Columns that a kernel takes element by element.
constexpr int64_t kMaxRowWidth = 65535 * 1024;

// y = norm(x + residual) * weight + bias over the last dimension; the sum is also stored where sum is not null.
// A vector's result depends on the vector and D alone.
constexpr int64_t kMaxNormDim = 25000;  // a vector is kept in shared memory, of which every GPU has 99 KB
struct NormArgs {
  void* y;                // [R, heads, D] of y_dtype, may be x where that is float32
  float* sum;             // [R, heads, D] or null, may be x
  const float* x;         // [R, heads, D]
  const float* residual;  // [R, heads, D] or null
  const float* weight;    // [D] or null
  const float* bias;      // [D] or null
  int64_t rows, heads, dim;
  int64_t y_stride, sum_stride, x_stride, residual_stride;  // between rows; heads are adjacent
  float eps;
  NormKind kind;
  DType y_dtype;
};
cudaError_t norm(const NormArgs& args, cudaStream_t stream);

// y = act(x), or act(x) * up where up is not null. Without an activation it rounds to bf16, or widens.
struct ActivationArgs {
  void* y;         // [R, D] of y_dtype, may be x where the dtypes are equal
  const void* x;   // [R, D] of x_dtype
  const void* up;  // [R, D] of x_dtype, or null
  int64_t rows, dim, x_stride, up_stride, y_stride;
  Activation activation;
  DType x_dtype, y_dtype;
};
cudaError_t activation(const ActivationArgs& args, cudaStream_t stream);

// out = a x + b y, one multiply-add on b y; a x where y is null.
cudaError_t axpby(const AxpbyArgs& args, cudaStream_t stream);

// y[t] = table[tokens[t]] + position_table[positions[t]]. A row whose token or position is outside its table is NaN: ids may come from
// a kernel, which says -1 where nothing could be chosen.
struct EmbeddingArgs {
  float* y;                     // [T, D]
  const int32_t* tokens;        // [T]
  const int32_t* positions;     // [T] or null
  const void* table;            // [V, D] of table_dtype
  const float* position_table;  // [P, D] or null
  int64_t rows, dim, y_stride, table_stride, position_stride;
  int64_t vocab, position_rows;  // V, P
  DType table_dtype;
};
cudaError_t embedding(const EmbeddingArgs& args, cudaStream_t stream);

// y[r, i] = x[r, index[i]]
cudaError_t gather_columns(const GatherColumnsArgs& args, cudaStream_t stream);

cudaError_t rope_angles(const RopeAnglesArgs& args, cudaStream_t stream);
cudaError_t rope(const RopeArgs& args, cudaStream_t stream);

// The cache is float32 or bf16, in the layout of cuda/attention.h. Slots past the last block are skipped too.
cudaError_t kv_write(const KvWriteArgs& args, cudaStream_t stream);

}  // namespace pyllm::cuda
