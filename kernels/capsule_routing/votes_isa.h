// Votes of one block of input capsules. For *_isa.cpp files.
#pragma once

#include "capsule_routing/cpu_kernels.h"
#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {

// Vectors of a block.
template <class T>
inline constexpr int kParts = static_cast<int>(kCapsuleBlock<T>) / kLanes<T>;

// Vectors of votes that are computed side by side. With 32 registers, the values of two samples, or
// of two parts of one, fit and stay; with 16, sums of 3 rows of 4 samples do instead.
#if defined(NNARCH_ISA_avx512)
inline constexpr int kVoteSamples = 2, kVoteParts = 2, kVoteRows = 1;
#else
inline constexpr int kVoteSamples = 4, kVoteParts = 1, kVoteRows = 3;
#endif

// Calls f(Count<n>{}, k) for runs of n input values that cover [0, in).
template <int N = 8, class F>
NNARCH_INLINE void over_values(int64_t in, const F& f) {
  int64_t k = 0;
  for (; k + N <= in; k += N) f(Count<N>{}, k);
  if (N > 4 && in & 4) f(Count<4>{}, k), k += 4;
  if (in & 2) f(Count<2>{}, k), k += 2;
  if (in & 1) f(Count<1>{}, k);
}

// Calls f(Count<n>{}, i) for runs of n <= N that cover [0, count): 3 but no 1 where that can be,
// else powers of two.
template <int N, class F>
NNARCH_INLINE void over_runs(int64_t count, const F& f) {
  int64_t i = 0;
  for (; count - i >= N && (N != 3 || count - i != 4); i += N) f(Count<N>{}, i);
  if constexpr (N > 2)
    for (; count - i >= 2; i += 2) f(Count<2>{}, i);
  if constexpr (N > 1)
    if (i < count) f(Count<1>{}, i);
}

// votes[d] = Σ_k weight[d][k] · x[k], added to what stands there unless these are the first values.
// The weight is read in the order of its memory, which the hardware fetches ahead on its own:
// fetched by instructions, 16 KB ahead or less, a single sample's 5.9 MB took 76 to 97 µs instead
// of 60.
template <class T, int N, int SAMPLES, int PARTS, bool sum>
NNARCH_INLINE void votes_of_values(const T* weight, int64_t weight_step, const T* const* x,
                                   int64_t dim, T* const* votes, T* const* sums, bool first) {
  constexpr int64_t block = kCapsuleBlock<T>, lanes = kLanes<T>;
  Vec<T> values[SAMPLES][PARTS][N];
  for (int s = 0; s < SAMPLES; ++s)
    for (int p = 0; p < PARTS; ++p)
      for (int k = 0; k < N; ++k) {
        values[s][p][k] = load(x[s] + k * block + p * lanes);
        keep_in_register(values[s][p][k]);
      }
  for (int64_t d = 0; d < dim; ++d) {
    const T* row = weight + d * weight_step;
    Vec<T> v[SAMPLES][PARTS];
    for (int s = 0; s < SAMPLES; ++s)
      for (int p = 0; p < PARTS; ++p)
        v[s][p] = first ? Vec<T>{} : load(votes[s] + d * block + p * lanes);
    for (int k = 0; k < N; ++k)
      for (int p = 0; p < PARTS; ++p) {
        const Vec<T> w = load(row + k * block + p * lanes);
        for (int s = 0; s < SAMPLES; ++s) v[s][p] += w * values[s][p][k];
      }
    for (int s = 0; s < SAMPLES; ++s) {
      for (int p = 0; p < PARTS; ++p) store(votes[s] + d * block + p * lanes, v[s][p]);
      if constexpr (sum) {
        T* total = sums[s] + d * lanes;
        Vec<T> part = load(total);
        for (int p = 0; p < PARTS; ++p) part += v[s][p];
        store(total, part);
      }
    }
  }
}

