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
};

template <class T>
int64_t packed_size(int64_t columns, int64_t taps, int64_t depth) {
  return checked_product(round_up(columns, gemm<T>().nr), checked_product(taps, depth));
}

// Where taps lie densest in memory (the usual [k][c][r][s]), blocks of all taps are transposed and
// their rows put in place; one by one, values would miss the cache.
template <class T>
void pack_interleaved_panel(const WeightView<T>& w, const T* src, int64_t n, T* dst) {
  const int64_t nr = gemm<T>().nr, taps = w.taps();
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
        __builtin_prefetch(src + (d + 2) * w.depth_stride + i);
    transpose_fn<T>()(src + d * w.depth_stride, w.column_stride, rows.get(), nr, n,
                      (some - 1) * w.depth_stride + span);
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t i = 0; i < some; ++i)
        std::copy_n(rows.get() + (i * w.depth_stride + w.tap_offset[t]) * nr, nr,
                    dst + (t * w.depth + d + i) * nr);
  }
}

template <class T>
void pack_weight(const WeightView<T>& w, T* dst) {
  const GemmTable<T>& table = gemm<T>();
  const int64_t nr = table.nr, taps = w.taps(), panel = taps * w.depth * nr;
  // Every fourth tap, as a phase of a strided convolution has them, still lies dense enough.
  const bool interleaved = taps > 1 && w.depth_stride != 1 && w.column_stride != 1 &&
                           w.tap_offset.front() + w.tap_offset.back() <= 6 * taps;
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
