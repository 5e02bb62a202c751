// Sums that go on in double: vectors are added in T in short bursts, then widened. For *_isa.cpp.
#pragma once

#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {

inline constexpr int kBurst = 8;  // vectors that are added in T before they are widened

// A double for each lane of a vector of T.
template <class T>
struct Wide {
  typedef double V __attribute__((vector_size(8 * kLanes<T>)));
  typedef double Unaligned __attribute__((vector_size(8 * kLanes<T>), aligned(8), may_alias));
};

template <class T>
NNARCH_INLINE typename Wide<T>::V widen(Vec<T> v) {
  return __builtin_convertvector(v, typename Wide<T>::V);
}

// p[lane] += v[lane] for the first n lanes.
template <class T>
NNARCH_INLINE void add_wide(double* p, Vec<T> v, int64_t n) {
  if (n >= kLanes<T>) {
    using Unaligned = typename Wide<T>::Unaligned;  // `auto` would drop the alignment
    *reinterpret_cast<Unaligned*>(p) += widen<T>(v);
  } else {
    for (int64_t i = 0; i < n; ++i) p[i] += v[i];
  }
}

}  // namespace nnarch::NNARCH_ISA
