// Winograd's transforms for kernels other than 3 × 3 (winograd.h), and those of any kernel. 2 × 2
// taps, what a phase of a transposed convolution of 4 × 4 with stride 2 is, with 3 × 3 or 4 × 4
// outputs a tile: 2.25 and 2.56 times fewer products. 5 × 5 taps with 2 × 2 outputs: 2.78 times
// fewer. Three taps in a row or a column, with 2 or 4 outputs: 1.5 and 2 times fewer.
#pragma once

#include <cstdint>

#include "conv2d/winograd.h"
#include "conv2d/winograd_strided.h"
#include "conv2d/winograd_tile.h"
#include "cpu/isa.h"

namespace nnarch {

// Of 2 × 2 and 5 × 5, `grad` and `weight_grad` stay null.
struct WinogradTapsTable {
  WinogradTransforms two_to_3, two_to_4, five_to_2, row_to_2, row_to_4, column_to_2, column_to_4;
};

NNARCH_PER_ISA(const WinogradTapsTable& winograd_taps_table();)

// Of a tile: 3 × 3, 1 × 3 or 3 × 1 taps with stride 1 or 2, and with stride 1 5 × 5 or 2 × 2.
inline const WinogradTransforms& winograd_transforms(const WinogradTile& tile) {
  if (tile.stride == 2) return NNARCH_SELECT(strided_three_taps(tile));
  if (tile.taps() == 9) return winograd().transforms(tile.m);
  const WinogradTapsTable& table = NNARCH_SELECT(winograd_taps_table());
  if (tile.rows == 5) return table.five_to_2;
  if (tile.rows == 2) return tile.m == 3 ? table.two_to_3 : table.two_to_4;
  if (tile.rows == 1) return tile.m == 2 ? table.row_to_2 : table.row_to_4;
  return tile.m == 2 ? table.column_to_2 : table.column_to_4;
}

}  // namespace nnarch
