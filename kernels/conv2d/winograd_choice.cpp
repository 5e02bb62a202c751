#include "conv2d/winograd_choice.h"

#include <cstdlib>

#include "cpu/machine.h"

namespace nnarch {

int64_t choose_tile(const ConvWork& work) {
  if (precision() == Precision::highest) return 0;
  return work.depth >= 16 && work.columns >= 16 ? 4 : 0;
}

}  // namespace nnarch
