// Which algorithm a transposed convolution runs, and with it the layout of its packed weight.
#pragma once

#include <cstdint>

#include "conv_transpose2d/cpu_phases.h"

namespace nnarch {

// The layouts of a packed weight. Other numbers, 2 to 6, are the side of Winograd's output tiles,
// with which the phases that it serves are packed; the rest of the phases are as with kPhases.
constexpr int64_t kPhases = 0;  // a panel for each phase: every phase is a direct product
constexpr int64_t kPixel = 1;   // [c][k, r, s]: the input is one pixel, the output its products
constexpr int64_t kTaps = 7;    // [c][r, s, k]: products with all taps, then added in place

inline bool is_layout(int64_t layout) { return layout >= 0 && layout <= 7; }

// The tile of one phase under a layout: 0 where it is a direct product.
inline int64_t phase_tile(const TransposedAxis& rows, int64_t row_residue,
                          const TransposedAxis& columns, int64_t column_residue, int64_t layout) {
  const int64_t side = rows.dense_taps(row_residue);
  if (layout < 2 || layout > 6 || side != columns.dense_taps(column_residue)) return 0;
  if (side == 2) return layout == 3 || layout == 4 ? layout : 0;
  return side == 3 && layout != 3 ? layout : 0;
}

// Few output channels would leave most of a vector empty; all taps of them together fill it.
bool taps_serve(const TransposedShape& p, bool is_float);

// The layout of least cost that the precision allows; `packed`: the weight comes packed.
int64_t choose_layout(const TransposedShape& p, bool is_float, bool packed);

}  // namespace nnarch
