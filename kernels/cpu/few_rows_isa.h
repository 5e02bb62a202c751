// A few rows of x past rows of weights in the type that these are stored in, at the bandwidth of
// reading them: GemmTable<T>::few_rows (gemm.h), and the same of half types. For *_isa.cpp.
#pragma once

#include "cpu/epilogue_isa.h"
#include "cpu/simd.h"
#include "cpu/stored_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

// y[r][s] = Σ_k x[r][k]·w[s][k] for a few rows r of x and s of weights, which lie `apart`; each in
// `Chains` independent sums. y[r][s] lies at r·y_stride + s·y_apart.
template <class T, class W, int Rows, int Chains, int... I>
NNARCH_INLINE void dot_rows(Indices<I...>, const T* x, int64_t x_stride, const W* w, int64_t apart,
                            int64_t depth, T* y, int64_t y_stride, int64_t y_apart) {
  constexpr int64_t lanes = kLanes<T>, step = lanes * Chains;
  constexpr int sums = sizeof...(I), each = Rows * Chains;  // of a row of weights
  const T* of_x[sums] = {(x + I / Chains % Rows * x_stride + I % Chains * lanes)...};
  const W* of_w[sums] = {(w + I / each * apart + I % Chains * lanes)...};
  Vec<T> sum[sums] = {(static_cast<void>(I), Vec<T>{})...};
  int64_t k = 0;
  for (; k + step <= depth; k += step) ((sum[I] += load(of_x[I] + k) * load_as(of_w[I] + k)), ...);
  for (; k < depth; k += lanes) {
    const int64_t left = depth - k < lanes ? depth - k : lanes;
    for (int i = 0; i < sums; i += Chains)
      sum[i] += load_n(of_x[i] + k, left) * load_as(of_w[i] + k, left);
  }
  for (int i = 0; i < sums; i += Chains) {
    Vec<T> total = sum[i];
    for (int c = 1; c < Chains; ++c) total += sum[i + c];
    y[i / Chains % Rows * y_stride + i / each * y_apart] = horizontal_sum<T>(total);
  }
}

// Rows of weights are read as `Streams` streams, from as many parts of them: one core gets 24 GB/s
// from memory by four and 17 by one (Zen 3; 75 and 67 from the last-level cache). Rows that are
// neighbours are one stream, or less.
template <class T, class W, int Rows, int Streams, int Chains>
NNARCH_NOINLINE void rows_by_weights(const T* x, int64_t x_stride, const W* w, int64_t w_stride,
                                     int64_t depth, int64_t n, T* y, int64_t y_stride) {
  const int64_t part = n / Streams;
  for (int64_t j = 0; j < part; ++j)
    dot_rows<T, W, Rows, Chains>(MakeIndices<Rows * Streams * Chains>{}, x, x_stride,
                                 w + j * w_stride, part * w_stride, depth, y + j, y_stride, part);
  for (int64_t j = part * Streams; j < n; ++j)
    dot_rows<T, W, Rows, Chains>(MakeIndices<Rows * Chains>{}, x, x_stride, w + j * w_stride, 0,
                                 depth, y + j, y_stride, 0);
}

template <class T, class W>
void few_rows_of(const T* x, int64_t x_stride, int64_t m, const W* w, int64_t w_stride,
                 int64_t depth, int64_t n, T* y, int64_t y_stride, const Epilogue<T>& epilogue) {
  for (int64_t r = 0; r < m; r += 4) {
    constexpr decltype(&rows_by_weights<T, W, 1, 4, 2>) of[] = {
        rows_by_weights<T, W, 1, 4, 2>, rows_by_weights<T, W, 2, 4, 1>,
        rows_by_weights<T, W, 3, 2, 1>, rows_by_weights<T, W, 4, 2, 1>};
    const int64_t count = m - r < 4 ? m - r : 4;
    of[count - 1](x + r * x_stride, x_stride, w, w_stride, depth, n, y + r * y_stride, y_stride);
  }
  for (int64_t r = 0; r < m; ++r) finish_row<T>(epilogue, r * y_stride, n, y + r * y_stride);
}

}  // namespace
}  // namespace nnarch::NNARCH_ISA
