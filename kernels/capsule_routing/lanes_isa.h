// Samples side by side, one in each lane: votes are computed in registers in every iteration and
// reach no further than the first cache. For *_isa.cpp files.
//
// The weight is read as it lies, each value broadcast to all samples: with 16 samples in a vector,
// a product of 8 values costs less than a vote's way from a far last-level cache and back.
#pragma once

#include "capsule_routing/votes_isa.h"
#include "cpu/math.h"
#include "cpu/transpose_isa.h"
#include "local_response_norm/power_isa.h"  // square_root

namespace nnarch::NNARCH_ISA {

// Values of an output capsule that are summed side by side, at most: each its own chain of FMAs.
#if defined(NNARCH_ISA_avx512)
inline constexpr int kLaneRows = 16;
#else
inline constexpr int kLaneRows = 8;
#endif

// Capsules whose weighted sums share a pass over what they are added to: 20 KB of votes of 10 × 16
// values, 10 of sums and 10 of outputs are in the first cache.
inline constexpr int kLaneCapsules = 2;

// Calls f(Count<n>{}, d) for runs of n values that cover [0, dim).
template <int N, class F>
NNARCH_INLINE void over_rows(int64_t dim, const F& f, int64_t d = 0) {
  for (; d + N <= dim; d += N) f(Count<N>{}, d);
  if constexpr (N > 1) over_rows<N / 2>(dim, f, d);
}

// to[value][lane] from the values of `samples` samples, at most one a lane; other lanes are zero.
// Read again at once, unlike what `transpose_matrix` writes past the caches: that took 130 of a
// capsule's 370 ns.
template <class T>
void to_lanes(const T* from, int64_t step, int64_t samples, int64_t values, T* to) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t k = 0;
  for (; k + lanes <= values; k += lanes, to += lanes * lanes) {
    Vec<T> row[lanes];
    for (int64_t i = 0; i < lanes; ++i) row[i] = i < samples ? load(from + i * step + k) : Vec<T>{};
    transpose_rows<lanes / 2, T>(row);
    for (int64_t i = 0; i < lanes; ++i) store(to + i * lanes, row[i]);
  }
  for (; k < values; ++k, to += lanes)
    for (int64_t i = 0; i < lanes; ++i) to[i] = i < samples ? from[i * step + k] : T(0);
}

// sum[d] += Σ_k weight[d][k] · x[k]; IN is D_in where it is known, or 0.
template <class T, int N, int IN>
NNARCH_INLINE void add_votes(const T* weight, int64_t in, const T* x, Vec<T> (&sum)[N]) {
  const int64_t values = IN > 0 ? IN : in;
#pragma GCC unroll 8
  for (int64_t k = 0; k < values; ++k) {
    Vec<T> value = load(x + k * kLanes<T>);
    keep_in_register(value);
    for (int d = 0; d < N; ++d) sum[d] += broadcast(weight[d * values + k]) * value;
  }
}

template <class T, int IN>
NNARCH_INLINE void lane_sums_of(const CapsuleShape& s, const LaneCapsules<T>& c, T* sums) {
  const int64_t in = IN > 0 ? IN : s.in;
  for (int64_t o = 0; o < s.out; ++o)
    over_rows<kLaneRows>(s.dim, [&](auto rows, int64_t d) NNARCH_INLINE_LAMBDA {
      constexpr int n = decltype(rows)::count;
      T* const to = sums + (o * s.dim + d) * kLanes<T>;
      const T* weight = c.weight + o * c.weight_step + d * in;
      const T* x = c.x;
      Vec<T> sum[n];
      for (int j = 0; j < n; ++j) sum[j] = load(to + j * kLanes<T>);
      for (int64_t i = 0; i < c.count; ++i, weight += s.dim * in, x += in * kLanes<T>)
        add_votes<T, n, IN>(weight, in, x, sum);
      for (int j = 0; j < n; ++j) store(to + j * kLanes<T>, sum[j]);
    });
}

// One capsule's votes for one output capsule, and their products with each of some vectors: the
// output so far, and its gradient.
template <class T, int IN, int FACTORS>
NNARCH_INLINE void lane_dots(const CapsuleShape& s, const T* weight, const T* x,
                             const T* const (&factors)[FACTORS], int64_t at, T* votes,
                             Vec<T> (&dots)[FACTORS]) {
  const int64_t in = IN > 0 ? IN : s.in;
  for (int f = 0; f < FACTORS; ++f) dots[f] = Vec<T>{};
  over_rows<kLaneRows>(s.dim, [&](auto rows, int64_t d) NNARCH_INLINE_LAMBDA {
    constexpr int n = decltype(rows)::count, chains = n < 4 ? n : 4;
    Vec<T> v[n]{}, dot[FACTORS][chains]{};
    add_votes<T, n, IN>(weight + d * in, in, x, v);
#pragma GCC unroll 16
    for (int j = 0; j < n; ++j) {
      store(votes + (d + j) * kLanes<T>, v[j]);
#pragma GCC unroll 2
      for (int f = 0; f < FACTORS; ++f)
        dot[f][j % chains] += v[j] * load(factors[f] + at + (d + j) * kLanes<T>);
    }
    for (int f = 0; f < FACTORS; ++f)
      for (int j = 0; j < chains; ++j) dots[f] += dot[f][j];
  });
}

