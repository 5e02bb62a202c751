// The transforms of F(m × m, 2 × 2) and F(2 × 2, 5 × 5); the product between them is
// winograd_isa.cpp's.
#include "conv2d/winograd_taps.h"

#include "conv2d/winograd_transforms_isa.h"

namespace nnarch::NNARCH_ISA {

const WinogradTapsTable& winograd_taps_table() {
  static constexpr WinogradTapsTable table = {forward_transforms<3, 2>, forward_transforms<4, 2>,
                                              forward_transforms<2, 5>};
  return table;
}

}  // namespace nnarch::NNARCH_ISA
