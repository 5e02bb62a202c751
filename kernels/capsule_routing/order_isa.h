// The weight's memory in and out of the kernels' order. For *_isa.cpp files.
#pragma once

#include "capsule_routing/votes_isa.h"

namespace nnarch::NNARCH_ISA {

// to[row][0, n) = from[row][0, n) for rows of at most kBlock values. A call of memcpy for each of
// these 128 bytes took longer than the copy. Past the caches where that is asked for and lines are
// written whole: rows that lie a few KB apart wait for each of their lines to be read first.
template <class T>
void copy_rows(const T* from, int64_t from_step, T* to, int64_t to_step, int64_t rows, int64_t n,
               bool past_caches) {
  if (n < kCapsuleBlock<T>) {
    for (; rows > 0; --rows, from += from_step, to += to_step)
      for (int64_t i = 0; i < n; ++i) to[i] = from[i];
    return;
  }
  const bool whole_lines =
      (reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>(to_step) * sizeof(T)) % 64 == 0;
  if (past_caches && whole_lines) {
    for (; rows > 0; --rows, from += from_step, to += to_step)
      for (int p = 0; p < kParts<T>; ++p) stream(to + p * kLanes<T>, load(from + p * kLanes<T>));
    return finish_streaming();
  }
  for (; rows > 0; --rows, from += from_step, to += to_step)
    for (int p = 0; p < kParts<T>; ++p) store(to + p * kLanes<T>, load(from + p * kLanes<T>));
}

}  // namespace nnarch::NNARCH_ISA