// What `careful_softmax` is to a block of one sample's capsules, for one capsule of some samples.
template <class T>
NNARCH_NOINLINE Vec<T> careful_lane_softmax(const CapsuleShape& s, const T* votes, const T* outputs,
                                            T* exponentials) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> most = broadcast(-static_cast<T>(__builtin_inf())), sum{};
  for (int64_t o = 0; o < s.out; ++o) {
    Vec<T> logit{};
    for (int64_t d = 0; d < s.dim; ++d, votes += lanes, outputs += lanes)
      logit += load(votes) * load(outputs);
    most = logit > most ? logit : most;
    store(exponentials + o * lanes, logit);
  }
  for (int64_t o = 0; o < s.out; ++o) {
    const Vec<T> e = exp<T>(load(exponentials + o * lanes) - most);
    store(exponentials + o * lanes, e);
    sum += e;
  }
  return T(1) / sum;
}

// Of N capsules, `step` apart: sums[d] += Σ c·votes[d].
template <class T, int N>
NNARCH_INLINE void add_lane_votes(const T* votes, int64_t step, const Vec<T> (&c)[N], int64_t dim,
                                  T* sums) {
#pragma GCC unroll 8
  for (int64_t d = 0; d < dim; ++d) {
    Vec<T> sum = load(sums + d * kLanes<T>);
    for (int n = 0; n < N; ++n) sum += c[n] * load(votes + n * step + d * kLanes<T>);
    store(sums + d * kLanes<T>, sum);
  }
}

// Votes of one capsule, their products with the factors, `rows[f]` [O][lanes], of which the first
// become their softmax's exponentials, and one over the sum of those. The maximum is left out where
// nothing is lost by it: it would be a chain of as many steps as there are output capsules.
template <class T, int IN, int FACTORS>
NNARCH_INLINE Vec<T> lane_votes(const CapsuleShape& s, const T* weight, int64_t weight_step,
                                const T* x, const T* const (&factors)[FACTORS], T* votes,
                                T* const (&rows)[FACTORS]) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t output = s.dim * lanes;
  for (int64_t o = 0; o < s.out; ++o) {
    Vec<T> dots[FACTORS];
    lane_dots<T, IN, FACTORS>(s, weight + o * weight_step, x, factors, o * output,
                              votes + o * output, dots);
    for (int f = 0; f < FACTORS; ++f) store(rows[f] + o * lanes, dots[f]);
  }
  Vec<T> sum{};
  for (int64_t o = 0; o < s.out; ++o) {
    const Vec<T> e = exp<T>(load(rows[0] + o * lanes));
    store(rows[0] + o * lanes, e);
    sum += e;
  }
  const Vec<T> scale = T(1) / sum;
  if (!(horizontal_sum<T>(sum + scale) < T(1e18))) [[unlikely]]
    return careful_lane_softmax(s, votes, factors[0], rows[0]);
  return scale;
}

// N capsules: their sums share a pass over what is added to.
template <class T, int IN, int N>
NNARCH_INLINE void lane_iteration_of(const CapsuleShape& s, const LaneCapsules<T>& c, int64_t i,
                                     const T* outputs, T* scratch, T* sums) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t in = IN > 0 ? IN : s.in, output = s.dim * lanes, logits = s.out * lanes,
                step = s.out * output;
  T *const exponentials = scratch, *const votes = scratch + N * logits;
  Vec<T> scale[N];
  for (int n = 0; n < N; ++n)
    scale[n] = lane_votes<T, IN, 1>(s, c.weight + (i + n) * s.dim * in, c.weight_step,
                                    c.x + (i + n) * in * lanes, {outputs}, votes + n * step,
                                    {exponentials + n * logits});
  for (int64_t o = 0; o < s.out; ++o) {
    Vec<T> weights[N];
    for (int n = 0; n < N; ++n) weights[n] = load(exponentials + n * logits + o * lanes) * scale[n];
    add_lane_votes<T, N>(votes + o * output, step, weights, s.dim, sums + o * output);
  }
}

