// Tensors that lie dense in memory in one common order, for elementwise work.
#pragma once

#include "cpu/tensor.h"

namespace nnarch {

// Dense, in the order of outputs that follow `like`: channels_last or contiguous.
inline Tensor new_like(const Tensor& like, ScalarType type) {
  const IntList sizes = sizes_of(like);
  return follows_channels_last(like) ? new_channels_last(sizes, type) : new_contiguous(sizes, type);
}

// `t` in that order: itself where it has the order already, else a copy.
inline Tensor in_order_of(const Tensor& like, const Tensor& t) {
  return follows_channels_last(like) ? as_channels_last(t) : as_contiguous(t);
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

}  // namespace nnarch
