// Which algorithm a 3×3 convolution runs: the direct product, or Winograd with which tile.
#pragma once

#include <cstdint>

#include "cpu/grid_image.h"

namespace nnarch {

// What the choice depends on: a 3×3 kernel over `n` grids of outputs, and whether the weight comes
// packed.
struct ConvWork {
  int64_t n, grid_h, grid_w;
  int64_t depth, columns;  // input and output channels of a group
  bool packed;
};

// The size m of the fastest algorithm's output tiles that the precision allows; 0: the direct one.
int64_t choose_tile(const ConvWork& work);

// The same for the gradient of the weight.
int64_t choose_weight_grad_tile(const ConvWork& work);

// Whether Winograd can compute it: a dense 3×3 kernel, its upper left tap first, and stride 1.
template <class T>
bool winograd_serves(const GridImage<T>& image) {
  if (sizeof(T) != sizeof(float) || image.taps.size() != 9) return false;
  if (image.step_y != 1 || image.step_x != 1) return false;
  const Tap& corner = image.taps.front();
  for (int64_t t = 0; t < 9; ++t)
    if (image.taps[t].dy != corner.dy + t / 3 || image.taps[t].dx != corner.dx + t % 3)
      return false;
  return true;
}

}  // namespace nnarch
