// A few rows of x past rows of weights in the type that these are stored in, at the bandwidth of
// reading them: GemmTable<T>::few_rows (gemm.h), and the same of half types. For *_isa.cpp.
#pragma once

#include "cpu/epilogue_isa.h"
#include "cpu/simd.h"
#include "cpu/stored_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

// y[r] = Σ_k x[r][k]·w[k] for a few rows r, each in `Chains` independent sums.
template <class T, class W, int Chains, int... I>
NNARCH_INLINE void dot_rows(Indices<I...>, const T* x, int64_t x_stride, const W* w, int64_t depth,
                            T* y, int64_t y_stride) {
  constexpr int64_t lanes = kLanes<T>, step = lanes * Chains, rows = sizeof...(I) / Chains;
  const T* at[sizeof...(I)] = {(x + I / Chains * x_stride + I % Chains * lanes)...};
  Vec<T> sum[sizeof...(I)] = {(static_cast<void>(I), Vec<T>{})...};
  int64_t k = 0;
  for (; k + step <= depth; k += step)
    ((sum[I] += load(at[I] + k) * load_as(w + k + I % Chains * lanes)), ...);
  for (; k < depth; k += lanes) {
    const int64_t left = depth - k < lanes ? depth - k : lanes;
    for (int64_t r = 0; r < rows; ++r)
      sum[r * Chains] += load_n(at[r * Chains] + k, left) * load_as(w + k, left);
  }
  for (int64_t r = 0; r < rows; ++r) {
    Vec<T> total = sum[r * Chains];
    for (int i = 1; i < Chains; ++i) total += sum[r * Chains + i];
    y[r * y_stride] = horizontal_sum<T>(total);
  }
}

// One row of weights after the other: a single stream is what the hardware's prefetchers follow
// best. Four rows at a time reached half of the memory's bandwidth.
template <class T, class W, int Rows, int Chains>
NNARCH_NOINLINE void rows_by_weights(const T* x, int64_t x_stride, const W* w, int64_t w_stride,
                                     int64_t depth, int64_t n, T* y, int64_t y_stride) {
  for (int64_t j = 0; j < n; ++j)
    dot_rows<T, W, Chains>(MakeIndices<Rows * Chains>{}, x, x_stride, w + j * w_stride, depth,
                           y + j, y_stride);
}

template <class T, class W>
void few_rows_of(const T* x, int64_t x_stride, int64_t m, const W* w, int64_t w_stride,
                 int64_t depth, int64_t n, T* y, int64_t y_stride, const Epilogue<T>& epilogue) {
  for (int64_t r = 0; r < m; r += 4) {
    constexpr decltype(&rows_by_weights<T, W, 1, 8>) of[] = {
        rows_by_weights<T, W, 1, 8>, rows_by_weights<T, W, 2, 4>, rows_by_weights<T, W, 3, 2>,
        rows_by_weights<T, W, 4, 2>};
    const int64_t count = m - r < 4 ? m - r : 4;
    of[count - 1](x + r * x_stride, x_stride, w, w_stride, depth, n, y + r * y_stride, y_stride);
  }
  for (int64_t r = 0; r < m; ++r) finish_row<T>(epilogue, r * y_stride, n, y + r * y_stride);
}

}  // namespace
}  // namespace nnarch::NNARCH_ISA
