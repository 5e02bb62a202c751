// What the native products of linear share: x as rows, weights as columns of B.
#pragma once

#include <cstdint>

#include "cpu/pack_weight.h"
#include "cpu/tensor.h"

namespace nnarch {

// Up to this many rows go past the weights in place at the bandwidth of reading them; twice as many
// where the weights aren't packed.
inline constexpr int64_t kFewRows = 4, kFewUnpackedRows = 8;
// Up to this many are packed in the place of unpacked weights; up to that many go against weights
// that each task packs for itself; more are worth a packed copy in memory.
inline constexpr int64_t kTurnedRows = 96, kManyRows = 512;

// x as rows: `m` of them, `depth` long, dense, `stride` apart.
struct Rows {
  Tensor tensor;
  int64_t m, depth, stride;
};

inline Rows as_rows(const Tensor& x) {
  const int64_t depth = x.size(x.dim() - 1);
  if (x.dim() == 2 && x.stride(1) == 1 && x.stride(0) >= depth)
    return {x, x.size(0), depth, x.stride(0)};
  int64_t m = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) m = checked_product(m, x.size(d));
  return {as_contiguous(x), m, depth, depth};
}

template <class T>
WeightView<T> weight_view(const Tensor& w) {
  return {data<T>(w), w.size(0), w.size(1), w.stride(0), w.stride(1), {0}};
}

// Panels of `n` columns from `first` on, packed where `packed` points.
template <class T>
void pack_columns(const WeightView<T>& view, int64_t first, int64_t n, T* packed) {
  const GemmTable<T>& table = gemm<T>();
  for (int64_t j = 0; j < n; j += table.nr)
    table.pack_panel(view.data + (first + j) * view.column_stride, view.depth_stride,
                     view.column_stride, view.depth, std::min(table.nr, n - j),
                     packed + j * view.depth);
}

}  // namespace nnarch
