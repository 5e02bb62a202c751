// Square tiles of vectors, transposed in registers. For *_isa.cpp files.
#pragma once

#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {

// Exchanges the S-lane blocks of two vectors that lie off the diagonal.
template <int S, class V, int... I>
NNARCH_INLINE void exchange(V& a, V& b, Indices<I...>) {
  constexpr int W = sizeof...(I);
  const V low = __builtin_shufflevector(a, b, ((I & S) ? W + I - S : I)...);
  b = __builtin_shufflevector(a, b, ((I & S) ? W + I : I + S)...);
  a = low;
}

template <class T, int S>
NNARCH_INLINE void transpose_stage(Vec<T>* v) {
  constexpr int W = kLanes<T>;
  for (int i = 0; i < W; ++i)
    if (!(i & S)) exchange<S>(v[i], v[i + S], MakeIndices<W>{});
  if constexpr (S > 1) transpose_stage<T, S / 2>(v);
}

// Transposes a tile of kLanes<T> vectors.
template <class T>
NNARCH_INLINE void transpose(Vec<T>* v) {
  transpose_stage<T, kLanes<T> / 2>(v);
}

}  // namespace nnarch::NNARCH_ISA
