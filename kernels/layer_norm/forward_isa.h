// Layer and RMS normalization, row by row: the sum, its statistics, the result.
//
// A row is read from memory once. Where it is a sum, or of a half type, it goes to a scratch row in
// the first-level cache, from where its squared deviations and the result are computed.
#pragma once

#include "layer_norm/cpu_kernels.h"
#include "layer_norm/row_isa.h"

namespace nnarch::NNARCH_ISA {
// Σ s, or Σ s² for rms, of a row of s = x + residual that is also stored to `row`, and to `sum`
// where there is one.
template <class S, bool rms>
NNARCH_INLINE double stage_row(const S* x, const S* residual, int64_t columns, Compute<S>* row,
                               S* sum, bool past_caches) {
  using T = Compute<S>;
  return sum_row<T, 1>(columns, [&](int64_t i, int64_t n) NNARCH_INLINE_LAMBDA {
           Vec<T> s = load_as(x + i, n);
           if (residual) s += load_as(residual + i, n);
           store_n(row + i, s, n);
           if (sum) put(sum + i, s, n, past_caches);
           return Terms<T, 1>{{rms ? s * s : s}};
         }).of[0];
}

// The same of a row that is there already.
template <class T, bool rms>
NNARCH_INLINE double sum_of(const T* row, int64_t columns) {
  return sum_row<T, 1>(columns, [&](int64_t i, int64_t n) NNARCH_INLINE_LAMBDA {
           const Vec<T> s = load_n(row + i, n);
           return Terms<T, 1>{{rms ? s * s : s}};
         }).of[0];
}

template <class T>
NNARCH_INLINE double squared_deviations(const T* row, int64_t columns, T mean) {
  return sum_row<T, 1>(columns, [&](int64_t i, int64_t n) NNARCH_INLINE_LAMBDA {
           const Vec<T> d = load_n(row + i, n) - mean;
           return Terms<T, 1>{{d * d}};
         }).of[0];
}

template <class S, bool rms>
void forward_rows(const NormForward<S>& a, int64_t first, int64_t count, Compute<S>* scratch) {
  using T = Compute<S>;
  const int64_t columns = a.columns;
  const double inverse = 1.0 / static_cast<double>(columns);
  for (int64_t r = first; r < first + count; ++r) {
    const S* x = a.x[r];
    const S* residual = a.residual.data ? a.residual[r] : nullptr;
    const T* row = scratch;
    double total;
    if constexpr (sizeof(S) == sizeof(T)) {
      if (!residual) {
        row = x;
        total = sum_of<T, rms>(row, columns);
      } else {
        total = stage_row<S, rms>(x, residual, columns, scratch, a.sum ? a.sum + r * columns : nullptr, a.past_caches);
      }
    } else {
      total = stage_row<S, rms>(x, residual, columns, scratch, a.sum ? a.sum + r * columns : nullptr, a.past_caches);
    }
    const T mean = rms ? T{0} : static_cast<T>(total * inverse);
    const double squares = rms ? total : squared_deviations<T>(row, columns, mean);
    const T rstd = static_cast<T>(1.0 / __builtin_sqrt(squares * inverse + a.eps));
    if (a.rstd) {
      a.rstd[r] = rstd;
      if (!rms) a.mean[r] = mean;
    }
    S* y = a.y + r * columns;
    over_row<T>(columns, [&](int64_t i, int64_t n) NNARCH_INLINE_LAMBDA {
      Vec<T> v = load_n(row + i, n);
      if constexpr (!rms) v -= mean;
      v = v * rstd * load_n(a.weight + i, n);
      if constexpr (!rms) v += load_n(a.bias + i, n);
      put(y + i, v, n, a.past_caches);
    });
  }
  if (a.past_caches) finish_streaming();
}

}  // namespace nnarch::NNARCH_ISA
