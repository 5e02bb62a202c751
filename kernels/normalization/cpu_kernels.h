// The normalization kernels of one instruction set, and the blocks of a tensor they run on.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace nnarch {

// Where the tensors of an operation are taken to be.
enum class Reach {
  near,  // in a cache
  far,   // in memory: what is read next is asked for, in the order of its addresses
  past,  // and the output goes there past the caches (cpu/streaming.h)
};

// The tensors of an operation. Those that it does not use are null. Element i of each belongs to
// the same position; per-channel vectors are indexed by channel.
template <class T>
struct NormOperands {
  const T* x = nullptr;
  const T* grad = nullptr;      // of y
  const T* gradgrad = nullptr;  // of dx
  const T* residual = nullptr;
  const T* y = nullptr;     // saved output: grad is multiplied by act'(y)
  const T* mean = nullptr;  // [C], subtracted from x
  int64_t activation = 0;
  T alpha = 0;
  Reach reach = Reach::near;
};

// Sums over all positions of a channel. With d = x - mean and g = grad·act'(y):
enum class Reduction {
  sum,              // x
  dot,              // x·grad
  centered,         // d, d²
  backward,         // g, g·d
  double_backward,  // gradgrad, grad, gradgrad·d, grad·d, gradgrad·grad
};
inline constexpr int kMaxTerms = 5;
inline constexpr int terms_of(Reduction r) {
  switch (r) {
    case Reduction::sum:
    case Reduction::dot:
      return 1;
    case Reduction::centered:
    case Reduction::backward:
      return 2;
    default:
      return kMaxTerms;
  }
}

// Per-channel factors of the elementwise steps, [C] each.
template <class T>
struct NormFactors {
  const T* scale = nullptr;  // affine: act(x·scale + shift + residual)
  const T* shift = nullptr;
  const T* of_gradgrad = nullptr;  // out = gradgrad·of_gradgrad + g·of_grad + d·of_x + constant
  const T* of_grad = nullptr;
  const T* of_x = nullptr;
  const T* constant = nullptr;
};

// A block is either `count` whole pixels of `channels` each, where channels are innermost in
// memory ("rows"), or `count` elements of one channel's plane. `first` is the offset of its first
// element, `channel` the channel of a plane.
template <class T>
struct NormTable {
  // Adds term t of channel c to sums[t * channels + c].
  void (*reduce_rows)(Reduction, const NormOperands<T>&, int64_t first, int64_t count,
                      int64_t channels, double* sums);
  void (*reduce_plane)(Reduction, const NormOperands<T>&, int64_t first, int64_t count,
                       int64_t channel, int64_t channels, double* sums);
  void (*affine_rows)(const NormOperands<T>&, const NormFactors<T>&, T* out, int64_t first,
                      int64_t count, int64_t channels);
  void (*affine_plane)(const NormOperands<T>&, const NormFactors<T>&, T* out, int64_t first,
                       int64_t count, int64_t channel);
  void (*combine_rows)(const NormOperands<T>&, const NormFactors<T>&, T* out, int64_t first,
                       int64_t count, int64_t channels);
  void (*combine_plane)(const NormOperands<T>&, const NormFactors<T>&, T* out, int64_t first,
                        int64_t count, int64_t channel);
};

NNARCH_PER_ISA(template <class T> const NormTable<T>& norm_table();)

}  // namespace nnarch
