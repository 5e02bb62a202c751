// Winograd's transforms for kernels other than 3 × 3 (winograd.h): 2 × 2 taps, what a phase of a
// transposed convolution of 4 × 4 with stride 2 is, with 3 × 3 or 4 × 4 outputs a tile: 2.25
// and 2.56 times fewer products. 5 × 5 taps with 2 × 2 outputs: 2.78 times fewer.
#pragma once

#include <cstdint>

#include "conv2d/winograd.h"
#include "cpu/isa.h"

namespace nnarch {

// `grad` and `weight_grad` stay null.
struct WinogradTapsTable {
  WinogradTransforms two_to_3, two_to_4, five_to_2;
};

NNARCH_PER_ISA(const WinogradTapsTable& winograd_taps_table();)

// Of m × m outputs by a kernel of `taps` × `taps`: 2, 3 or 5.
inline const WinogradTransforms& winograd_transforms(int64_t m, int64_t taps) {
  if (taps == 3) return winograd().transforms(m);
  const WinogradTapsTable& table = NNARCH_SELECT(winograd_taps_table());
  return taps == 5 ? table.five_to_2 : m == 3 ? table.two_to_3 : table.two_to_4;
}

}  // namespace nnarch
