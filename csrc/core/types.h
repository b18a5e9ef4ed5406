// Plain types shared by every backend: dtypes, enums, the packed weight view. No behaviour beyond arithmetic on sizes.
#pragma once
#include <cstdint>

namespace pyllm {

enum class DType : int32_t { f32 = 0, f16 = 1, bf16 = 2, i8 = 3, i4 = 4 };
constexpr int64_t dtype_bits(DType t) { return t == DType::f32 ? 32 : t == DType::i8 ? 8 : t == DType::i4 ? 4 : 16; }
constexpr int64_t dtype_bytes(DType t) { return dtype_bits(t) / 8; }  // of those that have whole bytes

enum class Activation : int32_t {
  none = 0,
  gelu_erf = 1,
  gelu_tanh = 2,
  silu = 3,
  relu = 4,
  tanh = 5,
  sigmoid = 6,
  quick_gelu = 7,  // x sigmoid(1.702 x)
  relu_squared = 8
};
constexpr int32_t kActivations = 9;
enum class NormKind : int32_t { layer = 0, rms = 1 };
enum class Pooling : int32_t { last = 0, first = 1, mean = 2, max = 3 };

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Dropout: an element is kept with probability 1 - rate, and then divided by it. Which are kept is a function of the
// number that seed points to, of the site (a layer, say) and of the element's place: see cpu/kernels/dropout.h.
struct Dropout {
  const uint64_t* seed;  // [1], read when a kernel runs; null: no dropout
  float rate;            // in [0, 1)
  int32_t site;
};

// A weight matrix W[N, K] (one output per row, as checkpoints store it) packed for the matmul.
//
// Outputs are cut into panels of kPanel columns; within a panel the inner dimension K runs slowest, so that one row of x
// streams a panel from start to end and many rows are broadcast against it:
//   f32, f16:  [panel][k][kPanel]             element (n, k) at ((n / 64) * K + k) * 64 + n % 64
//   bf16:      [panel][k / 2][kPanel][2]      pairs (k, k + 1) stand together for the dot-product instruction; K is padded to even
//   i8:         [panel][k / 4][kPanel][4]      quads of k stand together for the byte dot product, as w + 128
//   i4:         [panel][k / 8][kPanel][4]      byte i of a column holds w + 8 of element i of one quad (low nibble) and of the next
// Integers stand for (value - zero) * scale. K is cut into groups, of which the last may be short (padded to 8), and each group is
// followed by its scales [kPanel] of scale_dtype and, where has_zeros, its zeros [kPanel] of uint8; without, zero is 128 or 8.
// group == 0: one scale for a whole row; they stand at the panel's end, in float32.
// Columns past N and the odd k are zero. A gated matrix has two parts of N outputs each, gate and up, whose panels alternate:
// panel j of part p stands at index j * parts + p.
constexpr int64_t kPanel = 64;
constexpr int64_t kIntegerPad = 8;  // inner elements that one column of packed integers is padded to

struct PackedView {
  const void* data;  // 64-byte aligned
  int64_t n, k;      // outputs of one part, inner dimension
  int32_t parts;     // 1, or 2 when gated
  DType dtype;
  // Integers only:
  int64_t group = 0;  // 32, 64 or 128 inner elements that share a scale, or 0: all of a row
  DType scale_dtype = DType::f32;
  bool has_zeros = false;

  bool integers() const { return dtype == DType::i8 || dtype == DType::i4; }
  int64_t padded_k() const { return integers() ? round_up(k, kIntegerPad) : dtype == DType::bf16 ? round_up(k, 2) : k; }
  int64_t groups() const { return group ? (k + group - 1) / group : 1; }
  int64_t values_bytes(int64_t count) const {
    return count * kPanel * dtype_bits(dtype) / 8;
  }  // of `count` k of a panel
  int64_t scales_bytes() const { return kPanel * (dtype_bytes(scale_dtype) + (has_zeros ? 1 : 0)); }  // of one group
  int64_t group_bytes() const { return values_bytes(group) + scales_bytes(); }  // from one to the next, where group > 0
  int64_t panels() const { return (n + kPanel - 1) / kPanel; }                  // of one part
  int64_t panel_bytes() const { return values_bytes(padded_k()) + (integers() ? groups() * scales_bytes() : 0); }
  int64_t bytes() const { return panels() * parts * panel_bytes(); }
};

// The KV cache of one layer: blocks of kBlockTokens tokens. Within a block, heads follow each other, and within a head keys
// stand before values:
//   keys    f32: [tokens / 16][E][16]        bf16, i8: [tokens / 16][Ep / 2][16][2]   (pairs of channels)
//   values  f32: [tokens][Ep]                bf16, i8: [tokens / 2][Ep][2]            (pairs of tokens)
// E is the head size, Ep = E rounded up to kHeadPad; both halves take kBlockTokens * Ep elements, and in i8 the tokens' scales
// behind them, kBlockTokens of bf16: an element is worth integer * scale. Channels past E are zero wherever a token has been
// written; what has not been written may hold anything, NaN included, and is never used.
constexpr int64_t kBlockTokens = 64;
constexpr int64_t kHeadPad = 16;
constexpr int64_t kMaxHead = 256;  // the largest E
constexpr int64_t kKeyGroup = 16;  // tokens whose keys are interleaved

struct CacheView {
  void* data;  // one layer: [blocks][kv_heads][2][half_elements]
  int64_t blocks, kv_heads, head_size;
  DType dtype;  // f32, bf16 or i8

  constexpr int64_t padded_head() const { return round_up(head_size, kHeadPad); }
  constexpr int64_t scale_elements() const { return dtype == DType::i8 ? 2 : 0; }  // of one token
  constexpr int64_t half_elements() const { return kBlockTokens * (padded_head() + scale_elements()); }
  constexpr int64_t head_elements() const { return 2 * half_elements(); }
  constexpr int64_t block_elements() const { return kv_heads * head_elements(); }
};

}  // namespace pyllm
