// Dropout's kernel of one instruction set.
#pragma once

#include <cstdint>

#include "cpu/dropout.h"
#include "cpu/isa.h"

namespace nnarch {

// y = x times 0 or the scale, for quads [first, last) of rows of `columns` that lie dense.
template <class T>
using DropoutFn = void (*)(const DropoutRule& rule, const T* x, T* y, int64_t columns,
                           int64_t first, int64_t last);

NNARCH_PER_ISA(template <class T> DropoutFn<T> dropout_fn();)

}  // namespace nnarch
