// Weights packed for the matrix product: panels of `nr` columns, each [tap][depth][nr].
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/arena.h"
#include "cpu/gemm.h"
#include "cpu/layout.h"
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

  // Columns, or channels, [first, first + most), as far as they exist.
  WeightView columns_from(int64_t first, int64_t most) const {
    WeightView part = *this;
    part.data += first * column_stride;
    part.columns = std::min(most, columns - first);
    return part;
  }
  WeightView depth_from(int64_t first, int64_t most) const {
    WeightView part = *this;
    part.data += first * depth_stride;
    part.depth = std::min(most, depth - first);
    return part;
  }
};

// The lines that packing a weight with one tap reads, where rows of it or columns of it are dense.
template <class T>
Later<T> lines_of(const WeightView<T>& w) {
  if (w.columns <= 0 || w.depth <= 0) return {};
  const T* at = w.data + w.tap_offset[0];
  if (w.depth_stride == 1) return {at, w.depth, w.columns, w.column_stride};
  if (w.column_stride == 1) return {at, w.columns, w.depth, w.depth_stride};
  return {};
}

template <class T>
int64_t packed_size(int64_t columns, int64_t taps, int64_t depth) {
  return checked_product(round_up(columns, gemm<T>().nr), checked_product(taps, depth));
}

// Whether taps lie densest in memory (the usual [k][c][r][s]). Every fourth tap, as a phase of a
// strided convolution has them, still lies dense enough.
template <class T>
bool has_dense_taps(const WeightView<T>& w) {
  return w.taps() > 1 && w.depth_stride != 1 && w.column_stride != 1 &&
         w.tap_offset.front() + w.tap_offset.back() <= 6 * w.taps();
}

// Of such a weight, f(rows, d, some) for a few channels [d, d + some) of at most nr columns at a
// time: all that lies between their first and last taps, transposed, so that the nr values of tap t
// and channel d + i are at rows + (t's offset + i · depth_stride) · nr. One by one, values would
// miss the cache.
template <class T, class F>
void for_transposed_taps(const WeightView<T>& w, const F& f) {
  const int64_t nr = gemm<T>().nr, n = w.columns;
  const int64_t span = *std::max_element(w.tap_offset.begin(), w.tap_offset.end()) + 1;
  // Channels of a column that lie one after the other go through together.
  const int64_t at_once = w.depth_stride >= span && w.depth_stride <= 2 * span
                              ? std::clamp<int64_t>(256 / w.depth_stride, 1, w.depth)
                              : 1;
  const int64_t block = (at_once - 1) * w.depth_stride + span;
  Scratch<T> rows(block * nr);
  std::fill_n(rows.get(), block * nr, T{0});
  for (int64_t d = 0; d < w.depth; d += at_once) {
    const int64_t some = std::min(at_once, w.depth - d);
    if (at_once == 1 && w.column_stride <= 2 * span)  // a run of lines a channel
      for (int64_t i = 0; i < n * w.column_stride; i += 64 / int64_t{sizeof(T)})
        __builtin_prefetch(w.data + (d + 2) * w.depth_stride + i);
    transpose_fn<T>()(w.data + d * w.depth_stride, w.column_stride, rows.get(), nr, n,
                      (some - 1) * w.depth_stride + span);
    f(rows.get(), d, some);
  }
}

template <class T>
void pack_dense_taps(const WeightView<T>& w, T* dst) {
  const int64_t nr = gemm<T>().nr;
  for_transposed_taps(w, [&](const T* rows, int64_t d, int64_t some) {
    for (int64_t t = 0; t < w.taps(); ++t)
      for (int64_t i = 0; i < some; ++i)
        std::copy_n(rows + (i * w.depth_stride + w.tap_offset[t]) * nr, nr,
                    dst + (t * w.depth + d + i) * nr);
  });
}

// Panel p of a packed weight.
template <class T>
void pack_panel_of(const WeightView<T>& w, int64_t p, T* packed) {
  const GemmTable<T>& table = gemm<T>();
  const int64_t nr = table.nr, n = std::min(nr, w.columns - p * nr);
  T* const to = packed + p * w.taps() * w.depth * nr;
  if (has_dense_taps(w)) return pack_dense_taps(w.columns_from(p * nr, nr), to);
  const T* src = w.data + p * nr * w.column_stride;
  for (int64_t t = 0; t < w.taps(); ++t)
    table.pack_panel(src + w.tap_offset[t], w.depth_stride, w.column_stride, w.depth, n,
                     to + t * w.depth * nr);
}

template <class T>
void pack_weight(const WeightView<T>& w, T* packed) {
  parallel_tasks(ceil_div(w.columns, gemm<T>().nr),
                 [&](int64_t p) { pack_panel_of(w, p, packed); });
}

// By one thread, which multiplies with them.
template <class T>
void pack_columns(const WeightView<T>& w, T* packed) {
  for (int64_t p = 0; p * gemm<T>().nr < w.columns; ++p) pack_panel_of(w, p, packed);
}

}  // namespace nnarch
