// What the native products of linear share: x as rows, weights as columns of B.
#pragma once

#include <cstdint>

#include "cpu/pack_weight.h"
#include "cpu/rows_product.h"
#include "cpu/tensor.h"

namespace nnarch {

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

}  // namespace nnarch