// The softmax c from its exponentials, and its gradient db = c·(dc - Σ c·dc) in the place of dc.
template <class T>
NNARCH_INLINE void lane_softmax_grad(int64_t out, Vec<T> scale, T* c, T* db) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> mean{};
  for (int64_t o = 0; o < out; ++o) {
    const Vec<T> value = load(c + o * lanes) * scale;
    store(c + o * lanes, value);
    mean += value * load(db + o * lanes);
  }
  for (int64_t o = 0; o < out; ++o)
    store(db + o * lanes, load(c + o * lanes) * (load(db + o * lanes) - mean));
}

template <class T, int IN, int N>
NNARCH_INLINE void lane_iteration_grad_of(const CapsuleShape& s, const LaneCapsules<T>& c,
                                          int64_t i, const T* outputs, const T* sum_grad,
                                          T* coefficients, T* votes, T* sums) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t in = IN > 0 ? IN : s.in, output = s.dim * lanes, logits = s.out * lanes,
                step = s.out * output;
  coefficients += 2 * i * logits;
  for (int n = 0; n < N; ++n) {
    T *const softmax = coefficients + 2 * n * logits, *const db = softmax + logits;
    const Vec<T> scale = lane_votes<T, IN, 2>(s, c.weight + (i + n) * s.dim * in, c.weight_step,
                                              c.x + (i + n) * in * lanes, {outputs, sum_grad},
                                              votes + n * step, {softmax, db});
    lane_softmax_grad(s.out, scale, softmax, db);
  }
  for (int64_t o = 0; o < s.out; ++o) {
    Vec<T> db[N];
    for (int n = 0; n < N; ++n) db[n] = load(coefficients + (2 * n + 1) * logits + o * lanes);
    add_lane_votes<T, N>(votes + o * output, step, db, s.dim, sums + o * output);
  }
}

// Calls f(Count<D_in>{}) for the usual numbers of values, f(Count<0>{}) for others.
template <class F>
NNARCH_INLINE void with_values(int64_t in, const F& f) {
  switch (in) {
    case 4:
      return f(Count<4>{});
    case 8:
      return f(Count<8>{});
    case 16:
      return f(Count<16>{});
    default:
      return f(Count<0>{});
  }
}

template <class T>
void lane_sums(const CapsuleShape& s, const LaneCapsules<T>& c, T* sums) {
  with_values(s.in, [&](auto values) NNARCH_INLINE_LAMBDA {
    lane_sums_of<T, decltype(values)::count>(s, c, sums);
  });
}

// Calls f(Count<D_in>{}, Count<n>{}, i) for runs of n capsules that cover them all.
template <class F>
NNARCH_INLINE void over_lane_capsules(int64_t in, int64_t count, const F& f) {
  with_values(in, [&](auto values) NNARCH_INLINE_LAMBDA {
    int64_t i = 0;
    for (; i + kLaneCapsules <= count; i += kLaneCapsules) f(values, Count<kLaneCapsules>{}, i);
    for (; i < count; ++i) f(values, Count<1>{}, i);
  });
}

template <class T>
void lane_iteration(const CapsuleShape& s, const LaneCapsules<T>& c, const T* outputs, T* scratch,
                    T* sums) {
  over_lane_capsules(s.in, c.count, [&](auto in, auto run, int64_t i) NNARCH_INLINE_LAMBDA {
    lane_iteration_of<T, decltype(in)::count, decltype(run)::count>(s, c, i, outputs, scratch,
                                                                    sums);
  });
}

template <class T>
void lane_iteration_grad(const CapsuleShape& s, const LaneCapsules<T>& c, const T* outputs,
                         const T* sum_grad, T* coefficients, T* scratch, T* sums) {
  over_lane_capsules(s.in, c.count, [&](auto in, auto run, int64_t i) NNARCH_INLINE_LAMBDA {
    lane_iteration_grad_of<T, decltype(in)::count, decltype(run)::count>(
        s, c, i, outputs, sum_grad, coefficients, scratch, sums);
  });
}

template <class T>
void lane_outputs(const CapsuleShape& s, T scale, const T* bias, T* sums, T* v, T* outputs) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t o = 0; o < s.out; ++o) {
    Vec<T> energy{};
    for (int64_t j = o * s.dim; j < (o + 1) * s.dim; ++j) {
      Vec<T> sum = load(sums + j * lanes) * scale;
      if (bias) sum += bias[j];
      store(sums + j * lanes, sum);
      energy += sum * sum;
    }
    const Vec<T> factor = square_root<T>(energy) / (energy + T(1));
    for (int64_t j = o * s.dim; j < (o + 1) * s.dim; ++j) {
      const Vec<T> value = load(sums + j * lanes) * factor;
      store(v + j * lanes, value);
      store(outputs + j * lanes, load(outputs + j * lanes) + value);
    }
  }
}

}  // namespace nnarch::NNARCH_ISA
