// Packs weights as int8 and int4: rounds them on the way, or takes integers that exist already.
#include <cmath>

#include "cpu/kernels/pack_tile.h"

namespace pyllm::PYLLM_ISA {
namespace {

static_assert(kDepth % 128 == 0, "a tile holds whole groups");

using simd::I;

// What a group of a panel's columns is divided by, and one over it.
struct Scales {
  alignas(64) float scale[kPanel];
  alignas(64) float inverse[kPanel];
};

// The nearest value that scale_dtype has.
F rounded_to(DType dtype, F v) {
  alignas(64) uint16_t halves[F::N];
  if (dtype == DType::f32) return v;
  if (dtype == DType::f16) return simd::store_f16(halves, v), simd::load_f16(halves);
  return simd::store_bf16(halves, v), simd::load_bf16(halves);
}

// 1 / scale; 0 where that would not be finite, so that all values become 0.
F inverse_of(F scale) { return select_gt(abs(scale), simd::set(1e-30f), simd::set(1.0f) / scale, simd::zero()); }

// The integer nearest to v / scale, from `low` on, as float. NaN becomes `high`.
F quantized(F v, F inverse, float low, float high) {
  return max(simd::set(low), min(round(v * inverse), simd::set(high)));
}

// Largest magnitudes of `depth` values of each column; NaN where one of them is not finite.
struct Largest {
  F magnitude, probe;
  void add(F v) {
    magnitude = max(magnitude, abs(v));
    probe = fma(v, simd::zero(), probe);
  }
  F value() const { return magnitude + probe; }
};

// Symmetric int4 reaches from -8 to 7. The scale that makes the value of largest magnitude one of these leaves, of
// them, the least squared error; it is then fitted once more to the integers that it gives.
constexpr float kFullScale[] = {-8.0f, -7.4f, -6.8f, 8.0f, 7.4f, 6.8f};

F int4_scale(const float* values, int64_t depth, F largest) {
  F best = simd::zero(), least_error = simd::set(INFINITY);
  for (float full : kFullScale) {
    const F scale = largest / simd::set(full), inverse = inverse_of(scale);
    F error = simd::zero(), cross = simd::zero(), square = simd::zero();
    for (int64_t k = 0; k < depth; ++k) {
      const F v = simd::load(values + k * kPanel), q = quantized(v, inverse, -8.0f, 7.0f);
      const F e = fma(simd::zero() - q, scale, v);
      error = fma(e, e, error);
      cross = fma(v, q, cross);
      square = fma(q, q, square);
    }
    const F fitted = select_gt(square, simd::zero(), cross / square, scale);
    best = select_gt(least_error, error, fitted, best);
    least_error = min(error, least_error);
  }
  return best;
}

// Scales of a group of `depth` k, values being its first row of the tile, for all columns.
void choose_scales(Scales& s, const PackedView& w, const float* values, int64_t depth) {
  for (int64_t c = 0; c < kPanel; c += F::N) {
    Largest largest{simd::zero(), simd::zero()};
    for (int64_t k = 0; k < depth; ++k) largest.add(simd::load(values + k * kPanel + c));
    const F scale = w.dtype == DType::i4 ? int4_scale(values + c, depth, largest.magnitude) + largest.probe
                                         : largest.value() / simd::set(127.0f);
    const F kept = rounded_to(w.scale_dtype, scale);
    simd::store(s.scale + c, kept);
    simd::store(s.inverse + c, inverse_of(kept));
  }
}

// The same over whole rows, which several tiles hold.
void choose_row_scales(Scales& s, Tile& tile, const PackArgs& a, const PanelPart& part) {
  Largest largest[kPanel / F::N];
  for (Largest& l : largest) l = {simd::zero(), simd::zero()};
  for (int64_t k = 0; k < a.dst.k; k += kDepth) {
    const int64_t depth = least(kDepth, a.dst.k - k);
    fill(tile, a, part.row, part.columns, k, depth);
    for (int64_t i = 0; i < depth; ++i)
      for (int64_t c = 0; c < kPanel; c += F::N) largest[c / F::N].add(simd::load(tile.values[i] + c));
  }
  const float full = a.dst.dtype == DType::i4 ? 7.0f : 127.0f;
  for (int64_t c = 0; c < kPanel; c += F::N) {
    const F scale = largest[c / F::N].value() / simd::set(full);
    simd::store(s.scale + c, scale);
    simd::store(s.inverse + c, inverse_of(scale));
  }
}

// Scales of a group to their place. Columns of the tile, and so of scales, are those of the part.
void store_scales(unsigned char* out, const Scales& s, const PackedView& w, const PanelPart& part) {
  if (w.scale_dtype == DType::f32) {
    std::memcpy(reinterpret_cast<float*>(out) + part.column, s.scale, size_t(part.columns) * 4);
    return;
  }
  alignas(64) uint16_t halves[kPanel];
  for (int64_t c = 0; c < kPanel; c += F::N) {
    if (w.scale_dtype == DType::f16)
      simd::store_f16(halves + c, simd::load(s.scale + c));
    else
      simd::store_bf16(halves + c, simd::load(s.scale + c));
  }
  std::memcpy(reinterpret_cast<uint16_t*>(out) + part.column, halves, size_t(part.columns) * 2);
}

// Four values of each column as unsigned bytes.
I quad_of(const float* values, F inverse, float low, float high) {
  I word = simd::set_int(0);
  for (int i = 3; i >= 0; --i) {
    const F q = quantized(simd::load(values + i * kPanel), inverse, low, high) - simd::set(low);
    word.v = (word.v << 8) | to_int(q).v;
  }
  return word;
}

// The values of a group, `depth` k rounded up to kIntegerPad, whose first row in the tile is `values`.
void store_values(unsigned char* out, const Scales& s, const PackedView& w, const PanelPart& part, const float* values,
                  int64_t depth) {
  const bool nibbles = w.dtype == DType::i4;
  alignas(64) int32_t words[kPanel];
  for (int64_t k = 0; k < depth; k += nibbles ? 8 : 4, out += sizeof words) {
    for (int64_t c = 0; c < kPanel; c += F::N) {
      const float* from = values + k * kPanel + c;
      const F inverse = simd::load(s.inverse + c);
      I word = nibbles ? quad_of(from, inverse, -8.0f, 7.0f) : quad_of(from, inverse, -128.0f, 127.0f);
      if (nibbles) word.v |= quad_of(from + 4 * kPanel, inverse, -8.0f, 7.0f).v << 4;
      std::memcpy(words + c, &word.v, sizeof word.v);
    }
    std::memcpy(reinterpret_cast<int32_t*>(out) + part.column, words, size_t(part.columns) * 4);
  }
}

// Four bytes of eight nibbles in rising order as the panel has them: byte i holds nibble i, and nibble i + 4 above it.
uint32_t interleaved(uint32_t v) {
  auto spread = [](uint32_t x) {
    x = (x | x << 8) & 0x00ff00ffu;
    return (x | x << 4) & 0x0f0f0f0fu;
  };
  return spread(v & 0xffff) | spread(v >> 16) << 4;
}

// Column `column` of a group, from src: `count` k.
void place_values(unsigned char* out, const uint8_t* src, bool nibbles, int64_t column, int64_t count) {
  const int64_t bytes = nibbles ? (count + 1) / 2 : count;
  out += 4 * column;
  int64_t i = 0;
  for (; i + 4 <= bytes; i += 4, out += 4 * kPanel) {
    uint32_t word;
    std::memcpy(&word, src + i, sizeof word);
    if (nibbles) word = interleaved(word);
    std::memcpy(out, &word, sizeof word);
  }
  if (i < bytes) {
    uint32_t word = 0;
    std::memcpy(&word, src + i, size_t(bytes - i));
    if (nibbles) word = interleaved(word);
    std::memcpy(out, &word, sizeof word);
  }
}

}  // namespace

void pack_integers(const PackArgs& a, Parallel& pool) {
  const PackedView& w = a.dst;
  for_panels(a, pool, [&](const PanelPart& part) {
    Tile tile;
    std::memset(&tile, 0, sizeof tile);  // columns past the part's
    Scales scales;
    unsigned char* out = part.panel;
    if (w.group == 0) {
      choose_row_scales(scales, tile, a, part);
      store_scales(out + w.values_bytes(w.padded_k()), scales, w, part);
    }
    for (int64_t k = 0; k < w.k; k += kDepth) {
      const int64_t depth = least(kDepth, w.k - k), padded = round_up(depth, kIntegerPad);
      fill(tile, a, part.row, part.columns, k, depth);
      if (padded > depth) std::memset(tile.values[depth], 0, size_t(padded - depth) * sizeof tile.values[0]);
      const int64_t group = w.group ? w.group : depth;
      for (int64_t g = 0; g < depth; g += group) {
        const int64_t count = least(group, depth - g), bytes = w.values_bytes(round_up(count, kIntegerPad));
        if (w.group) {
          choose_scales(scales, w, tile.values[g], count);
          store_scales(out + bytes, scales, w, part);
        }
        store_values(out, scales, w, part, tile.values[g], count);
        out += bytes + (w.group ? w.scales_bytes() : 0);
      }
    }
  });
}

void pack_quantized(const PackQuantizedArgs& a, Parallel& pool) {
  const PackedView& w = a.dst;
  const bool nibbles = w.dtype == DType::i4;
  const int64_t group = w.group ? w.group : round_up(w.k, kIntegerPad);
  const int64_t from_bytes = dtype_bytes(a.scale_dtype), to_bytes = dtype_bytes(w.scale_dtype);
  const auto* scales = static_cast<const unsigned char*>(a.scales);
  for_panels(a, pool, [&](const PanelPart& part) {
    unsigned char* out = part.panel;
    for (int64_t g = 0; g < w.groups(); ++g) {
      const int64_t count = least(group, w.k - g * group), bytes = w.values_bytes(round_up(count, kIntegerPad));
      for (int64_t k = 0; k < count; k += kDepth) {  // of all columns: that much stays in the first-level cache
        const uint8_t* values = a.values + part.row * a.values_stride + (g * group + k) / (nibbles ? 2 : 1);
        for (int64_t i = 0; i < part.columns; ++i)
          place_values(out + w.values_bytes(k), values + i * a.values_stride, nibbles, part.column + i,
                       least(kDepth, count - k));
      }
      for (int64_t i = 0; i < part.columns; ++i) {
        const int64_t row = part.row + i, column = part.column + i;
        const unsigned char* scale = scales + (row * a.scales_stride + g) * from_bytes;
        alignas(64) float widened[F::N];
        if (a.scale_dtype != w.scale_dtype) load_row(widened, scale, a.scale_dtype, 1);
        std::memcpy(out + bytes + column * to_bytes,
                    a.scale_dtype != w.scale_dtype ? reinterpret_cast<const unsigned char*>(widened) : scale,
                    size_t(to_bytes));
        if (w.has_zeros) out[bytes + kPanel * to_bytes + column] = a.zeros[row * a.zeros_stride + g];
      }
      out += bytes + w.scales_bytes();
    }
  });
}

}  // namespace pyllm::PYLLM_ISA
