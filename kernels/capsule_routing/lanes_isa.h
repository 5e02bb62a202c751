// Samples side by side, one in each lane: votes are computed in registers in every iteration and
// reach no further than the first cache. For *_isa.cpp files.
//
// The weight is read as it lies, each value broadcast to all samples: with 16 samples in a vector,
// a product of 8 values costs less than a vote's way from a far last-level cache and back.
#pragma once

#include "capsule_routing/votes_isa.h"
#include "cpu/math.h"
#include "local_response_norm/power_isa.h"  // square_root

namespace nnarch::NNARCH_ISA {

// Values of an output capsule that are summed side by side, at most: each its own chain of FMAs.
#if defined(NNARCH_ISA_avx512)
inline constexpr int kLaneRows = 16;
#else
inline constexpr int kLaneRows = 8;
#endif

// Calls f(Values<n>{}, d) for runs of n values that cover [0, dim).
template <int N, class F>
NNARCH_INLINE void over_rows(int64_t dim, const F& f, int64_t d = 0) {
  for (; d + N <= dim; d += N) f(Values<N>{}, d);
  if constexpr (N > 1) over_rows<N / 2>(dim, f, d);
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

// One capsule's votes for one output capsule, and their products with its output so far.
template <class T, int IN>
NNARCH_INLINE Vec<T> lane_logit(const CapsuleShape& s, const T* weight, const T* x,
                                const T* outputs, T* votes) {
  const int64_t in = IN > 0 ? IN : s.in;
  Vec<T> logit{};
  over_rows<kLaneRows>(s.dim, [&](auto rows, int64_t d) NNARCH_INLINE_LAMBDA {
    constexpr int n = decltype(rows)::count, chains = n < 4 ? n : 4;
    Vec<T> v[n]{}, dot[chains]{};
    add_votes<T, n, IN>(weight + d * in, in, x, v);
    for (int j = 0; j < n; ++j) {
      const int64_t at = (d + j) * kLanes<T>;
      store(votes + at, v[j]);
      dot[j % chains] += v[j] * load(outputs + at);
    }
    for (int j = 0; j < chains; ++j) logit += dot[j];
  });
  return logit;
}

// The softmax of logits [O][lanes] in place. A NaN or an infinity among a capsule's logits makes
// all of them NaN, as in torch.
template <class T>
NNARCH_INLINE void lane_softmax(int64_t out, T* logits) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> most = load(logits), sum{};
  for (int64_t o = 1; o < out; ++o) {
    const Vec<T> logit = load(logits + o * lanes);
    most = logit > most ? logit : most;
  }
  for (int64_t o = 0; o < out; ++o) {
    const Vec<T> e = exp<T>(load(logits + o * lanes) - most);
    store(logits + o * lanes, e);
    sum += e;
  }
  const Vec<T> scale = T(1) / sum;
  for (int64_t o = 0; o < out; ++o) store(logits + o * lanes, load(logits + o * lanes) * scale);
}

// sums[d] += c·votes[d]
template <class T>
NNARCH_INLINE void add_lane_votes(const T* votes, Vec<T> c, int64_t dim, T* sums) {
#pragma GCC unroll 8
  for (int64_t d = 0; d < dim; ++d) {
    T* const to = sums + d * kLanes<T>;
    store(to, load(to) + c * load(votes + d * kLanes<T>));
  }
}

template <class T, int IN>
NNARCH_INLINE void lane_iteration_of(const CapsuleShape& s, const LaneCapsules<T>& c,
                                     const T* outputs, T* scratch, T* sums) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t in = IN > 0 ? IN : s.in, output = s.dim * lanes;
  T* const votes = scratch + s.out * lanes;
  const T *weight = c.weight, *x = c.x;
  for (int64_t i = 0; i < c.count; ++i, weight += s.dim * in, x += in * lanes) {
    for (int64_t o = 0; o < s.out; ++o)
      store(scratch + o * lanes, lane_logit<T, IN>(s, weight + o * c.weight_step, x,
                                                   outputs + o * output, votes + o * output));
    lane_softmax(s.out, scratch);
    for (int64_t o = 0; o < s.out; ++o)
      add_lane_votes(votes + o * output, load(scratch + o * lanes), s.dim, sums + o * output);
  }
}

// Calls f(Values<D_in>{}) for the usual numbers of values, f(Values<0>{}) for others.
template <class F>
NNARCH_INLINE void with_values(int64_t in, const F& f) {
  switch (in) {
    case 4:
      return f(Values<4>{});
    case 8:
      return f(Values<8>{});
    case 16:
      return f(Values<16>{});
    default:
      return f(Values<0>{});
  }
}

template <class T>
void lane_sums(const CapsuleShape& s, const LaneCapsules<T>& c, T* sums) {
  with_values(s.in, [&](auto values) NNARCH_INLINE_LAMBDA {
    lane_sums_of<T, decltype(values)::count>(s, c, sums);
  });
}

template <class T>
void lane_iteration(const CapsuleShape& s, const LaneCapsules<T>& c, const T* outputs, T* scratch,
                    T* sums) {
  with_values(s.in, [&](auto values) NNARCH_INLINE_LAMBDA {
    lane_iteration_of<T, decltype(values)::count>(s, c, outputs, scratch, sums);
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
