// Rows of attention's tensors as its backward reads and writes them, and the products of few rows.
// For *_isa.cpp files.
#pragma once

#include "attention/backward_product_isa.h"
#include "attention/backward_weights_isa.h"

namespace nnarch::NNARCH_ISA {

template <class T>
NNARCH_INLINE int64_t in_vectors(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <class T>
struct Rows {
  const T* data;
  int64_t step;
};

// Rows of n numbers in whole vectors: in place where they lie one after the other, else a copy.
// (Rows far apart would meet in a few sets of L1.)
template <class T>
NNARCH_INLINE Rows<T> dense_rows(const Operand& from, const char* first, int64_t rows, int64_t n,
                                 T* copy) {
  constexpr int64_t size = sizeof(T);
  const int64_t step = in_vectors<T>(n);
  if (from.in_place && n == step && (from.row == n * size || rows == 1))
    return {reinterpret_cast<const T*>(first), step};
  if (!from.in_place || n != step) {
    copy_rows<T>(from, first, rows, n, copy, step);
    return {copy, step};
  }
  T* to = copy;
  for (int64_t r = 0; r < rows; ++r, first += from.row, to += step)
    for (int64_t d = 0; d < n; d += kLanes<T>)
      store(to + d, load(reinterpret_cast<const T*>(first) + d));
  return {copy, step};
}

// to[d][row] for d < n; columns from `rows` on are zero. `from` has rows of whole vectors.
template <class T>
NNARCH_INLINE void transpose_block(const Rows<T>& from, int64_t rows, int64_t n, T* to) {
  constexpr int w = kLanes<T>;
  for (int64_t r = 0; r < rows; r += w)
    for (int64_t d = 0; d < n; d += w) {
      Vec<T> lanes[w];
      for (int i = 0; i < w; ++i)
        lanes[i] = r + i < rows ? load(from.data + (r + i) * from.step + d) : Vec<T>{};
      transpose_rows<w / 2, T>(lanes);
      for (int i = 0; i < w && d + i < n; ++i) store(to + (d + i) * kTileKeys + r, lanes[i]);
    }
}

template <class T>
NNARCH_INLINE void clear(T* to, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) store_n(to + i, Vec<T>{}, n - i);
}

template <class T>
NNARCH_INLINE T dot(const Operand& x, const char* px, const Operand& y, const char* py, int64_t n) {
  constexpr int w = kLanes<T>;
  Vec<T> sum{};
  int64_t d = 0;
  if (x.in_place && y.in_place)
    for (; d + w <= n; d += w)
      sum += load(reinterpret_cast<const T*>(px) + d) * load(reinterpret_cast<const T*>(py) + d);
  for (; d < n; d += w)
    sum += load_as<T>(x.storage, px + d * x.column, x.column, n - d) *
           load_as<T>(y.storage, py + d * y.column, y.column, n - d);
  return horizontal_sum<T>(sum);
}

// The products of a tile's scores, or of their gradients, for few rows: dot products with the keys
// (or values) as they lie, where packing these would take longer than it saves.
inline constexpr int64_t kFewRows = 3;
template <class T>
NNARCH_NOINLINE void few_rows_product(const Product<T>& p, const Rows<T>& keys, int64_t rows,
                                      int64_t columns, int64_t depth) {
  constexpr int w = kLanes<T>;
  for (int64_t c = 0; c < columns; c += w)
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = p.a + r * p.a_row;
      Vec<T> sums[w];
      for (int i = 0; i < w; ++i) {
        const T* key = keys.data + (c + i < columns ? c + i : columns - 1) * keys.step;
        sums[i] = Vec<T>{};
        for (int64_t d = 0; d < depth; d += w) sums[i] += load(row + d) * load(key + d);
      }
      transpose_rows<w / 2, T>(sums);
      Vec<T> sum = sums[0];
      for (int i = 1; i < w; ++i) sum += sums[i];
      T* to = p.c + r * p.c_row + c;
      if (p.finish != Finish::store)
        sum = scores_gradient<T>(p, sum, to, p.kept + r * p.c_row + c, p.delta + r);
      store(to, sum);
    }
}

}  // namespace nnarch::NNARCH_ISA
