// The largest value so far and where it was, lane by lane, with torch's rules: the first of equal
// values wins, and a NaN wins over everything, the last NaN over the first.
#pragma once

#include "cpu/simd.h"
#include "pooling/cpu_kernels.h"

namespace nnarch::NNARCH_ISA {

template <class T>
struct LaneVectors {
  using Index = typename LaneIndex<T>::Type;
  typedef Index V __attribute__((vector_size(kVectorBytes)));
  typedef Index Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int64_t Wide __attribute__((vector_size(8 * kLanes<T>)));
  typedef int64_t WideUnaligned __attribute__((vector_size(8 * kLanes<T>), aligned(8), may_alias));
};
template <class T>
using Lanes = typename LaneVectors<T>::V;

template <class T>
NNARCH_INLINE Lanes<T> lanes(int64_t position) {
  return static_cast<typename LaneIndex<T>::Type>(position) - Lanes<T>{};
}

template <class T>
NNARCH_INLINE Vec<T> lowest() {
  return broadcast<T>(-static_cast<T>(__builtin_huge_val()));
}

// The position of padding: behind every input, so that an input of -inf wins over it.
template <class T>
NNARCH_INLINE constexpr int64_t nowhere() {
  return sizeof(T) == 4 ? INT32_MAX : INT64_MAX;
}

template <class T>
struct Best {
  Vec<T> value = lowest<T>();
  Lanes<T> position = lanes<T>(nowhere<T>());

  // A candidate from a later position than all before it.
  NNARCH_INLINE void take_later(Vec<T> v, Lanes<T> where) {
    // Nothing is larger than NaN; only an input of -inf has to replace the initial padding.
    const auto replace = (v > value) | (v != v) | (position == lanes<T>(nowhere<T>()));
    value = replace ? v : value;
    position = replace ? where : position;
  }

  // A candidate from anywhere.
  NNARCH_INLINE void take(Vec<T> v, Lanes<T> where) {
    const auto replace = (v > value) | ((v == value) & (where < position)) |
                         ((v != v) & ((value == value) | (where > position)));
    value = replace ? v : value;
    position = replace ? where : position;
  }
};

// Positions as int64; `nowhere` becomes -1.
template <class T>
NNARCH_INLINE void store_indices(int64_t* p, Lanes<T> position, int64_t n) {
  const Lanes<T> found = position == lanes<T>(nowhere<T>()) ? lanes<T>(-1) : position;
  if (n >= kLanes<T>) {
    using Wide = typename LaneVectors<T>::Wide;
    using Unaligned = typename LaneVectors<T>::WideUnaligned;
    *reinterpret_cast<Unaligned*>(p) = __builtin_convertvector(found, Wide);
  } else {
    for (int64_t i = 0; i < n; ++i) p[i] = found[i];
  }
}

}  // namespace nnarch::NNARCH_ISA