// The same for ROWS rows of some samples: their sums are in registers instead of the values.
template <class T, int N, int ROWS, int SAMPLES, bool sum>
NNARCH_INLINE void votes_of_rows(const T* weight, int64_t weight_step, const T* const* x,
                                 T* const* votes, T* const* sums, int64_t d, bool first) {
  constexpr int64_t block = kCapsuleBlock<T>, lanes = kLanes<T>;
  Vec<T> v[ROWS][SAMPLES]{};
  for (int r = 0; r < ROWS && !first; ++r)
    for (int s = 0; s < SAMPLES; ++s) v[r][s] = load(votes[s] + (d + r) * block);
#pragma GCC unroll 8
  for (int k = 0; k < N; ++k) {
    Vec<T> w[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      w[r] = load(weight + (d + r) * weight_step + k * block);
      keep_in_register(w[r]);
    }
    for (int s = 0; s < SAMPLES; ++s) {
      Vec<T> value = load(x[s] + k * block);
      keep_in_register(value);
      for (int r = 0; r < ROWS; ++r) v[r][s] += w[r] * value;
    }
  }
  for (int s = 0; s < SAMPLES; ++s)
    for (int r = 0; r < ROWS; ++r) {
      store(votes[s] + (d + r) * block, v[r][s]);
      if constexpr (sum) {
        T* const total = sums[s] + (d + r) * lanes;
        store(total, load(total) + v[r][s]);
      }
    }
}

template <class T, int SAMPLES, int PARTS>
NNARCH_INLINE void votes_of_samples(const CapsuleShape& s, const T* weight, const T* const* x,
                                    T* const* votes, T* const* sums) {
  constexpr int64_t block = kCapsuleBlock<T>;
  for (int part = 0; part < kParts<T>; part += PARTS) {
    const int64_t at = part * kLanes<T>;
    over_values(s.in, [&](auto values, int64_t k) NNARCH_INLINE_LAMBDA {
      const T* from[SAMPLES];
      T* to[SAMPLES];
      for (int i = 0; i < SAMPLES; ++i) {
        from[i] = x[i] + k * block + at;
        to[i] = votes[i] + at;
      }
      const T* w = weight + k * block + at;
      constexpr int n = decltype(values)::count;
      if constexpr (kVoteRows > 1 && SAMPLES > 1)
        return over_runs<kVoteRows>(s.dim, [&](auto rows, int64_t d) NNARCH_INLINE_LAMBDA {
          constexpr int r = decltype(rows)::count;
          if (sums && k + n == s.in)
            votes_of_rows<T, n, r, SAMPLES, true>(w, s.in * block, from, to, sums, d, k == 0);
          else
            votes_of_rows<T, n, r, SAMPLES, false>(w, s.in * block, from, to, sums, d, k == 0);
        });
      if (sums && k + n == s.in)
        votes_of_values<T, n, SAMPLES, PARTS, true>(w, s.in * block, from, s.dim, to, sums, k == 0);
      else
        votes_of_values<T, n, SAMPLES, PARTS, false>(w, s.in * block, from, s.dim, to, sums,
                                                     k == 0);
    });
  }
}

// One output capsule after the other: its part of the weight stays in the first cache for all
// samples.
template <class T>
void votes_of_block(const CapsuleShape& s, const T* weight, PerSample<const T> x, int64_t samples,
                    PerSample<T> votes, PerSample<T> sums) {
  constexpr int64_t block = kCapsuleBlock<T>;
  const int64_t capsule = s.dim * block;
  for (int64_t o = 0; o < s.out; ++o, weight += capsule * s.in) {
    int64_t i = 0;
    if constexpr (kVoteSamples > 1)
      for (; i + kVoteSamples <= samples; i += kVoteSamples) {
        const T* from[kVoteSamples];
        T *to[kVoteSamples], *total[kVoteSamples];
        for (int j = 0; j < kVoteSamples; ++j) {
          from[j] = x[i + j];
          to[j] = votes[i + j] + o * capsule;
          total[j] = sums.first ? sums[i + j] + o * s.dim * kLanes<T> : nullptr;
        }
        votes_of_samples<T, kVoteSamples, 1>(s, weight, from, to, sums.first ? total : nullptr);
      }
    for (; i < samples; ++i) {
      const T* from = x[i];
      T* to = votes[i] + o * capsule;
      T* total = sums.first ? sums[i] + o * s.dim * kLanes<T> : nullptr;
      votes_of_samples<T, 1, kVoteParts>(s, weight, &from, &to, sums.first ? &total : nullptr);
    }
  }
}

}  // namespace nnarch::NNARCH_ISA
