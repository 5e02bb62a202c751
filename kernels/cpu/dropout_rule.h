// A DropoutRule from what an operation is given.
#pragma once

#include <cmath>

#include "cpu/dropout.h"
#include "cpu/tensor.h"

namespace nnarch {

// Throws `message` where the two are no seed and no probability.
inline DropoutRule dropout_rule(const Tensor& seed, double p, const char* message) {
  require(p >= 0 && p <= 1 && seed.scalar_type() == ScalarType::Long && seed.numel() == 1, message);
  const auto threshold = static_cast<uint64_t>(std::nearbyint(std::ldexp(p, 32)));
  return {static_cast<uint64_t>(*data<int64_t>(seed)), threshold, p < 1 ? 1 / (1 - p) : 0.0};
}

}  // namespace nnarch
