// Winograd's transforms for a kernel of 2 × 2 taps, beside those for 3 × 3 (winograd.h): what a
// phase of a transposed convolution of 4 × 4 with stride 2 is. m × m outputs follow from (m + 1)²
// products a channel instead of 4·m²: 2.25 times fewer with m = 3, 2.56 times with m = 4.
#pragma once

#include <cstdint>

#include "conv2d/winograd.h"
#include "cpu/isa.h"

namespace nnarch {

// weight_grad and grad stay null: weight gradients have no phases.
struct TwoTapTable {
  WinogradTransforms of_3, of_4;

  const WinogradTransforms& transforms(int64_t m) const { return m == 3 ? of_3 : of_4; }
};

NNARCH_PER_ISA(const TwoTapTable& two_tap_table();)

inline const TwoTapTable& two_taps() { return NNARCH_SELECT(two_tap_table()); }

}  // namespace nnarch
