// Gradients of x and of the weight for one block of input capsules. For *_isa.cpp files.
//
// The votes' gradients are a few rank-1 terms. They are formed for one output capsule and some
// samples at a time and, still in the first cache, multiplied with the weight and with x.
#pragma once

#include "capsule_routing/votes_isa.h"

namespace nnarch::NNARCH_ISA {

// votes_grad[d] = constant[d] + Σ of N terms (added to what stands there unless `first`).
template <class T, int N>
NNARCH_INLINE void form_terms(const T* constant, const T* coefficients, int64_t coefficient_step,
                              const T* factors, int64_t factor_step, int64_t dim, bool first,
                              T* votes_grad) {
  constexpr int64_t block = kCapsuleBlock<T>;
  for (int part = 0; part < kParts<T>; ++part) {
    Vec<T> c[N > 0 ? N : 1];
    for (int t = 0; t < N; ++t) c[t] = load(coefficients + t * coefficient_step + part * kLanes<T>);
    T* to = votes_grad + part * kLanes<T>;
    for (int64_t d = 0; d < dim; ++d, to += block) {
      Vec<T> sum = first ? broadcast(constant ? constant[d] : T(0)) : load(to);
      for (int t = 0; t < N; ++t) sum += c[t] * broadcast(factors[t * factor_step + d]);
      store(to, sum);
    }
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
    for (int s = 0; s < SAMPLES; ++s) g[s] = load(votes_grad + s * sample_step + d * block);
    for (int k = 0; k < N; ++k) {
      const Vec<T> w = load(weight + d * weight_step + k * block);
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
  for (int part = 0; part < kParts<T>; ++part) {
    const int64_t at = part * kLanes<T>;
    over_values(s.in, [&](auto values, int64_t k) NNARCH_INLINE_LAMBDA {
      T* to[SAMPLES];
      for (int i = 0; i < SAMPLES; ++i) to[i] = x_grad[sample + i] + k * block + at;
      add_x_grad<T, decltype(values)::count, SAMPLES>(weight + k * block + at, s.in * block,
                                                      votes_grad + at, s.dim * block, s.dim, to);
    });
  }
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
    for (int d = 0; d < ROWS; ++d) g[d] = load(votes_grad + d * block);
    for (int k = 0; k < N; ++k) {
      const Vec<T> value = load(x + k * block);
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
  const int64_t sample_step = s.dim * block, weight_step = s.in * block;
  for (int part = 0; part < kParts<T>; ++part) {
    over_values(s.in, [&](auto values, int64_t k) NNARCH_INLINE_LAMBDA {
      constexpr int n = decltype(values)::count;
      const T *g = votes_grad + part * kLanes<T>, *from = x + k * block + part * kLanes<T>;
      T* to = weight_grad + k * block + part * kLanes<T>;
      int64_t d = 0;
      for (; d + kVoteSamples <= s.dim; d += kVoteSamples)
        add_weight_grad<T, n, kVoteSamples>(g + d * block, sample_step, from, x_step, samples,
                                            first, to + d * weight_step, weight_step);
      for (; d < s.dim; ++d)
        add_weight_grad<T, n, 1>(g + d * block, sample_step, from, x_step, samples, first,
                                 to + d * weight_step, weight_step);
    });
  }
}

template <class T>
void grad_of_block(const CapsuleShape& s, const GradBlock<T>& g) {
  constexpr int64_t block = kCapsuleBlock<T>;
  const int64_t capsule = s.dim * block;
  for (int64_t i = 0; i < g.samples; ++i)
    for (int64_t k = 0; k < s.in * block; k += kLanes<T>) store(g.x_grad[i] + k, Vec<T>{});
  for (int64_t o = 0; o < s.out; ++o) {
    const T* weight = g.weight + o * capsule * s.in;
    for (int64_t first = 0; first < g.samples; first += kGradSamples) {
      const int64_t rest = g.samples - first, n = rest < kGradSamples ? rest : kGradSamples;
      for (int64_t i = 0; i < n; ++i) {
        const T* constant = g.constant.first ? g.constant[first + i] + o * s.dim : nullptr;
        form(s, constant, g.coefficients[first + i] + o * block, g.factors[first + i] + o * s.dim,
             g.terms, g.scratch + i * capsule);
      }
      int64_t i = 0;
      for (; i + kVoteSamples <= n; i += kVoteSamples)
        x_grad_of_samples<T, kVoteSamples>(s, weight, g.scratch + i * capsule, g.x_grad, first + i);
      for (; i < n; ++i)
        x_grad_of_samples<T, 1>(s, weight, g.scratch + i * capsule, g.x_grad, first + i);
      weight_grad_of_samples(s, g.scratch, g.x[first], g.x.step, n, g.first && first == 0,
                             g.weight_grad + o * capsule * s.in);
    }
  }
}

}  // namespace nnarch::NNARCH_ISA
