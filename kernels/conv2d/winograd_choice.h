// Which algorithm a convolution runs that Winograd serves: the direct product, or Winograd with
// which tile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <optional>

#include "conv2d/winograd_tile.h"
#include "cpu/gather_gemm.h"

namespace nnarch {

// What the choice depends on: the kernel, `n` grids of outputs, and whether the weight comes
// packed.
struct ConvWork {
  int64_t n, grid_h, grid_w;
  int64_t depth, columns;  // input and output channels of a group
  bool packed;
  WinogradTile kernel = {};  // without a tile
  // Whether the direct gradient of the weight multiplies whole windows, their taps side by side, as
  // few channels allow (cpu_stem.h), not tap by tap.
  bool windows = false;
};

// Whether there are tiles of m × m outputs for a kernel with so many input channels a group.
bool winograd_serves(const WinogradTile& tile, int64_t depth);
// The same for pairs of pixels of 1×1 kernels, too.
bool tile_serves(const WinogradTile& tile, int64_t columns, int64_t depth);

// The tile of the fastest algorithm that the precision allows; m = 0: the direct product.
WinogradTile choose_tile(const ConvWork& work);

// The same for the gradient of the weight.
WinogradTile choose_weight_grad_tile(const ConvWork& work);

// The kernel if Winograd or, 1×1 of any stride, Strassen may compute it: dense 3×3, 5×5, 1×3 or
// 3×1, its upper left tap first, with a stride of 1 or, but for 5×5, 2, in float32.
template <class T>
std::optional<WinogradTile> winograd_kernel(const GridImage<T>& image) {
  const int64_t taps = std::ssize(image.taps);
  if (sizeof(T) != sizeof(float)) return std::nullopt;
  if (taps == 1 && reads_inside(image)) return WinogradTile{.rows = 1, .columns = 1};
  if (taps != 9 && taps != 25 && taps != 3) return std::nullopt;
  const Tap &corner = image.taps.front(), &end = image.taps.back();
  const WinogradTile tile{.rows = end.dy - corner.dy + 1,
                          .columns = end.dx - corner.dx + 1,
                          .stride = std::max(image.step_y, image.step_x)};
  if (tile.taps() != taps || tile.stride > (taps == 25 ? 1 : 2)) return std::nullopt;
  if (image.step_y != tile.row_step() || image.step_x != tile.column_step()) return std::nullopt;
  for (int64_t t = 0; t < taps; ++t)
    if (image.taps[t].dy != corner.dy + t / tile.columns ||
        image.taps[t].dx != corner.dx + t % tile.columns)
      return std::nullopt;
  return tile;
}

}  // namespace nnarch
