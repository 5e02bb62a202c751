// The loop of a step's register tile, and what it fetches: for step_product_isa.cpp and
// step_pairs_isa.cpp.
#pragma once

#include "cpu/gemm_step_isa.h"
#include "recurrent/cpu_kernels.h"

namespace nnarch::NNARCH_ISA {
namespace {

// Lines of weights that a tile fetches ahead, one a step; null where the hardware does better.
template <class T>
struct AheadLines {
  const T* at;

  NNARCH_INLINE void next() {
    __builtin_prefetch(at, 0, 2);
    at += kLine<T>;
  }
};

// left[I], right[I] += `depth` products of row I with a panel. The weights are read once, in their
// order, which the hardware's prefetchers follow where the last-level cache is near: there,
// fetching ahead by instruction costs 0.2 to 0.4 %. Where it is far, they come too late.
template <class T, bool Ahead, int... I>
NNARCH_INLINE void add_products(Indices<I...>, EvenRows<T>& rows, int64_t depth, const T*& b,
                                AheadLines<T>& ahead, Vec<T>* left, Vec<T>* right) {
  constexpr int w = kLanes<T>;
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    if constexpr (Ahead) ahead.next();
    Vec<T> b0 = load(b), b1 = load(b + w), x;
    keep_in_register(b0);
    keep_in_register(b1);
    ((x = broadcast(rows.template value<I>(k)), left[I] += x * b0, right[I] += x * b1), ...);
    b += 2 * w;
    rows.next();
  }
}

// Part `part` of `all` of the lines that will be needed soon.
template <class T, int N>
NNARCH_INLINE void fetch(const StepLines<T> (&ahead)[N], int64_t part, int64_t all) {
  for (const StepLines<T>& lines : ahead) {
    if (lines.rows == 0) continue;  // spares divisions
    const int64_t last = lines.rows * (part + 1) / all;
    for (int64_t r = lines.rows * part / all; r < last; ++r)
      for (int64_t i = 0; i < lines.width; i += kLine<T>)
        __builtin_prefetch(lines.at + r * lines.step + i);
  }
}

}  // namespace
}  // namespace nnarch::NNARCH_ISA
