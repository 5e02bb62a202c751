// The weights of a layer packed for Strassen's product of pairs of rows (cpu/strassen.h).
//
// What a step multiplies is one vector a sequence, z = [x, h], and one weight [W_ih, W_hh]. Halves
// of z and pairs of sequences are the left matrix of blocks; halves of z and halves of the units,
// all gates of a unit in one half, are the right one.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/machine.h"
#include "cpu/strassen_weights.h"
#include "recurrent/cpu_weights.h"

namespace nnarch {

// Where a weight that is packed for pairs has its scales, one for each value of z, and its right
// factors: of a block of columns and that half of all blocks away [panels][7][depth][nr].
struct PairWeight {
  const float* scales = nullptr;  // or null: not packed so
  const float* factors = nullptr;
};

inline PairWeight pair_weight(const float* packed, int64_t depth) {
  return {packed, packed + depth};
}

// Whether both halves are whole blocks of columns and whole vectors of z, and worth it.
inline bool pairs_serve(int64_t gates, int64_t hidden, int64_t in, int64_t out) {
  constexpr int64_t least = int64_t{32} << 10, most = int64_t{32} << 20;  // weights
  if (gates == 3 || in <= 0 || in % 16 != 0 || (in + out) % 32 != 0 || hidden <= 0 ||
      hidden % (2 * gemm<float>().nr) != 0)
    return false;
  const int64_t weights = checked_product(gates * hidden, checked_sum(in, out));
  return weights >= least && weights <= most;
}

// With fewer rows in a step the halves of its tiles wait for themselves; or for their weights,
// where these are 7 quarters of what other threads and programs leave of the last-level cache.
inline int64_t least_pair_rows(int64_t weight_bytes) {
  constexpr int64_t kept = int64_t{5} << 20;
  if (weight_bytes > kept) return 28;
  return gemm<float>().nr == 32 ? 14 : 20;
}

// Values of the scales and the right factors.
inline int64_t pairs_size(int64_t gates, int64_t hidden, int64_t in, int64_t out) {
  const int64_t depth = checked_sum(in, out), columns = checked_product(gates, hidden);
  return checked_sum(depth, checked_product(kStrassenProducts * (depth / 2), columns / 2));
}

// Rows of packed panels, as if W_ih and W_hh were one weight.
class JoinedPanels {
 public:
  JoinedPanels(const GateWeight<float>& ih, const GateWeight<float>& hh) : ih_(ih), hh_(hh) {}

  int64_t depth() const { return ih_.depth + hh_.depth; }
  const float* row(int64_t column, int64_t k) const {
    const bool input = k < ih_.depth;
    const GateWeight<float>& w = input ? ih_ : hh_;
    return w.packed + column * w.depth + (input ? k : k - ih_.depth) * gemm<float>().nr;
  }

 private:
  const GateWeight<float>&ih_, &hh_;
};

// The scale of every value of z: a power of two of the order of its weights. Where one of these is
// no number, or so large that the scale is not of its order, it is infinite, and so is then what no
// step's factors may reach.
inline void pair_scales(const JoinedPanels& w, int64_t columns, float* scales) {
  const int64_t nr = gemm<float>().nr;
  parallel_tasks(w.depth(), [&](int64_t k) {
    constexpr float most = 0x1p60f;
    float largest = 0;
    bool fits = true;
    for (int64_t column = 0; column < columns; column += nr)
      for (int64_t j = 0; j < nr; ++j) {
        const float value = std::abs(w.row(column, k)[j]);
        fits = fits && value < most;
        largest = std::max(largest, value);
      }
    scales[k] = fits ? std::ldexp(1.0f, strassen_exponent(largest))
                     : std::numeric_limits<float>::infinity();
  });
}

// From weights that are packed as panels.
inline void pack_pairs(const GateWeight<float>& ih, const GateWeight<float>& hh, float* to) {
  const JoinedPanels w(ih, hh);
  const int64_t nr = gemm<float>().nr, columns = ih.order.columns(), half = w.depth() / 2;
  float* scales = to;
  float* factors = to + w.depth();
  pair_scales(w, columns, scales);
  parallel_tasks(columns / 2 / nr, [&](int64_t panel) {
    const int64_t left = panel * nr, right = left + columns / 2;
    float* at = factors + panel * kStrassenProducts * half * nr;
    for (int64_t k = 0; k < half; ++k, at += nr) {
      const float above = 1 / scales[k], below = 1 / scales[half + k];
      const float *b11 = w.row(left, k), *b12 = w.row(right, k);
      const float *b21 = w.row(left, half + k), *b22 = w.row(right, half + k);
      for (int64_t j = 0; j < nr; ++j) {
        const auto of =
            right_factors(b11[j] * above, b12[j] * above, b21[j] * below, b22[j] * below);
        for (int64_t m = 0; m < kStrassenProducts; ++m) at[m * half * nr + j] = of[m];
      }
    }
  });
}

}  // namespace nnarch
