// Argument structs of the kernels, one each, shared by every backend.
//
// Shapes: T tokens (rows) of all sequences of a step, B sequences, D model, H heads, G key/value heads, E head size,
// N outputs, K inner dimension, V vocabulary, R rows. Strides are in elements between rows; the last dimension is contiguous.
// Order: outputs, inputs, weights, scalars, workspace. Rows and sequences may number zero.
#pragma once
#include "core/types.h"

namespace pyllm {

// Packs rows [row, row + rows) of one part of a packed matrix from src[rows, K], any strides, any of the float dtypes.
// Integers: to the nearest value, after the scale (symmetric int4: the one of several that leaves the least squared error). A
// group with a value that is not finite gets a scale of NaN. dst.has_zeros is false.
struct PackArgs {
  PackedView dst;
  const void* src;
  DType src_dtype;
  int64_t row, rows;
  int64_t row_stride, col_stride;  // of src, in elements; src may be unaligned
  int32_t part;
};

// Packs integers that exist already, losslessly, into the same rows.
struct PackQuantizedArgs {
  PackedView dst;
  const uint8_t*
      values;  // [rows, K] int8 as w + 128, or [rows, K / 2 rounded up] int4 as w + 8, the lower k in the low nibble
  const void* scales;    // [rows, groups] of scale_dtype, which dst.scale_dtype holds exactly
  const uint8_t* zeros;  // [rows, groups], or null where dst has none
  DType scale_dtype;
  int64_t row, rows;
  int64_t values_stride, scales_stride, zeros_stride;
  int32_t part;
};

// y = act(x W^T + bias) + residual;  gated: y = act(x Wgate^T + bias) * (x Wup^T + bias_up) + residual.
// Every output is one chain of multiply-adds over k in rising order, whatever T is and however the work is split, so a row's
// result does not depend on the other rows. bf16 weights: where the instruction set has bf16 dot products x is rounded to bf16
// (nearest even) and pairs are summed as it does (by AMX, 32 k at a time), with denormals taken as 0; elsewhere the weights
// are widened. f16 weights are always widened, exactly.
// Integer weights: x is rounded to int8, with one scale for each row and 256 elements: largest magnitude / 127.
// Products and their sum over a group are exact; groups are then added in rising order, in float32. A row of x that holds a value
// that is not finite gives NaN.
struct MatmulArgs {
  float* y;               // [T, N]
  const float* x;         // [T, K]
  PackedView w;           // [N, K]
  const float* bias;      // [N] or null
  const float* bias_up;   // [N] or null, gated only
  const float* residual;  // [T, N] or null; may be y itself
  float* pre;             // [T, N], gated [T, 2N], gate then up: what act is applied to; or null
  int64_t rows, x_stride, y_stride, residual_stride, pre_stride;
  Activation activation;
  void* workspace;
};

// y = norm(x + residual) * weight + bias, over the last dimension; the sum is also stored where sum is not null (may be x).
// A row may hold several heads that are normalised each by itself, with the same weight and bias.
struct NormArgs {
  float* y;               // [R, heads, D], may be x
  float* sum;             // [R, heads, D] or null; not y
  const float* x;         // [R, heads, D]
  const float* residual;  // [R, heads, D] or null
  const float* weight;    // [D] or null
  const float* bias;      // [D] or null
  int64_t rows, heads, dim;
  int64_t y_stride, sum_stride, x_stride, residual_stride;  // between rows; heads are adjacent
  float eps;
  NormKind kind;
};

// dx = the gradient of norm(x) * weight + bias with respect to x, plus residual; dweight and dbias += theirs. The sums
// over rows are taken in chunks of rows that depend on the number of rows alone, and added in rising order.
struct NormBackwardArgs {
  float* dx;              // [R, heads, D], may be dy or residual
  float* dweight;         // [D] or null
  float* dbias;           // [D] or null
  const float* dy;        // [R, heads, D]
  const float* x;         // [R, heads, D], what was normalised
  const float* residual;  // [R, heads, D] or null
  const float* weight;    // [D] or null
  int64_t rows, heads, dim;
  int64_t dx_stride, dy_stride, x_stride, residual_stride;
  float eps;
  NormKind kind;
  void* workspace;
};

// y = act(x), or act(x) * up where up is not null.
struct ActivationArgs {
  float* y;         // [R, D], may be x
  const float* x;   // [R, D]
  const float* up;  // [R, D] or null
  int64_t rows, dim, x_stride, up_stride, y_stride;
  Activation activation;
};

// out = a x + b y, one multiply-add on b y; a x where y is null.
struct AxpbyArgs {
  float* out;      // [R, D], may be x or y
  const float* x;  // [R, D]
  const float* y;  // [R, D] or null
  int64_t rows, dim, out_stride, x_stride, y_stride;
  float a, b;
};

// x becomes what lies nearest to it between -limit and limit; NaN stays.
struct ClampArgs {
  float* x;  // [R, D]
  int64_t rows, dim, x_stride;
  float limit;
};

// dx becomes 0 where x, which has been clamped, lies at a limit: overwrites dx, which holds the gradient of what came out.
struct ClampBackwardArgs {
  float* dx;       // [R, D]
  const float* x;  // [R, D]
  int64_t rows, dim, dx_stride, x_stride;
  float limit;
};

// y[t] = table[tokens[t]] + position_table[positions[t]] + type_table[types[t]], added in this order; ids are checked by the caller.
struct EmbeddingArgs {
  float* y;                  // [T, D]
  const int32_t* tokens;     // [T]
  const int32_t* positions;  // [T] or null
  PackedView packed;         // the table when packed.data is not null
  const void* table;         // else [V, D], rows of dtype, any alignment
  DType table_dtype;
  int64_t table_stride;
  const float* position_table;  // [P, D] or null
  const int32_t* types;         // [T] or null
  const float* type_table;      // [S, D] or null: of token types, or second positions
  int64_t rows, dim, y_stride, position_stride, type_stride;
  int64_t vocab, position_rows, type_rows;  // V, P, S
};

// dtable[tokens[t]] += dy[t], and so for positions and types, in rising t.
struct EmbeddingBackwardArgs {
  PackedView packed;       // float32, the gradient of the table when packed.data is not null
  float* dtable;           // else [V, D]
  float* dposition_table;  // [P, D] or null
  float* d_type_table;     // [S, D] or null
  const float* dy;         // [T, D]
  const int32_t* tokens;   // [T]
  const int32_t* positions;
  const int32_t* types;
  int64_t rows, dim, dy_stride, table_stride, position_stride, type_stride;
  int64_t vocab, position_rows, type_rows;
};

// y[r] = x[index[r]]
struct GatherArgs {
  float* y;              // [R, D]
  const float* x;        // [T, D]
  const int32_t* index;  // [R]
  int64_t rows, dim, x_stride, y_stride;
  int64_t x_rows;  // T
};

// dx = 0, then dx[index[r]] += dy[r], in rising r.
struct GatherBackwardArgs {
  float* dx;             // [T, D]
  const float* dy;       // [R, D]
  const int32_t* index;  // [R]
  int64_t rows, dim, dx_stride, dy_stride;
  int64_t x_rows;  // T
};

// y[b] = one row from rows starts[b] .. starts[b + 1] of x, taken in rising order; 0 where there are none.
struct PoolArgs {
  float* y;               // [B, D]
  const float* x;         // [T, D]
  const int32_t* starts;  // [B + 1], rising from 0 to T
  int64_t sequences, dim, y_stride, x_stride;
  int64_t x_rows;  // T
  Pooling pooling;
};

// dx = the gradient of pool; of a maximum it goes to the first row that has it.
struct PoolBackwardArgs {
  float* dx;        // [T, D]
  const float* dy;  // [B, D]
  const float* x;   // [T, D], read for the maximum only, or null
  const int32_t* starts;
  int64_t sequences, dim, dx_stride, dy_stride, x_stride;
  int64_t x_rows;
  Pooling pooling;
};

// y = dropout(x) + residual. Whether an element is kept depends on its row and column besides seed and site.
struct DropoutArgs {
  float* y;               // [R, D], may be x or residual
  const float* x;         // [R, D]
  const float* residual;  // [R, D] or null
  int64_t rows, dim, y_stride, x_stride, residual_stride;
  Dropout dropout;
};

// Softmax cross-entropy, and in place of the logits its gradient times scale[0] unless scale is null:
// loss = (1 - smoothing) (lse - logits[label]) + smoothing (lse - mean of logits) + z_loss lse^2. A row whose label is
// kIgnoredLabel has no loss and no gradient.
constexpr int32_t kIgnoredLabel = -100;
struct CrossEntropyArgs {
  float* logits;          // [R, V], becomes the gradient
  float* loss;            // [R]
  const int32_t* labels;  // [R]
  const float* scale;     // [1] or null
  int64_t rows, vocab, stride;
  float z_loss, label_smoothing;
};

// A loss for each number of a row, and in place of the numbers x its gradient times scale[0] unless scale is null. A target
// that is NaN does not count. sigmoid_cross_entropy: loss = log(1 + e^x) - x target; squared_error: (x - target)^2.
struct ElementLossArgs {
  float* x;              // [R, N], becomes the gradient
  float* loss;           // [R], sums over the row
  const float* targets;  // [R, N]
  const float* scale;    // [1] or null
  int64_t rows, dim, x_stride, targets_stride;
};

// y[r, i] = x[r, index[i]]
struct GatherColumnsArgs {
  float* y;                                              // [R, N]
  const float* x;                                        // [R, D]
  const int32_t* index;                                  // [N]
  int64_t rows, columns, x_columns, y_stride, x_stride;  // N, D
};

// dx[r, index[i]] += dy[r, i], in rising i.
struct GatherColumnsBackwardArgs {
  float* dx;             // [R, D]
  const float* dy;       // [R, N]
  const int32_t* index;  // [N]
  int64_t rows, columns, x_columns, dx_stride, dy_stride;
};

// cos/sin[t, i] = scaling * cos/sin(positions[t] * inv_freq[table[t], i]), angles in float32 as the published models compute them.
struct RopeAnglesArgs {
  float* cos;                   // [T, half]
  float* sin;                   // [T, half]
  const int32_t* positions;     // [T]
  const float* inv_freq;        // [C, half]
  const int32_t* table;         // [T], which row of inv_freq, or null for row 0
  int64_t rows, half, classes;  // classes: C
  float scaling;
};

// Rotates channel pairs (i, i + half), i < half, of every head in place; channels from 2 * half on pass through. Inverse:
// by the angle's opposite, which takes gradients back (times the scaling, as cos and sin hold it).
struct RopeArgs {
  float* x;          // [T, heads, E]
  const float* cos;  // [T, half]
  const float* sin;  // [T, half]
  int64_t rows, heads, head_size, half;
  int64_t x_stride;  // between tokens; heads are adjacent
  bool inverse;
};

// Writes each token's keys (rotated first where cos is not null) and values into its slot = block * kBlockTokens + offset.
// A negative slot is skipped.
struct KvWriteArgs {
  CacheView cache;
  const float* k;    // [T, G, E]
  const float* v;    // [T, G, E]
  const float* cos;  // [T, half] or null
  const float* sin;
  const int64_t* slots;  // [T]
  int64_t rows, half, k_stride, v_stride;
};

// Which keys a query sees. Query row i (0-based) of sequence b stands at position p = lengths[b] - (starts[b + 1] -
// starts[b]) + i, and sees key j < lengths[b] where both hold:
//   j <= p, or j < prefix[b], or not causal
//   window == 0, or p - j < window and (causal or j - p < window), or j < sinks
// Without causal, window and what depends on p, queries and keys need not be those of one sequence (cross-attention).
struct AttentionRule {
  const int32_t* prefix;  // [B], at most lengths[b], or null: 0; causal only
  int64_t window, sinks;
  bool causal;
};

// What becomes of a score, scale * q k, before the softmax: softcap * tanh(score / softcap) where softcap > 0, and then
// bias[h, j - p] + slopes[h] * (j - p) more, for key j and a query at position p as above. Bias has a column for each
// distance from -reach to reach; those beyond take the outer ones.
struct AttentionScores {
  const float* bias;    // [H, 2 * reach + 1] or null
  const float* slopes;  // [H] or null
  int64_t reach;
  float softcap;

