// Large tensors of which little will be written.
#pragma once

#include "cpu/tensor.h"

namespace nnarch {

// A contiguous tensor of zeros whose pages the operating system makes when they are first written;
// none where that is not possible: another system, torch before 2.11. (new_tensor.cpp)
OptTensor new_lazy_zeros(const IntList& sizes, ScalarType type);

}  // namespace nnarch
