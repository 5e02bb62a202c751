// For the table of cell_isa.cpp.
#pragma once

#include "recurrent/cpu_kernels.h"

namespace nnarch::NNARCH_ISA {

float pair_factors(const PairFactors<float>& p);
void pair_product(const PairProduct<float>& p);

}  // namespace nnarch::NNARCH_ISA
