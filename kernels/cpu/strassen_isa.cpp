// The sums around the seven products: strassen.h says which.
#include "cpu/strassen.h"

#include "cpu/epilogue_isa.h"
#include "cpu/simd.h"
#include "cpu/strassen_factors_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

using V = Vec<float>;
constexpr int64_t w = kLanes<float>;

template <bool Both>
NNARCH_INLINE void add_channels_of(const PixelPair& pair, const PixelPair& next, const float* scale,
                                   int64_t half, float* to, int64_t step) {
  for (int64_t k = 0; k < half; k += w) {
    __builtin_prefetch(next.first + k), __builtin_prefetch(next.first + half + k);
    if (next.second)
      __builtin_prefetch(next.second + k), __builtin_prefetch(next.second + half + k);
    const V left = load(scale + k), right = load(scale + half + k);
    const V a11 = load(pair.first + k) * left, a12 = load(pair.first + half + k) * right;
    V a21{}, a22{};
    if constexpr (Both)
      a21 = load(pair.second + k) * left, a22 = load(pair.second + half + k) * right;
    store_left_factors(to + k, step, a11, a12, a21, a22);
  }
}

void add_channels(const PixelPair& pair, const PixelPair& next, const float* scale, int64_t half,
                  float* to, int64_t step) {
  if (pair.second)
    add_channels_of<true>(pair, next, scale, half, to, step);
  else
    add_channels_of<false>(pair, next, scale, half, to, step);
}

// What becomes of sums of products, scaled and shifted.
template <bool Clamps, bool Stream>
NNARCH_INLINE void finish(const StrassenRows& r, const ClampBounds<float>& bounds, int64_t column,
                          int64_t offset, V sum) {
  V y = sum * load(r.scale + column) + load(r.shift + column);
  if (r.residual) y += load(r.residual + offset + column);
  if constexpr (Clamps)
    y = clamp<float>(y, bounds.low, bounds.high);
  else
    y = activate<float>(y, r.activation, r.alpha);
  if constexpr (Stream)
    stream(r.c + offset + column, y);
  else
    store(r.c + offset + column, y);
}

template <bool Clamps, bool Stream>
void add_products_of(const StrassenRows& r, const PixelPair* pairs, int64_t count) {
  const ClampBounds<float> bounds(r.activation);
  const float* row = r.products;
  for (int64_t i = 0; i < count; ++i, row += r.row_step) {
    const PixelPair& pair = pairs[i];
    for (int64_t j = 0; j < r.columns; j += w) {
      const float* m = row + j;
      const V m1 = load(m), m2 = load(m + r.product_step), m3 = load(m + 2 * r.product_step),
              m4 = load(m + 3 * r.product_step), m5 = load(m + 4 * r.product_step),
              m6 = load(m + 5 * r.product_step), m7 = load(m + 6 * r.product_step);
      finish<Clamps, Stream>(r, bounds, j, pair.c_first, (m1 + m4) + (m7 - m5));
      finish<Clamps, Stream>(r, bounds, j + r.half, pair.c_first, m3 + m5);
      if (!pair.second) continue;
      finish<Clamps, Stream>(r, bounds, j, pair.c_second, m2 + m4);
      finish<Clamps, Stream>(r, bounds, j + r.half, pair.c_second, (m1 - m2) + (m3 + m6));
    }
  }
  if constexpr (Stream) finish_streaming();
}

void add_products(const StrassenRows& r, const PixelPair* pairs, int64_t count) {
  const bool clamps = is_clamp(r.activation);
  if (clamps && r.stream) return add_products_of<true, true>(r, pairs, count);
  if (clamps) return add_products_of<true, false>(r, pairs, count);
  if (r.stream) return add_products_of<false, true>(r, pairs, count);
  add_products_of<false, false>(r, pairs, count);
}

constexpr StrassenTable kTable = {add_channels, add_products};

}  // namespace

const StrassenTable& strassen_table() { return kTable; }

}  // namespace nnarch::NNARCH_ISA
