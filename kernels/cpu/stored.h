// The types that tensors are stored in, and what kernels compute in beside each.
#pragma once

#include <cstdint>

namespace nnarch {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class S>
struct ComputeOf {
  using T = S;
};
template <>
struct ComputeOf<BFloat16> {
  using T = float;
};
template <>
struct ComputeOf<Float16> {
  using T = float;
};
template <class S>
using Compute = typename ComputeOf<S>::T;

}  // namespace nnarch
