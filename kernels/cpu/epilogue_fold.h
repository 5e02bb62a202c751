// The tensors of an epilogue, folded into the two vectors and one pointer that kernels read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "cpu/arena.h"
#include "cpu/epilogue.h"
#include "cpu/tensor.h"

namespace nnarch {

struct EpilogueTensors {
  const OptTensor& bias;
  const OptTensor& scale;
  const OptTensor& shift;
  const OptTensor& residual;  // already in the order of the output
  int64_t activation;
  double alpha;
};

inline void check_epilogue(const EpilogueTensors& e, int64_t channels, ScalarType type) {
  for (const OptTensor* vector : {&e.bias, &e.scale, &e.shift})
    if (*vector)
      require((*vector)->dim() == 1 && (*vector)->size(0) == channels &&
                  (*vector)->scalar_type() == type,
              "bias, scale and shift must be vectors of the output channels, of x's dtype");
  require(e.activation >= 0 && e.activation < kActivationCount, "unknown activation code");
}

// y = act((acc + bias)·scale + shift + residual), as scale·acc + (bias·scale + shift). The vectors
// are followed by a panel of zeros, so that kernels may read whole vectors.
template <class T>
class FoldedEpilogue {
 public:
  FoldedEpilogue(const EpilogueTensors& e, int64_t channels)
      : scale_(e.scale ? channels + kPad : 0),
        shift_(e.bias || e.shift ? channels + kPad : 0),
        folded_{nullptr, nullptr, e.residual ? data<T>(*e.residual) : nullptr, e.activation,
                static_cast<T>(e.alpha)} {
    if (e.scale) {
      copy(*e.scale, scale_.get(), channels);
      folded_.scale = scale_.get();
    }
    if (e.bias || e.shift) {
      T* shift = shift_.get();
      std::fill_n(shift, channels + kPad, T{0});
      if (e.bias) copy(*e.bias, shift, channels);
      if (e.bias && e.scale)
        for (int64_t i = 0; i < channels; ++i) shift[i] *= scale_[i];
      if (e.shift) {
        const T* from = data<T>(*e.shift);
        const int64_t stride = e.shift->stride(0);
        for (int64_t i = 0; i < channels; ++i) shift[i] += from[i * stride];
      }
      folded_.shift = shift;
    }
  }

  const Epilogue<T>& get() const { return folded_; }

 private:
  static constexpr int64_t kPad = 64;

  static void copy(const Tensor& vector, T* to, int64_t channels) {
    const T* from = data<T>(vector);
    const int64_t stride = vector.stride(0);
    for (int64_t i = 0; i < channels; ++i) to[i] = from[i * stride];
    std::fill_n(to + channels, kPad, T{0});
  }

  Scratch<T> scale_, shift_;
  Epilogue<T> folded_;
};

}  // namespace nnarch
