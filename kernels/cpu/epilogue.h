// What happens to an accumulator before it is stored: y = act(scale·acc + shift + residual).
#pragma once

#include <cstdint>

namespace nnarch {

// The codes of kernels/activation/kinds.py.
enum Activation : int64_t {
  kNone = 0,
  kRelu = 1,
  kRelu6 = 2,
  kLeakyRelu = 3,
  kHardswish = 4,
  kHardsigmoid = 5,
  kSilu = 6,
  kGelu = 7,
  kGeluTanh = 8,
  kTanh = 9,
  kSigmoid = 10,
  kActivationCount = 11,
};

// Whether the derivative of an activation is a function of its output (kinds.INVERTIBLE).
inline constexpr bool follows_from_output(int64_t activation) {
  return activation != kHardswish && activation != kSilu && activation != kGelu &&
         activation != kGeluTanh;
}

// Per-channel vectors are indexed from the first output channel of the block being computed and
// padded by the driver to whole vectors. The residual has the layout of the output.
template <class T>
struct Epilogue {
  const T* scale = nullptr;     // [channels] or null: 1
  const T* shift = nullptr;     // [channels] or null: 0
  const T* residual = nullptr;  // same offsets as the output, or null
  int64_t activation = kNone;
  T alpha = 0;

  Epilogue from_channel(int64_t channel) const {
    Epilogue e = *this;
    if (scale) e.scale += channel;
    if (shift) e.shift += channel;
    if (residual) e.residual += channel;
    return e;
  }
};

}  // namespace nnarch
