// Gradients of x and of the weight for one block of input capsules. For *_isa.cpp files.
//
// The votes' gradients are a few rank-1 terms. They are formed for one output capsule and some
// samples at a time and, still in the first cache, multiplied with the weight and with x.
#pragma once

#include "capsule_routing/votes_isa.h"

namespace nnarch::NNARCH_ISA {

// Sums that grow side by side: of so many values of so many samples, or rows.
#if defined(NNARCH_ISA_avx512)
inline constexpr int kGradValues = 8, kGradRuns = 2;
#else
inline constexpr int kGradValues = 4, kGradRuns = 3;
#endif

// votes_grad[d] = constant[d] + Σ of N terms (added to what stands there unless `first`).
template <class T, int N>
NNARCH_INLINE void form_terms(const T* constant, const T* coefficients, int64_t coefficient_step,
                              const T* factors, int64_t factor_step, int64_t dim, bool first,
                              T* votes_grad) {
  Vec<T> c[N > 0 ? N : 1];
  for (int t = 0; t < N; ++t) c[t] = load(coefficients + t * coefficient_step);
  for (int64_t d = 0; d < dim; ++d, votes_grad += kLanes<T>) {
    Vec<T> sum = first ? broadcast(constant ? constant[d] : T(0)) : load(votes_grad);
    for (int t = 0; t < N; ++t) sum += c[t] * broadcast(factors[t * factor_step + d]);
    store(votes_grad, sum);
  }
}

template <class T>
NNARCH_INLINE void form(const CapsuleShape& s, const T* constant, const T* coefficients,
                        const T* factors, int64_t terms, T* votes_grad) {
  const int64_t c_step = s.out * kCapsuleBlock<T>, f_step = s.out * s.dim;
  int64_t t = 0;
  do {
    const T *c = coefficients + t * c_step, *f = factors + t * f_step;
    const int64_t rest = terms - t;
    if (rest >= 4)
      form_terms<T, 4>(constant, c, c_step, f, f_step, s.dim, t == 0, votes_grad), t += 4;
    else if (rest >= 2)
      form_terms<T, 2>(constant, c, c_step, f, f_step, s.dim, t == 0, votes_grad), t += 2;
    else if (rest == 1)
      form_terms<T, 1>(constant, c, c_step, f, f_step, s.dim, t == 0, votes_grad), t += 1;
    else
      form_terms<T, 0>(constant, c, c_step, f, f_step, s.dim, t == 0, votes_grad);
  } while (t < terms);
}

// x_grad[k] += Σ_d weight[d][k] · votes_grad[d]
template <class T, int N, int SAMPLES>
NNARCH_INLINE void add_x_grad(const T* weight, int64_t weight_step, const T* votes_grad,
                              int64_t sample_step, int64_t dim, T* const* x_grad) {
  constexpr int64_t block = kCapsuleBlock<T>;
  Vec<T> sum[SAMPLES][N];
  for (int s = 0; s < SAMPLES; ++s)
    for (int k = 0; k < N; ++k) sum[s][k] = load(x_grad[s] + k * block);
  for (int64_t d = 0; d < dim; ++d) {
    Vec<T> g[SAMPLES];
    for (int s = 0; s < SAMPLES; ++s) g[s] = load(votes_grad + s * sample_step + d * kLanes<T>);
    for (int k = 0; k < N; ++k) {
      Vec<T> w = load(weight + d * weight_step + k * block);
      keep_in_register(w);
      for (int s = 0; s < SAMPLES; ++s) sum[s][k] += w * g[s];
    }
  }
  for (int s = 0; s < SAMPLES; ++s)
    for (int k = 0; k < N; ++k) store(x_grad[s] + k * block, sum[s][k]);
}

template <class T, int SAMPLES>
NNARCH_INLINE void x_grad_of_samples(const CapsuleShape& s, const T* weight, const T* votes_grad,
                                     PerSample<T> x_grad, int64_t sample) {
  constexpr int64_t block = kCapsuleBlock<T>;
  over_values<kGradValues>(s.in, [&](auto values, int64_t k) NNARCH_INLINE_LAMBDA {
    T* to[SAMPLES];
    for (int i = 0; i < SAMPLES; ++i) to[i] = x_grad[sample + i] + k * block;
    add_x_grad<T, decltype(values)::count, SAMPLES>(weight + k * block, s.in * block, votes_grad,
                                                    s.dim * kLanes<T>, s.dim, to);
  });
}

// weight_grad[d][k] = Σ over samples of votes_grad[d] · x[k], for ROWS values of d; added to what
// stands there unless `first`.
template <class T, int N, int ROWS>
NNARCH_INLINE void add_weight_grad(const T* votes_grad, int64_t sample_step, const T* x,
                                   int64_t x_step, int64_t samples, bool first, T* weight_grad,
                                   int64_t weight_step) {
  constexpr int64_t block = kCapsuleBlock<T>;
  Vec<T> sum[ROWS][N];
  for (int d = 0; d < ROWS; ++d)
    for (int k = 0; k < N; ++k)
      sum[d][k] = first ? Vec<T>{} : load(weight_grad + d * weight_step + k * block);
  for (int64_t i = 0; i < samples; ++i, votes_grad += sample_step, x += x_step) {
    Vec<T> g[ROWS];
    for (int d = 0; d < ROWS; ++d) g[d] = load(votes_grad + d * kLanes<T>);
    for (int k = 0; k < N; ++k) {
      Vec<T> value = load(x + k * block);
      keep_in_register(value);
      for (int d = 0; d < ROWS; ++d) sum[d][k] += value * g[d];
    }
  }
  for (int d = 0; d < ROWS; ++d)
    for (int k = 0; k < N; ++k) store(weight_grad + d * weight_step + k * block, sum[d][k]);
}

template <class T>
NNARCH_INLINE void weight_grad_of_samples(const CapsuleShape& s, const T* votes_grad, const T* x,
                                          int64_t x_step, int64_t samples, bool first,
                                          T* weight_grad) {
  constexpr int64_t block = kCapsuleBlock<T>;
  const int64_t sample_step = s.dim * kLanes<T>, weight_step = s.in * block;
  over_values<kGradValues>(s.in, [&](auto values, int64_t k) NNARCH_INLINE_LAMBDA {
    constexpr int n = decltype(values)::count;
    const T* from = x + k * block;
    T* to = weight_grad + k * block;
    over_runs<kGradRuns>(s.dim, [&](auto rows, int64_t d) NNARCH_INLINE_LAMBDA {
      add_weight_grad<T, n, decltype(rows)::count>(votes_grad + d * kLanes<T>, sample_step, from,
                                                   x_step, samples, first, to + d * weight_step,
                                                   weight_step);
    });
  });
}

// Samples [first, first + n) of one output capsule and one part of the block.
template <class T>
NNARCH_INLINE void grad_of_part(const CapsuleShape& s, const GradBlock<T>& g, int64_t o,
                                int64_t part, int64_t first, int64_t n) {
  constexpr int64_t block = kCapsuleBlock<T>;
  const int64_t capsule = s.dim * block, at = part * kLanes<T>, step = s.dim * kLanes<T>;
  const T* weight = g.weight + o * capsule * s.in + at;
  // Coefficients lie a sample apart, which no hardware foresees.
  const int64_t term = s.out * block, next = o + 1 < s.out ? block : g.terms * term - o * block;
  for (int64_t i = 0; i < n; ++i) {
    const T* ahead = g.coefficients[first + i] + o * block + next + at;
    for (int64_t t = 0; t < g.terms; ++t) __builtin_prefetch(ahead + t * term);
    const T* constant = g.constant.first ? g.constant[first + i] + o * s.dim : nullptr;
    form(s, constant, g.coefficients[first + i] + o * block + at, g.factors[first + i] + o * s.dim,
         g.terms, g.scratch + i * step);
  }
  const PerSample<T> x_grad{g.x_grad.first + at, g.x_grad.step};
  over_runs<kGradRuns>(n, [&](auto samples, int64_t i) NNARCH_INLINE_LAMBDA {
    x_grad_of_samples<T, decltype(samples)::count>(s, weight, g.scratch + i * step, x_grad,
                                                   first + i);
  });
  weight_grad_of_samples(s, g.scratch, g.x[first] + at, g.x.step, n, g.first && first == 0,
                         g.weight_grad + o * capsule * s.in + at);
}

template <class T>
void grad_of_block(const CapsuleShape& s, const GradBlock<T>& g) {
  for (int64_t i = 0; i < g.samples; ++i)
    for (int64_t k = 0; k < s.in * kCapsuleBlock<T>; k += kLanes<T>)
      store(g.x_grad[i] + k, Vec<T>{});
  for (int64_t o = 0; o < s.out; ++o)
    for (int64_t part = 0; part < kParts<T>; ++part)
      for (int64_t first = 0; first < g.samples; first += kGradSamples) {
        const int64_t rest = g.samples - first;
        grad_of_part(s, g, o, part, first, rest < kGradSamples ? rest : kGradSamples);
      }
}

}  // namespace nnarch::NNARCH_ISA
