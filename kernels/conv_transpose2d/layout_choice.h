// Which algorithm a transposed convolution runs, and with it the layout of its packed weight.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv2d/winograd_tile.h"
#include "conv_transpose2d/cpu_phases.h"

namespace nnarch {

// The layouts of a packed weight. Other numbers, 2 to 6, are the side of Winograd's output tiles,
// with which the phases that it serves are packed; the rest of the phases are as with kPhases.
constexpr int64_t kPhases = 0;  // a panel for each phase: every phase is a direct product
constexpr int64_t kPixel = 1;   // [c][k, r, s]: the input is one pixel, the output its products
constexpr int64_t kTaps = 7;    // [c][r, s, k]: products with all taps, then added in place

inline bool is_layout(int64_t layout) { return layout >= 0 && layout <= 7; }

// The tile of one phase under a layout; m = 0 where it is a direct product.
inline WinogradTile phase_tile(const TransposedAxis& rows, int64_t row_residue,
                               const TransposedAxis& columns, int64_t column_residue,
                               int64_t layout) {
  WinogradTile tile{.rows = rows.dense_taps(row_residue),
                    .columns = columns.dense_taps(column_residue)};
  const int64_t least = std::min(tile.rows, tile.columns), most = std::max(tile.rows, tile.columns);
  const bool of_2 = least == 2 && most == 2 && (layout == 3 || layout == 4);
  const bool of_3 = most == 3 && (least == 3 ? layout != 3 : least == 1 && layout % 2 == 0);
  if (layout >= 2 && layout <= (least == 1 ? 4 : 6) && (of_2 || of_3)) tile.m = layout;
  return tile;
}

// Few output channels would leave most of a vector empty; all taps of them together fill it.
bool taps_serve(const TransposedShape& p, bool is_float);

// The layout of least cost that the precision allows; `packed`: the weight comes packed.
int64_t choose_layout(const TransposedShape& p, bool is_float, bool packed);

}  // namespace nnarch
