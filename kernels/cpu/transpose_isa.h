// Transposition by square register tiles of as many rows as a vector has lanes. For *_isa.cpp
// files.
#pragma once

#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {

template <int H, class V, int... I>
NNARCH_INLINE void exchange(V& a, V& b, Indices<I...>) {
  constexpr int lanes = sizeof...(I);
  const V low = __builtin_shufflevector(a, b, ((I & H) == 0 ? I : lanes + I - H)...);
  const V high = __builtin_shufflevector(a, b, ((I & H) == 0 ? I + H : lanes + I)...);
  a = low, b = high;
}

// Exchanges the off-diagonal quarters of all 2H × 2H tiles, then of smaller ones.
template <int H, class T>
NNARCH_INLINE void transpose_rows(Vec<T> (&row)[kLanes<T>]) {
  for (int i = 0; i < kLanes<T>; ++i)
    if ((i & H) == 0) exchange<H>(row[i], row[i + H], MakeIndices<kLanes<T>>{});
  if constexpr (H > 1) transpose_rows<H / 2, T>(row);
}

// to[j][i] = from[i][j] of a tile.
template <class T>
NNARCH_INLINE void transpose_square(const T* from, int64_t from_step, T* to, int64_t to_step) {
  constexpr int lanes = kLanes<T>;
  Vec<T> row[lanes];
  for (int r = 0; r < lanes; ++r) row[r] = load(from + r * from_step);
  transpose_rows<lanes / 2, T>(row);
  for (int r = 0; r < lanes; ++r) store(to + r * to_step, row[r]);
}

// The same of fewer columns.
template <class T>
NNARCH_NOINLINE void transpose_columns(const T* from, int64_t from_step, T* to, int64_t to_step,
                                       int64_t columns) {
  constexpr int lanes = kLanes<T>;
  Vec<T> row[lanes];
  for (int r = 0; r < lanes; ++r) row[r] = load_n(from + r * from_step, columns);
  transpose_rows<lanes / 2, T>(row);
  for (int r = 0; r < lanes; ++r)
    if (r < columns) store(to + r * to_step, row[r]);
}

// to[j][i] = from[i][j]. Whole lines go past the caches: stores that jump from line to line wait
// for each of them to be read first.
template <class T>
void transpose_matrix(const T* from, int64_t from_step, T* to, int64_t to_step, int64_t rows,
                      int64_t columns) {
  constexpr int lanes = kLanes<T>;
  const bool past_caches = kVectorBytes == 64 && to_step % lanes == 0 &&
                           reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0;
  int64_t i = 0;
  for (; i + lanes <= rows; i += lanes) {
    int64_t j = 0;
    for (; j + lanes <= columns; j += lanes) {
      Vec<T> row[lanes];
      for (int r = 0; r < lanes; ++r) {
        const T* p = from + (i + r) * from_step + j;
        row[r] = load(p);
        __builtin_prefetch(p + lanes * from_step);
      }
      transpose_rows<lanes / 2, T>(row);
      if (past_caches)
        for (int r = 0; r < lanes; ++r) stream(to + (j + r) * to_step + i, row[r]);
      else
        for (int r = 0; r < lanes; ++r) store(to + (j + r) * to_step + i, row[r]);
    }
    for (; j < columns; ++j)
      for (int r = 0; r < lanes; ++r) to[j * to_step + i + r] = from[(i + r) * from_step + j];
  }
  for (; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) to[j * to_step + i] = from[i * from_step + j];
  if (past_caches) finish_streaming();
}

}  // namespace nnarch::NNARCH_ISA
