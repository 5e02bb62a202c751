// Planes as one long row (plane_flat_isa.cpp): where that serves, and its tables.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/arena.h"
#include "depthwise/cpu_image.h"

namespace nnarch {

// More lane masks than this outgrow the first-level cache beside the planes.
inline constexpr int64_t kFlatMasks = 4096;
// Rows of fewer pixels are flat at dilation 1 too: 1024 of 7×7, N 8, take 306 µs, in
// tiles 365.
inline constexpr int64_t kFlatColumns = 8;

// `row`, `column`: the input position of the first tap of output (0, 0).
template <class T>
class FlatTable {
 public:
  static bool serves(const ConvShape& p, bool weight_grad) {
    const int64_t lanes = NNARCH_SELECT(depthwise_lanes<T>());
    const bool width = p.s == 3 || p.s == 5 || (p.s == 7 && !weight_grad);
    return p.r == p.s && width && p.stride_h == 1 && p.stride_w == 1 && p.ow == p.w &&
           (p.ow < kFlatColumns || p.dilation_h > 1 || p.dilation_w > 1) &&
           ceil_div(p.oh * p.ow, lanes) * p.taps() <= kFlatMasks;
  }

  FlatTable(int64_t h, int64_t oh, int64_t w, int64_t row, int64_t column, const ConvShape& p)
      : lanes_(NNARCH_SELECT(depthwise_lanes<T>())),
        masks_(ceil_div(oh * w, lanes_) * p.taps()),
        shift_(p.taps()) {
    for (int64_t r = 0; r < p.r; ++r)
      for (int64_t s = 0; s < p.s; ++s)
        shift_[r * p.s + s] = (row + r * p.dilation_h) * w + column + s * p.dilation_w;
    int64_t oy = 0, ox = 0;
    uint16_t* mask = masks_.get();
    for (int64_t i = 0; i < oh * w; i += lanes_, mask += p.taps()) {
      unsigned in_row[7] = {}, in_column[7] = {};
      for (int64_t lane = 0; lane < std::min(lanes_, oh * w - i); ++lane) {
        for (int64_t t = 0; t < p.s; ++t) {
          const int64_t iy = oy + row + t * p.dilation_h, ix = ox + column + t * p.dilation_w;
          in_row[t] |= unsigned{iy >= 0 && iy < h} << lane;
          in_column[t] |= unsigned{ix >= 0 && ix < w} << lane;
        }
        if (++ox == w) ox = 0, ++oy;
      }
      for (int64_t r = 0; r < p.r; ++r)
        for (int64_t s = 0; s < p.s; ++s)
          mask[r * p.s + s] = static_cast<uint16_t>(in_row[r] & in_column[s]);
    }
  }

  FlatTaps taps() const { return {masks_.get(), shift_.get()}; }

 private:
  int64_t lanes_;
  Scratch<uint16_t> masks_;
  Scratch<int64_t> shift_;
};

}  // namespace nnarch
