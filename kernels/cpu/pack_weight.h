// Weights packed for the matrix product: panels of `nr` columns, each [tap][depth][nr].
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/arena.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"

namespace nnarch {

// A weight seen as w[column][depth][tap], each with its stride.
template <class T>
struct WeightView {
  const T* data;
  int64_t columns, depth;
  int64_t column_stride, depth_stride;
  std::vector<int64_t> tap_offset;  // of every tap, in the order of the product

  int64_t taps() const { return static_cast<int64_t>(tap_offset.size()); }
};

template <class T>
int64_t packed_size(int64_t columns, int64_t taps, int64_t depth) {
  return checked_product(round_up(columns, gemm<T>().nr), checked_product(taps, depth));
}

// Where the taps of a column lie between its channels (the usual [k][c][r][s]), a column is read in
// memory order and its values are scattered; one by one they would miss the cache.
template <class T>
void pack_interleaved_panel(const WeightView<T>& w, const T* src, int64_t n, T* dst) {
  const int64_t nr = gemm<T>().nr, taps = w.taps();
  std::fill_n(dst, taps * w.depth * nr, T{0});
  for (int64_t j = 0; j < n; ++j)
    for (int64_t d = 0; d < w.depth; ++d) {
      const T* from = src + j * w.column_stride + d * w.depth_stride;
      for (int64_t t = 0; t < taps; ++t) dst[(t * w.depth + d) * nr + j] = from[w.tap_offset[t]];
    }
}

template <class T>
void pack_weight(const WeightView<T>& w, T* dst) {
  const GemmTable<T>& table = gemm<T>();
  const int64_t nr = table.nr, taps = w.taps(), panel = taps * w.depth * nr;
  const bool interleaved = taps > 1 && w.depth_stride != 1 && w.column_stride != 1;
  parallel_tasks(ceil_div(w.columns, nr), [&](int64_t p) {
    const int64_t n = std::min(nr, w.columns - p * nr);
    const T* src = w.data + p * nr * w.column_stride;
    if (interleaved) return pack_interleaved_panel(w, src, n, dst + p * panel);
    for (int64_t t = 0; t < taps; ++t)
      table.pack_panel(src + w.tap_offset[t], w.depth_stride, w.column_stride, w.depth, n,
                       dst + p * panel + t * w.depth * nr);
  });
}

}  // namespace nnarch
