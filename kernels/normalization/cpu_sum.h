// The sum over all dimensions but 1: what a bias has as its gradient.
#pragma once

#include "cpu/tensor.h"

namespace nnarch {

Tensor channel_sum(const Tensor& x);

}  // namespace nnarch
