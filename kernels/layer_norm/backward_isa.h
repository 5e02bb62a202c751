// The gradients of layer and RMS normalization, and theirs.
#pragma once

#include "layer_norm/cpu_kernels.h"
#include "layer_norm/row_isa.h"

namespace nnarch::NNARCH_ISA {

// What the gradient of a row needs to know of it: ds = (u - mean_u - (s - mean)·of_d)·rstd.
template <class S>
struct GradRow {
  using T = Compute<S>;
  const S *grad, *grad_sum, *s;
  S* ds;
  T mean, rstd, of_d, mean_u;
};

template <class S>
NNARCH_INLINE GradRow<S> grad_row(const NormBackward<S>& a, int64_t r) {
  using T = Compute<S>;
  GradRow<S> row;
  row.grad = a.grad[r];
  row.grad_sum = a.grad_sum.data ? a.grad_sum[r] : nullptr;
  row.s = a.s[r];
  row.mean = a.mean ? a.mean[r] : T{0};
  row.rstd = a.rstd[r];
  if (!a.ds) return row;
  row.ds = a.ds + r * a.columns;
  const auto sums = sum_row<T, 2>(a.columns, [&](int64_t i, int64_t n) NNARCH_INLINE_LAMBDA {
    const Vec<T> u = load_as(row.grad + i, n) * load_n(a.weight + i, n);
    return Terms<T, 2>{{u, u * (load_as(row.s + i, n) - row.mean)}};
  });
  const double rstd = row.rstd, inverse = 1.0 / static_cast<double>(a.columns);
  row.of_d = static_cast<T>(sums.of[1] * inverse * rstd * rstd);
  row.mean_u = a.mean ? static_cast<T>(sums.of[0] * inverse) : T{0};
  return row;
}

// Some rows at once: the parameters' gradients are loaded and stored once for all of them.
template <class S, int rows, bool parameters>
NNARCH_INLINE void backward_of(const NormBackward<S>& a, int64_t first, Compute<S>* dweight,
                               Compute<S>* dbias) {
  using T = Compute<S>;
  GradRow<S> row[rows];
  for (int r = 0; r < rows; ++r) row[r] = grad_row(a, first + r);
  over_row<T>(a.columns, [&](int64_t i, int64_t n) NNARCH_INLINE_LAMBDA {
    const Vec<T> weight = load_n(a.weight + i, n);
    Vec<T> of_weight = {}, of_bias = {};
    for (int r = 0; r < rows; ++r) {
      const Vec<T> grad = load_as(row[r].grad + i, n);
      const Vec<T> d = load_as(row[r].s + i, n) - row[r].mean;
      if constexpr (parameters) {
        of_weight += grad * (d * row[r].rstd);
        of_bias += grad;
      }
      if (!a.ds) continue;
      Vec<T> u = grad * weight;
      keep_in_register(u);  // rounded as in its mean: in rows of one column they cancel exactly
      Vec<T> ds = ((u - row[r].mean_u) - d * row[r].of_d) * row[r].rstd;
      if (row[r].grad_sum) ds += load_as(row[r].grad_sum + i, n);
      put(row[r].ds + i, ds, n, a.past_caches);
    }
    if constexpr (parameters) {
      store_n(dweight + i, load_n(dweight + i, n) + of_weight, n);
      store_n(dbias + i, load_n(dbias + i, n) + of_bias, n);
    }
  });
}

template <class S, bool parameters>
void backward_rows_of(const NormBackward<S>& a, int64_t first, int64_t count, Compute<S>* dweight,
                      Compute<S>* dbias) {
  int64_t r = 0;
  for (; r + kGradRows <= count; r += kGradRows)
    backward_of<S, kGradRows, parameters>(a, first + r, dweight, dbias);
  for (; r < count; ++r) backward_of<S, 1, parameters>(a, first + r, dweight, dbias);
  if (a.past_caches) finish_streaming();
}

template <class S>
void backward_rows(const NormBackward<S>& a, int64_t first, int64_t count, Compute<S>* dweight,
                   Compute<S>* dbias) {
  if (dweight)
    backward_rows_of<S, true>(a, first, count, dweight, dbias);
  else
    backward_rows_of<S, false>(a, first, count, dweight, dbias);
}

// With a = gg_ds, u = grad·weight, q = gg_weight·grad and P(v) = v - E[v] - x̂·E[v·x̂], where E[v]
// is left out for rms:
//   d_grad = weight·rstd·P(a) + gg_weight·x̂ + gg_bias       dweight = Σ grad·rstd·P(a)
//   d_s = rstd·P(q) - rstd²·(E[u·x̂]·P(a) + E[a·x̂]·P(u) + x̂·E[a·P(u)])
template <class S>
void backward_backward_rows(const NormBackwardBackward<S>& o, int64_t first, int64_t count,
                            Compute<S>* dweight) {
  using T = Compute<S>;
  const double inverse = 1.0 / static_cast<double>(o.columns);
  for (int64_t r = first; r < first + count; ++r) {
    const S *gg_ds = o.gg_ds[r], *grad = o.grad[r], *s = o.s[r];
    const T mean = o.mean ? o.mean[r] : T{0}, rstd = o.rstd[r];
    const auto sums = sum_row<T, 7>(o.columns, [&](int64_t i, int64_t n) NNARCH_INLINE_LAMBDA {
      const Vec<T> a = load_as(gg_ds + i, n), g = load_as(grad + i, n);
      const Vec<T> u = g * load_n(o.weight + i, n), q = g * load_n(o.gg_weight + i, n);
      const Vec<T> x = (load_as(s + i, n) - mean) * rstd;
      return Terms<T, 7>{{a, u, q, a * x, u * x, q * x, a * u}};
    });
    double e[7];
    for (int t = 0; t < 7; ++t) e[t] = o.mean || t > 2 ? sums.of[t] * inverse : 0.0;
    const T of_a = static_cast<T>(e[0]), of_u = static_cast<T>(e[1]), of_q = static_cast<T>(e[2]);
    const T of_ax = static_cast<T>(e[3]), of_ux = static_cast<T>(e[4]);
    const T of_qx = static_cast<T>(e[5]);
    const T of_apu = static_cast<T>(e[6] - e[0] * e[1] - e[3] * e[4]);
    S *d_grad = o.d_grad + r * o.columns, *d_s = o.d_s + r * o.columns;
    over_row<T>(o.columns, [&](int64_t i, int64_t n) NNARCH_INLINE_LAMBDA {
      const Vec<T> g = load_as(grad + i, n);
      const Vec<T> weight = load_n(o.weight + i, n), gg_weight = load_n(o.gg_weight + i, n);
      const Vec<T> x = (load_as(s + i, n) - mean) * rstd;
      const Vec<T> pa = load_as(gg_ds + i, n) - of_a - x * of_ax;
      const Vec<T> pu = g * weight - of_u - x * of_ux, pq = g * gg_weight - of_q - x * of_qx;
      const Vec<T> scaled = pa * rstd;
      store_as(d_grad + i, weight * scaled + gg_weight * x + load_n(o.gg_bias + i, n), n);
      store_as(d_s + i, rstd * (pq - rstd * (of_ux * pa + of_ax * pu + of_apu * x)), n);
      store_n(dweight + i, load_n(dweight + i, n) + g * scaled, n);
    });
  }
}

}  // namespace nnarch::NNARCH_ISA
