// The kernels of layer and RMS normalization of one instruction set.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/stored.h"

namespace nnarch {

// Where the rows of a tensor begin: at most two strides, rows themselves dense.
struct RowOffsets {
  int64_t inner = 0, outer_stride = 0, inner_stride = 0;
  // Inlined always: no copy of another instruction set shall serve the linker.
  __attribute__((always_inline)) int64_t at(int64_t row) const {
    if (row < inner) return row * inner_stride;
    return row / inner * outer_stride + row % inner * inner_stride;
  }
};

template <class S>
struct Rows {
  const S* data = nullptr;  // null: the operation has no such tensor
  RowOffsets offsets;
  __attribute__((always_inline)) const S* operator[](int64_t row) const {
    return data + offsets.at(row);
  }
};

// Which elements of a row are dropped (kernels/dropout/reference.py): words below the threshold.
struct RowDropout {
  uint64_t seed = 0, threshold = 0;
  double scale = 1;  // of the others
};

// s = dropout(x) + residual; y = (s - mean)·rstd·weight + bias, or s·rstd·weight ("rms").
template <class S>
struct NormForward {
  using T = Compute<S>;
  Rows<S> x, residual;
  const T *weight, *bias;  // [columns]; bias is null for rms
  S* sum = nullptr;        // [rows, columns], as y; written where it is not null
  S* y = nullptr;
  T *mean = nullptr, *rstd = nullptr;  // [rows], likewise
  int64_t columns = 0;
  double eps = 0;
  const RowDropout* dropout = nullptr;  // null: none
  bool rms = false, past_caches = false;
};

// The gradients of y and of the sum to that of s. With u = grad·weight and x̂ = (s - mean)·rstd:
// ds = rstd·(u - E[u] - x̂·E[u·x̂]) + grad_sum, dweight = Σ grad·x̂, dbias = Σ grad.
template <class S>
struct NormBackward {
  using T = Compute<S>;
  Rows<S> grad, grad_sum, s;
  const T *weight, *mean, *rstd;  // mean is null for rms
  S* ds = nullptr;                // written where it is not null
  int64_t columns = 0;
  bool past_caches = false;
};

// The gradients of <gg_ds, ds> + <gg_weight, dweight> + <gg_bias, dbias> for grad, s and weight.
template <class S>
struct NormBackwardBackward {
  using T = Compute<S>;
  Rows<S> gg_ds, grad, s;
  const T *gg_weight, *gg_bias, *weight, *mean, *rstd;
  S *d_grad, *d_s;
  int64_t columns = 0;
};

// Rows that the backward kernels take at once; parts of a reduction have a multiple of it.
inline constexpr int64_t kGradRows = 4;

template <class S>
struct LayerNormTable {
  using T = Compute<S>;
  // Rows [first, first + count). scratch: 2 · (columns + 64).
  void (*forward)(const NormForward<S>&, int64_t first, int64_t count, T* scratch);
  // The same; sums of the rows are added to dweight and dbias, [columns], where these are not null.
  void (*backward)(const NormBackward<S>&, int64_t first, int64_t count, T* dweight, T* dbias);
  void (*backward_backward)(const NormBackwardBackward<S>&, int64_t first, int64_t count,
                            T* dweight);
  // y = x, elements dropped or scaled. scratch: columns + 64.
  void (*dropout)(const Rows<S>& x, const RowDropout&, int64_t first, int64_t count,
                  int64_t columns, T* scratch, S* y);
};

NNARCH_PER_ISA(template <class S> const LayerNormTable<S>& layer_norm_table();)

}  // namespace nnarch
