// What Strassen's product makes of weights: the right factors, and the scales of what they meet.
#pragma once

#include <array>

#include "cpu/strassen.h"

namespace nnarch {

// The right factors of M1 to M7, of one element of each quarter of the weight.
inline std::array<float, kStrassenProducts> right_factors(float b11, float b12, float b21,
                                                          float b22) {
  return {b11 + b22, b11, b12 - b22, b21 - b11, b22, b11 + b12, b21 + b22};
}

// 2^e is of the order of a channel's weights, of which `largest` is the largest magnitude: a
// multiplication by it rounds nothing. Without weights it is as small as may be: next to nothing of
// the channel comes in, and of its partner's rounding comes out.
int strassen_exponent(float largest);

}  // namespace nnarch
