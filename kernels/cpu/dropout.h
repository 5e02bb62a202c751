// What a call drops, for kernels that drop elements (kernels/dropout/reference.py).
#pragma once

#include <cstdint>

namespace nnarch {

// A word of at least `threshold` (up to 2³²) is kept, times `scale`.
struct DropoutRule {
  uint64_t seed, threshold;
  double scale;
};

}  // namespace nnarch
