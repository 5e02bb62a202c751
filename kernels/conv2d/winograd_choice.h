// Which algorithm a 3×3 or 5×5 convolution runs: the direct product, or Winograd with which tile.
#pragma once

#include <cstdint>
#include <iterator>

#include "cpu/grid_image.h"

namespace nnarch {

// What the choice depends on: a `taps` × `taps` kernel over `n` grids of outputs, and whether the
// weight comes packed.
struct ConvWork {
  int64_t n, grid_h, grid_w;
  int64_t depth, columns;  // input and output channels of a group
  bool packed;
  int64_t taps = 3;
};

// The size m of the fastest algorithm's output tiles that the precision allows; 0: the direct one.
int64_t choose_tile(const ConvWork& work);

// The same for the gradient of the weight.
int64_t choose_weight_grad_tile(const ConvWork& work);

// The side of the kernel if Winograd can compute it, or 0: dense 3×3 or 5×5, its upper left tap
// first, and stride 1.
template <class T>
int64_t winograd_side(const GridImage<T>& image) {
  const int64_t taps = std::ssize(image.taps), side = taps == 25 ? 5 : 3;
  if (sizeof(T) != sizeof(float) || taps != side * side) return 0;
  if (image.step_y != 1 || image.step_x != 1) return 0;
  const Tap& corner = image.taps.front();
  for (int64_t t = 0; t < taps; ++t)
    if (image.taps[t].dy != corner.dy + t / side || image.taps[t].dx != corner.dx + t % side)
      return 0;
  return side;
}

}  // namespace nnarch
