// Vectors of a row: sums, sources, stores. For embedding's *_isa.cpp.
#pragma once

#include "cpu/philox_isa.h"
#include "cpu/simd.h"
#include "embedding/cpu_kernels.h"

namespace nnarch::NNARCH_ISA {
namespace {

constexpr int64_t kRowPad = 4 * kLanes<float>;  // what dropout_factors rounds a row up to

// Calls f(column, W, k) for whole vectors of a row, four at a time (k = 0 … 3, known when this is
// compiled), and f(column, rest, 0) at its end.
template <class T, class F>
NNARCH_INLINE void over_columns(int64_t n, const F& f) {
  constexpr int64_t w = kLanes<T>;
  int64_t c = 0;
  for (; c + 4 * w <= n; c += 4 * w)
    f(c, w, 0), f(c + w, w, 1), f(c + 2 * w, w, 2), f(c + 3 * w, w, 3);
  for (; c < n; c += w) f(c, n - c < w ? n - c : w, 0);
}

// Sums of a row in two chains, which wait for each other half as long.
template <class T>
struct RowSum {
  Vec<T> even{}, odd{};
  NNARCH_INLINE void add(int k, Vec<T> v) {
    if (k % 2)
      odd += v;
    else
      even += v;
  }
  NNARCH_INLINE T total() const { return horizontal_sum<T>(even + odd); }
};

template <class T>
NNARCH_INLINE void put(T* to, Vec<T> v, int64_t n, bool past_caches) {
  if (past_caches && n >= kLanes<T>)
    stream(to, v);
  else
    store_n(to, v, n);
}

template <class T>
NNARCH_INLINE void prefetch_row(const T* row, int64_t columns) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t c = 0; c < columns; c += line) __builtin_prefetch(row + c);
}

// The sources of one row.
template <class T>
struct Sources {
  const T *token, *position, *segment;
  T scale;

  NNARCH_INLINE Sources(const EmbeddingSum<T>& e, int64_t row)
      : token(e.weight + e.tokens[row] * e.columns),
        position(nullptr),
        segment(nullptr),
        scale(e.scale) {
    if (e.position_weight) {
      const int64_t at = e.positions ? e.positions[row] : e.offset + row % e.length;
      position = e.position_weight + at * e.columns;
    }
    if (e.segment_weight) segment = e.segment_weight + e.segments[row] * e.columns;
  }
  NNARCH_INLINE Vec<T> at(int64_t c, int64_t n) const {
    Vec<T> v = load_n(token + c, n) * scale;
    if (position) v += load_n(position + c, n);
    if (segment) v += load_n(segment + c, n);
    return v;
  }
};

// Calls f(row) for rows [first, last), with the next row's token on its way to the cache.
template <class T, class F>
NNARCH_INLINE void over_rows(const EmbeddingSum<T>& e, int64_t first, int64_t last, const F& f) {
  for (int64_t row = first; row < last; ++row) {
    if (row + 1 < last) prefetch_row(e.weight + e.tokens[row + 1] * e.columns, e.columns);
    f(row);
  }
}

}  // namespace
}  // namespace nnarch::NNARCH_ISA
