// What backward_norm_isa.cpp has for the table of kernels.
#pragma once

#include "recurrent/backward.h"

namespace nnarch::NNARCH_ISA {

// One row of a layer-normalized LSTM.
template <class T>
void norm_cell_grad(const CellGrad<T>& p, int64_t row);

}  // namespace nnarch::NNARCH_ISA
