// For the table of cell_isa.cpp.
#pragma once

#include "recurrent/cpu_kernels.h"

namespace nnarch::NNARCH_ISA {

template <class T>
void step_product(const StepProduct<T>& p);

}  // namespace nnarch::NNARCH_ISA
