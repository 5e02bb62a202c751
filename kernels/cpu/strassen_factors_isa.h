// The left factors of Strassen's product (strassen.h), for *_isa.cpp files.
#pragma once

#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {
namespace {

// One vector of each of M1 to M7's, `step` apart.
NNARCH_INLINE void store_left_factors(float* to, int64_t step, Vec<float> a11, Vec<float> a12,
                                      Vec<float> a21, Vec<float> a22) {
  store(to, a11 + a22), to += step;
  store(to, a21 + a22), to += step;
  store(to, a11), to += step;
  store(to, a22), to += step;
  store(to, a11 + a12), to += step;
  store(to, a21 - a11), to += step;
  store(to, a12 - a22);
}

}  // namespace
}  // namespace nnarch::NNARCH_ISA
