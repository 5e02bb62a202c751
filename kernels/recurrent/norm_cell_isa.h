// What norm_cell_isa.cpp has for the table of kernels.
#pragma once

#include "recurrent/cpu_kernels.h"

namespace nnarch::NNARCH_ISA {

template <class T>
void normalize_row(const NormRow<T>& p, T* row, T* kept);
template <class T>
void norm_cell(const NormCell<T>& p);

}  // namespace nnarch::NNARCH_ISA