  constexpr bool changed() const { return bias || slopes || softcap > 0; }
};

// Attention of a ragged batch over the paged cache, which already holds this step's keys and values.
// A query that sees no key gives 0, and an lse of -infinity.
// Keys are taken in fixed blocks of kKeyBlock; each gives (max, sum, weighted values), merged in rising order, so a row's
// result depends neither on the other rows nor on how work is split.
// Dropout acts on the softmax's weights; the place of a weight is its head, its query's row in q and its key's position.
constexpr int64_t kKeyBlock = 256;
struct AttentionArgs {
  float* out;      // [T, H, E]
  float* lse;      // [T, H] log of the sum of exponentials of scores, or null
  const float* q;  // [T, H, E], already rotated
  CacheView cache;
  const int32_t* starts;   // [B + 1] first row of each sequence
  const int32_t* lengths;  // [B] keys in the cache, this step's included
  const int32_t* tables;   // [B, table_width] block numbers
  AttentionRule rule;
  AttentionScores scores;
  int64_t sequences, rows, heads, table_width;
  int64_t q_stride, out_stride;
  float scale;
  bool bf16_dots;  // multiply a bf16 cache by bf16 where the level can, rounding queries and weights; or else widen it
  Dropout dropout;
  void* workspace;
};

// Gradients of attention. dk and dv have a row for each of the S keys: those of sequence 0, then those of sequence 1, and
// so on. With P = exp(score - lse), D = sum over channels of dout * out and m the dropout's factors:
//   dv += (m P)^T dout    dS = P (m (dout v^T) - D)    dq += scale dS' k    dk += scale dS'^T q    dbias[j - p] += dS
// where dS' is dS times the slope of softcap. Keys are taken in fixed pages, queries in fixed blocks, both of their
// sequence, in rising order; heads of a group are added in rising order. So a sequence's gradients depend neither on the
// others nor on how work is split. dbias is summed over each sequence by itself, then over sequences in rising order.
struct AttentionBackwardArgs {
  float* dq;          // [T, H, E]
  float* dk;          // [S, G, E]
  float* dv;          // [S, G, E]
  float* dbias;       // [H, 2 * reach + 1] or null; added to where add_dbias
  const float* dout;  // [T, H, E]
  const float* out;   // [T, H, E]
  const float* q;     // [T, H, E]
  CacheView cache;    // f32 or bf16
  const float* lse;   // [T, H]
  const int32_t* starts;
  const int32_t* lengths;  // [B], S in all
  const int32_t* tables;
  AttentionRule rule;
  AttentionScores scores;
  int64_t sequences, rows, keys, heads, table_width;  // keys: S
  int64_t dq_stride, dk_stride, dv_stride, dout_stride, out_stride, q_stride;
  float scale;
  bool bf16_dots;  // of the forward pass
  bool add_dbias;
  Dropout dropout;
  void* workspace;
};

}  // namespace pyllm
