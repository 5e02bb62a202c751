// Winograd's algorithm for square kernels with a stride of 2, in phases.
//
// Even rows of taps meet even rows of the input and odd ones odd ones, columns alike: a convolution
// with stride 2 is the sum of four with stride 1 over every second pixel. Nine taps a side make
// phases of 5 and 4. F(3, 5) has seven points a side, F(3, 4) six of them; at a point that two
// phases share their products can be added up before they are transformed back, as if their
// channels were one after the other. A tile of 3 × 3 outputs takes (7 + 6)² = 169 products for each
// pair of channels, where the direct product takes 729: 4.3 times fewer.
//
// So transformed values lie plane by plane (one for each pair of points), and in a plane slot by
// slot, one for each phase that has its points: 4, 2 or 1.
#pragma once

#include <cstdint>

#include "conv2d/winograd.h"
#include "cpu/isa.h"

namespace nnarch {

// The points and phases of F(m, taps) with stride 2; sides are alike.
struct StridedTile {
  int64_t m, taps;

  int64_t taps_of(int64_t phase) const { return (taps + 1 - phase) / 2; }
  int64_t size(int64_t phase) const { return m + taps_of(phase) - 1; }
  int64_t points() const { return size(0); }
  int64_t planes() const { return points() * points(); }
  int64_t values() const { return (size(0) + size(1)) * (size(0) + size(1)); }
  // The point that value i of a phase belongs to; the last one is infinity.
  int64_t point(int64_t phase, int64_t i) const { return i == size(phase) - 1 ? points() - 1 : i; }
  // How many phases have a point: the last finite one may be the first phase's alone.
  int64_t phases_at(int64_t point) const {
    return point < points() - 1 && point >= size(1) - 1 ? 1 : 2;
  }
  int64_t slots(int64_t plane) const {
    return phases_at(plane / points()) * phases_at(plane % points());
  }
};

// Values of a tile are numbered phase by phase and then row by row; `at` says where each of them
// is, for the first channel, and `next` where those of the next tile are: lines in so many places
// that only the transform can fetch them ahead.
struct StridedTransforms {
  int64_t taps, m;
  // From pixels (one pointer for each value) to values. Up to `padded` channels zeros are written.
  void (*input)(const float* const* pixels, int64_t channels, int64_t padded, float* values,
                const int64_t* at, const int64_t* next);
  // The transpose of it: adds to `channels` channels of the pixels.
  void (*input_grad)(const float* values, const int64_t* at, const int64_t* next, int64_t channels,
                     float* const* pixels);
  // From m × m gradients to planes, `plane` elements apart, and from planes to outputs.
  void (*grad)(const float* const* pixels, int64_t channels, float* planes, int64_t plane);
  void (*output)(const float* planes, int64_t plane, int64_t channels,
                 const Epilogue<float>& epilogue, const OutputTile& tile, float* y, bool stream);
  // From a packed panel [tap][count][nr] to values [count][nr]; meanwhile the lines at `ahead` come
  // into cache.
  void (*weight)(const float* packed, int64_t count, float* values, const int64_t* at,
                 const float* const* ahead, int64_t lines);
  // From the values of summed products to taps, `tap` elements apart; past the caches where that is
  // asked for, whose lines are then written whole and aligned.
  void (*weight_grad)(const float* values, const int64_t* at, const int64_t* next, int64_t channels,
                      float* dw, int64_t tap, bool past_caches);
};

NNARCH_PER_ISA(const StridedTransforms& strided_nine_taps();)

// Of a kernel with so many taps a side; null where there are none.
inline const StridedTransforms* strided_transforms(int64_t taps) {
  return taps == 9 ? &NNARCH_SELECT(strided_nine_taps()) : nullptr;
}

}  // namespace nnarch
