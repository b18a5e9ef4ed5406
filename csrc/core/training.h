// Argument structs of the kernels that train matrices: gradients of the matmul and of activations, and the optimizer. Letters and
// order as in args.h. Gradients of parameters accumulate, gradients of activations overwrite.
#pragma once
#include "core/types.h"

namespace pyllm {

// dx = dy W, the gradient of matmul's x from that of its pre-activations. Every output is one chain of multiply-adds over the
// columns of dy in the order of the packed panels, beginning with what dx holds where `add`, whatever T is and however the
// work is split. Narrow weights are widened.
struct MatmulDxArgs {
  float* dx;        // [T, K]
  const float* dy;  // [T, N], gated: [T, 2N], gate then up
  PackedView w;     // [N, K], not of integers
  int64_t rows, dx_stride, dy_stride;
  bool add;
  void* workspace;
};

// dW += dy^T x, in the panels of W. Every element is one chain of multiply-adds over rising rows that begins with what dw
// holds: the rows of a step may be cut into several calls, which give the same bits.
struct MatmulDwArgs {
  PackedView dw;    // [N, K] float32
  const float* dy;  // [T, N], gated: [T, 2N], gate then up
  const float* x;   // [T, K]
  int64_t rows, dy_stride, x_stride;
  void* workspace;
};

// out[n] += sum of x[r, n] over rising r, one chain for each column.
struct ColumnSumArgs {
  float* out;      // [N]
  const float* x;  // [R, N]
  int64_t rows, columns, x_stride;
};

// dpre = dy * act'(pre); gated, of y = act(gate) * up with pre = [gate, up]: [dy * up * act'(gate), dy * act(gate)].
struct ActivationBackwardArgs {
  float* dpre;       // [R, D], gated [R, 2D]; may be pre, and dy where not gated
  const float* dy;   // [R, D]
  const float* pre;  // [R, D], gated [R, 2D]
  int64_t rows, dim, dpre_stride, dy_stride, pre_stride;
  Activation activation;
  bool gated;
};

// dst = the weights of a packed matrix of floats, part 0 above part 1.
struct UnpackArgs {
  float* dst;      // [parts * N, K]
  PackedView src;  // not of integers
  int64_t dst_stride;
};

// One step of AdamW with decoupled decay, of `count` parameters:
//   g = grads * scale;  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
//   params = params (1 - rate decay) - rate / correction1 * m / (sqrt(v / correction2) + eps)
struct AdamWArgs {
  float* params;  // [count]
  float* grads;   // [count], zeroed where `clear`
  float* m;       // [count]
  float* v;       // [count]
  // [7]: rate, beta1, beta2, eps, 1 - beta1^t, 1 - beta2^t, scale; float64, as 1 - beta2 loses digits otherwise
  const double* hyper;
  PackedView narrow;  // bf16, receives params, which then are the panels of such a matrix in float32; or data is null
  int64_t count;
  double decay;
  bool clear;
};

// out[0] += sum of squares, added in a fixed order: float32 within kSquareBlock elements, float64 beyond.
constexpr int64_t kSquareBlock = 1024;
constexpr int64_t kSquareChunk = 64 * kSquareBlock;
struct SquareNormArgs {
  double* out;     // [1]
  const float* x;  // [count]
  int64_t count;
  void* workspace;  // double [chunks of kSquareChunk]
};

}  // namespace pyllm
