// The transforms of 2 × 2, 5 × 5, 1 × 3 and 3 × 1 taps; the product between them is
// winograd_isa.cpp's.
#include "conv2d/winograd_taps.h"

#include "conv2d/winograd_transforms_isa.h"

namespace nnarch::NNARCH_ISA {

const WinogradTapsTable& winograd_taps_table() {
  static constexpr WinogradTapsTable table = {forward_transforms<3, 2>, forward_transforms<4, 2>,
                                              forward_transforms<2, 5>, all_transforms<2, 1, 3>,
                                              all_transforms<4, 1, 3>,  all_transforms<2, 3, 1>,
                                              all_transforms<4, 3, 1>};
  return table;
}

}  // namespace nnarch::NNARCH_ISA
