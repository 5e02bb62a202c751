// Layer and RMS normalization, row by row: the sum, its statistics, the result.
//
// A row is read from memory once. Where it is a sum, or of a half type, it goes to a scratch row in
// the first-level cache, from where its squared deviations and the result are computed.
#pragma once

#include "cpu/philox_isa.h"
#include "layer_norm/cpu_kernels.h"
#include "layer_norm/row_isa.h"

namespace nnarch::NNARCH_ISA {
// A row before it is normalized: s = x·factors + residual.
template <class S>
struct Addends {
  const S *x, *residual;      // residual and factors may be null
  const Compute<S>* factors;  // of dropout
};

// Σ s, or Σ s² for rms, of a row that is also stored to `row`, and to `sum` where there is one.
template <class S, bool rms>
NNARCH_INLINE double stage_row(const Addends<S>& a, int64_t columns, Compute<S>* row, S* sum,
                               bool past_caches) {
  using T = Compute<S>;
  return sum_row<T, 1>(
             columns,
             [&](int64_t i, int64_t n) NNARCH_INLINE_LAMBDA {
               Vec<T> s = load_as(a.x + i, n);
               if (a.factors) s *= load_n(a.factors + i, n);
               if (a.residual) s += load_as(a.residual + i, n);
               s = rounded_as<S>(s);  // y is that of the sum that backward and the caller see
               store_n(row + i, s, n);
               if (sum) put(sum + i, s, n, past_caches);
               return Terms<T, 1>{{rms ? s * s : s}};
             })
      .of[0];
}

// The same of a row that is there already.
template <class T, bool rms>
NNARCH_INLINE double sum_of(const T* row, int64_t columns) {
  return sum_row<T, 1>(columns,
                       [&](int64_t i, int64_t n) NNARCH_INLINE_LAMBDA {
                         const Vec<T> s = load_n(row + i, n);
                         return Terms<T, 1>{{rms ? s * s : s}};
                       })
      .of[0];
}

template <class T>
NNARCH_INLINE double squared_deviations(const T* row, int64_t columns, T mean) {
  return sum_row<T, 1>(columns,
                       [&](int64_t i, int64_t n) NNARCH_INLINE_LAMBDA {
                         const Vec<T> d = load_n(row + i, n) - mean;
                         return Terms<T, 1>{{d * d}};
                       })
      .of[0];
}

// The factors of dropout for a row, or null.
template <class T>
NNARCH_INLINE const T* factors_of(const RowDropout* dropout, int64_t row, int64_t columns, T* to) {
  if (!dropout) return nullptr;
  const DropoutRule rule{dropout->seed, dropout->threshold, dropout->scale};
  dropout_factors(rule, 0, static_cast<uint32_t>(row), columns, to);
  return to;
}

template <class S, bool rms>
void forward_rows(const NormForward<S>& a, int64_t first, int64_t count, Compute<S>* scratch) {
  using T = Compute<S>;
  const int64_t columns = a.columns;
  const double inverse = 1.0 / static_cast<double>(columns);
  const bool in_place = sizeof(S) == sizeof(T) && !a.residual.data && !a.dropout;
  for (int64_t r = first; r < first + count; ++r) {
    const Addends<S> addends{a.x[r], a.residual.data ? a.residual[r] : nullptr,
                             factors_of(a.dropout, r, columns, scratch + columns + 64)};
    const T* row = scratch;
    double total;
    if (in_place) {
      row = reinterpret_cast<const T*>(addends.x);
      total = sum_of<T, rms>(row, columns);
    } else {
      S* sum = a.sum ? a.sum + r * columns : nullptr;
      total = stage_row<S, rms>(addends, columns, scratch, sum, a.past_caches);
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

template <class S>
void dropout_rows(const Rows<S>& x, const RowDropout& dropout, int64_t first, int64_t count,
                  int64_t columns, Compute<S>* scratch, S* y) {
  using T = Compute<S>;
  for (int64_t r = first; r < first + count; ++r) {
    const S* from = x[r];
    const T* factors = factors_of(&dropout, r, columns, scratch);
    over_row<T>(columns, [&](int64_t i, int64_t n) NNARCH_INLINE_LAMBDA {
      store_as(y + r * columns + i, load_as(from + i, n) * load_n(factors + i, n), n);
    });
  }
}

}  // namespace nnarch::NNARCH_ISA
