// The transforms of Winograd's algorithm with a stride of 2, in phases (winograd_tile.h). Nine taps
// a side make phases of 5 and 4; F(3, 5) has seven points a side, F(3, 4) six of them.
#pragma once

#include <cstdint>

#include "conv2d/winograd.h"
#include "conv2d/winograd_tile.h"
#include "cpu/isa.h"

namespace nnarch {

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
  void (*grad)(const float* const* pixels, int64_t channels, float* planes, int64_t plane,
               int64_t slot);
  void (*output)(const float* planes, int64_t plane, int64_t channels,
                 const Epilogue<float>& epilogue, const OutputTile& tile, float* y, bool stream);
  // From weights to values [channel][nr]; meanwhile the lines `ahead` come into cache.
  void (*weight)(const TapWeights& weights, float* values, const int64_t* at, const Lines& ahead);
  // From the values of summed products to taps, `tap` elements apart.
  void (*weight_grad)(const float* values, const int64_t* at, const int64_t* next, int64_t channels,
                      float* dw, int64_t tap);
};

NNARCH_PER_ISA(const StridedTransforms& strided_nine_taps();)
// Three taps a side, in a row or in a column, in tiles of m = 2, 3 or 4: phases of 2 and 1.
NNARCH_PER_ISA(const WinogradTransforms& strided_three_taps(const WinogradTile& tile);)

// Of a kernel with so many taps a side; null where there are none.
inline const StridedTransforms* strided_transforms(int64_t taps) {
  return taps == 9 ? &NNARCH_SELECT(strided_nine_taps()) : nullptr;
}

}  // namespace nnarch
