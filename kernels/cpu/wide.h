// Sums that go on in double: vectors are added in T in short bursts, then widened. For *_isa.cpp.
#pragma once

#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {

inline constexpr int kBurst = 8;  // vectors that are added in T before they are widened

template <class T>
struct HalfVector {
  typedef T V __attribute__((vector_size(kVectorBytes / 2)));
};

template <int first, class T, int... I>
NNARCH_INLINE Vec<double> widen_lanes(Vec<T> v, Indices<I...>) {
  using Half = typename HalfVector<T>::V;
  const Half half = __builtin_shufflevector(v, v, (first + I)...);
  return __builtin_convertvector(half, Vec<double>);
}

// A double for each lane of a vector of T.
template <class T>
struct Wide {
  static constexpr int parts = static_cast<int>(sizeof(double) / sizeof(T));
  Vec<double> part[parts] = {};

  NNARCH_INLINE void add(Vec<T> v) {
    if constexpr (parts == 1) {
      part[0] += v;
    } else {
      constexpr int lanes = kLanes<double>;
      part[0] += widen_lanes<0, T>(v, MakeIndices<lanes>{});
      part[1] += widen_lanes<lanes, T>(v, MakeIndices<lanes>{});
    }
  }

  NNARCH_INLINE double total() const {
    Vec<double> sum = part[0];
    for (int i = 1; i < parts; ++i) sum += part[i];
    return horizontal_sum<double>(sum);
  }
};

// p[lane] += v[lane] for the first n lanes.
template <class T>
NNARCH_INLINE void add_wide(double* p, Vec<T> v, int64_t n) {
  Wide<T> wide;
  wide.add(v);
  for (int i = 0; i < Wide<T>::parts; ++i, p += kLanes<double>, n -= kLanes<double>) {
    if (n <= 0) return;
    store_n(p, load_n(p, n) + wide.part[i], n);
  }
}

}  // namespace nnarch::NNARCH_ISA
