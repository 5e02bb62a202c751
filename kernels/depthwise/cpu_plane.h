// What the kernels of planes (NCHW) share: their weights, and the end of their sums.
#pragma once

#include "cpu/epilogue_isa.h"
#include "depthwise/cpu_kernels.h"
#include "depthwise/cpu_row.h"

namespace nnarch::NNARCH_ISA {

// Whether all weights stay in registers. The compiler would broadcast each for every multiply-add.
template <int S>
inline constexpr bool kHoldsWeights = S == 3 ? kVectorBytes >= 32 : S == 5 && kVectorBytes == 64;

// One by one: filled in a loop, they would stay in memory.
template <class T, int... I>
NNARCH_INLINE void hold(const Vec<T>* weight, Vec<T>* held, Indices<I...>) {
  ((held[I] = weight[I], keep_in_register(held[I])), ...);
}

// Scale, shift, residual, clamp, and the first n columns of one row to memory.
template <class T>
NNARCH_INLINE void finish(const Epilogue<T>& e, Vec<T> v, int64_t offset, int64_t n, T* y) {
  if (e.scale) v *= broadcast(*e.scale);
  if (e.shift) v += broadcast(*e.shift);
  if (e.residual) v += load_n(e.residual + offset, n);
  if (e.activation == kRelu) {
    v = at_least<T>(v, Vec<T>{});
  } else if (e.activation == kRelu6) {
    const ClampBounds<T> bounds(e.activation);
    v = clamp<T>(v, bounds.low, bounds.high);
  }
  store_n(y + offset, v, n);
}

// The activations that are no clamp, over stored values.
template <class T>
NNARCH_INLINE void activate_plane(const DepthwisePlane<T>& a) {
  if (is_clamp(a.epilogue.activation)) return;
  const int64_t count = a.oh * a.ow;
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> v = load_n(a.y + i, count - i);
    store_n(a.y + i, activate<T>(v, a.epilogue.activation, a.epilogue.alpha), count - i);
  }
}

}  // namespace nnarch::NNARCH_ISA
