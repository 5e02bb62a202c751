// Iterations of the routing over stored votes, forward and backward. For *_isa.cpp files.
//
// Logits are never stored: they are ⟨votes, sum of the outputs so far⟩. A block of votes comes from
// the second or third cache for the dot products and is still in the first for the sums.
#pragma once

#include "capsule_routing/votes_isa.h"
#include "cpu/math.h"

namespace nnarch::NNARCH_ISA {

// One vector of each part of a block.
template <class T>
struct Row {
  Vec<T> part[kParts<T>];
};

template <class T>
NNARCH_INLINE Row<T> load_row(const T* p) {
  Row<T> row;
  for (int n = 0; n < kParts<T>; ++n) row.part[n] = load(p + n * kLanes<T>);
  return row;
}

template <class T>
NNARCH_INLINE void store_row(T* p, const Row<T>& row) {
  for (int n = 0; n < kParts<T>; ++n) store(p + n * kLanes<T>, row.part[n]);
}

// Terms of a dot product that are added up in one chain. In one of 64 the gradients of five
// iterations, which amplify what is lost, had 1.4 times the error of torch's formulation.
constexpr int64_t kDotChain = 16;

// ⟨votes, a⟩ of one output capsule, of which `dim` is at most a chain.
template <class T>
NNARCH_INLINE Row<T> short_dots(const T* votes, const T* a, int64_t dim) {
  Row<T> sum{};
#pragma GCC unroll 4
  for (int64_t d = 0; d < dim; ++d, votes += kCapsuleBlock<T>) {
    const Vec<T> factor = broadcast(a[d]);
    for (int n = 0; n < kParts<T>; ++n) sum.part[n] += load(votes + n * kLanes<T>) * factor;
  }
  return sum;
}

// Two of them in one pass.
template <class T>
NNARCH_INLINE void two_short_dots(const T* votes, const T* a, const T* b, int64_t dim, Row<T>& by_a,
                                  Row<T>& by_b) {
  by_a = Row<T>{}, by_b = Row<T>{};
#pragma GCC unroll 4
  for (int64_t d = 0; d < dim; ++d, votes += kCapsuleBlock<T>) {
    const Vec<T> first = broadcast(a[d]), second = broadcast(b[d]);
    for (int n = 0; n < kParts<T>; ++n) {
      const Vec<T> v = load(votes + n * kLanes<T>);
      by_a.part[n] += v * first;
      by_b.part[n] += v * second;
    }
  }
}

template <class T>
NNARCH_INLINE void add_row(Row<T>& sum, const Row<T>& row) {
  for (int n = 0; n < kParts<T>; ++n) sum.part[n] += row.part[n];
}

// The same in chains. What is left over comes first.
template <class T>
NNARCH_NOINLINE void long_dots(const T* votes, const T* a, int64_t dim, Row<T>& sum) {
  int64_t d = (dim - 1) % kDotChain + 1;
  sum = short_dots(votes, a, d);
  for (; d < dim; d += kDotChain)
    add_row(sum, short_dots(votes + d * kCapsuleBlock<T>, a + d, kDotChain));
}
template <class T>
NNARCH_NOINLINE void two_long_dots(const T* votes, const T* a, const T* b, int64_t dim,
                                   Row<T>& by_a, Row<T>& by_b) {
  int64_t d = (dim - 1) % kDotChain + 1;
  two_short_dots(votes, a, b, d, by_a, by_b);
  for (Row<T> more_a, more_b; d < dim; d += kDotChain) {
    two_short_dots(votes + d * kCapsuleBlock<T>, a + d, b + d, kDotChain, more_a, more_b);
    add_row(by_a, more_a), add_row(by_b, more_b);
  }
}

template <class T>
NNARCH_INLINE Row<T> dots(const T* votes, const T* a, int64_t dim) {
  if (dim <= kDotChain) return short_dots(votes, a, dim);
  Row<T> sum;
  long_dots(votes, a, dim, sum);
  return sum;
}
template <class T>
NNARCH_INLINE void two_dots(const T* votes, const T* a, const T* b, int64_t dim, Row<T>& by_a,
                            Row<T>& by_b) {
  if (dim <= kDotChain) return two_short_dots(votes, a, b, dim, by_a, by_b);
  two_long_dots(votes, a, b, dim, by_a, by_b);
}

// sums[d][lanes] += Σ over parts of c·votes[d]
template <class T>
NNARCH_INLINE void add_weighted(const T* votes, const Row<T>& c, int64_t dim, T* sums) {
#pragma GCC unroll 4
  for (int64_t d = 0; d < dim; ++d, votes += kCapsuleBlock<T>, sums += kLanes<T>) {
    Vec<T> sum = load(sums);
    for (int n = 0; n < kParts<T>; ++n) sum += load(votes + n * kLanes<T>) * c.part[n];
    store(sums, sum);
  }
}

// exp(logit) to `to` and into `sum`.
template <class T>
NNARCH_INLINE Row<T> exponential(const Row<T>& logit, T* to, Row<T>& sum) {
  Row<T> e;
  for (int n = 0; n < kParts<T>; ++n) {
    e.part[n] = exp<T>(logit.part[n]);
    store(to + n * kLanes<T>, e.part[n]);
    sum.part[n] += e.part[n];
  }
  return e;
}

// One over the sums of a softmax's exponentials, from which no maximum was taken: logits are
// products with vectors of lengths below 2 and seldom need it. A pass for it between the dot
// products, which wait for votes, and the exponentials, which then have nothing to wait for, took
// 1.7 of an iteration's 15.4 µs. False where a sum leaves the range in which nothing is lost.
template <class T>
NNARCH_INLINE bool softmax_scale(const Row<T>& sum, Row<T>& scale) {
  Vec<T> range{};
  for (int n = 0; n < kParts<T>; ++n) {
    scale.part[n] = T(1) / sum.part[n];
    range += sum.part[n] + scale.part[n];
  }
  return horizontal_sum<T>(range) < T(1e18);
}

// That softmax of one block again, from logits without their maximum. A NaN or an infinity among an
// input capsule's logits makes all of them NaN, as in torch.
template <class T>
NNARCH_NOINLINE void careful_softmax(const CapsuleShape& s, const T* votes, const T* outputs,
                                     T* exponentials, Row<T>& scale) {
  constexpr int64_t block = kCapsuleBlock<T>;
  Row<T> most, sum{};
  for (int n = 0; n < kParts<T>; ++n) most.part[n] = broadcast(-static_cast<T>(__builtin_inf()));
  for (int64_t o = 0; o < s.out; ++o) {
    const Row<T> logit = dots(votes + o * s.dim * block, outputs + o * s.dim, s.dim);
    for (int n = 0; n < kParts<T>; ++n)
      most.part[n] = logit.part[n] > most.part[n] ? logit.part[n] : most.part[n];
    store_row(exponentials + o * block, logit);
  }
  for (int64_t o = 0; o < s.out; ++o) {
    Row<T> logit = load_row(exponentials + o * block);
    for (int n = 0; n < kParts<T>; ++n) logit.part[n] -= most.part[n];
    exponential(logit, exponentials + o * block, sum);
  }
  softmax_scale(sum, scale);
}

// The softmax of one block's logits without its denominator, and one over that.
template <class T>
NNARCH_INLINE Row<T> softmax_parts(const CapsuleShape& s, const T* votes, const T* outputs,
                                   T* exponentials) {
  constexpr int64_t block = kCapsuleBlock<T>;
  Row<T> sum{}, scale;
  for (int64_t o = 0; o < s.out; ++o)
    exponential(dots(votes + o * s.dim * block, outputs + o * s.dim, s.dim),
                exponentials + o * block, sum);
  if (!softmax_scale(sum, scale)) [[unlikely]]
    careful_softmax(s, votes, outputs, exponentials, scale);
  return scale;
}

template <class T>
NNARCH_INLINE Row<T> product(const Row<T>& a, const Row<T>& b) {
  Row<T> row;
  for (int n = 0; n < kParts<T>; ++n) row.part[n] = a.part[n] * b.part[n];
  return row;
}

template <class T>
void iteration(const CapsuleShape& s, const T* votes, const T* outputs, T* scratch, T* sums) {
  constexpr int64_t block = kCapsuleBlock<T>;
  const int64_t capsule = s.dim * block;
  for (int64_t i = 0; i < s.blocks; ++i, votes += s.out * capsule) {
    const Row<T> scale = softmax_parts(s, votes, outputs, scratch);
    for (int64_t o = 0; o < s.out; ++o) {
      const Row<T> c = product(load_row(scratch + o * block), scale);
      add_weighted(votes + o * capsule, c, s.dim, sums + o * s.dim * kLanes<T>);
    }
  }
}

template <class T>
void softmax(const CapsuleShape& s, const T* votes, const T* outputs, T* coefficients) {
  constexpr int64_t block = kCapsuleBlock<T>;
  const int64_t capsule = s.dim * block;
  for (int64_t i = 0; i < s.blocks; ++i, votes += s.out * capsule, coefficients += s.out * block) {
    const Row<T> scale = softmax_parts(s, votes, outputs, coefficients);
    for (int64_t o = 0; o < s.out; ++o) {
      T* p = coefficients + o * block;
      store_row(p, product(load_row(p), scale));
    }
  }
}

// Σ over output capsules of a·b
template <class T>
NNARCH_NOINLINE void dot_rows(const T* a, const T* b, int64_t out, Row<T>& sum) {
  sum = Row<T>{};
  for (int64_t o = 0; o < out; ++o) {
    const Row<T> both =
        product(load_row(a + o * kCapsuleBlock<T>), load_row(b + o * kCapsuleBlock<T>));
    add_row(sum, both);
  }
}

template <class T>
void iteration_grad(const CapsuleShape& s, const T* votes, const T* outputs, const T* sum_grad,
                    int64_t c_term, int64_t terms, T* coefficients, T* scratch, T* sums) {
  constexpr int64_t block = kCapsuleBlock<T>;
  const int64_t capsule = s.dim * block, term = s.out * block;
  for (int64_t i = 0; i < s.blocks; ++i, votes += s.out * capsule, coefficients += terms * term) {
    T* const c_out = coefficients + c_term * term;
    Row<T> sum{}, mean{}, scale;
    for (int64_t o = 0; o < s.out; ++o) {
      Row<T> logit, dc;
      two_dots(votes + o * capsule, outputs + o * s.dim, sum_grad + o * s.dim, s.dim, logit, dc);
      const Row<T> e = exponential(logit, c_out + o * block, sum);
      for (int n = 0; n < kParts<T>; ++n) mean.part[n] += e.part[n] * dc.part[n];
      store_row(scratch + o * block, dc);
    }
    if (!softmax_scale(sum, scale)) [[unlikely]] {
      careful_softmax(s, votes, outputs, c_out, scale);
      dot_rows(c_out, scratch, s.out, mean);
    }
    mean = product(mean, scale);
    for (int64_t o = 0; o < s.out; ++o) {
      const Row<T> c = product(load_row(c_out + o * block), scale);
      Row<T> db = load_row(scratch + o * block);
      for (int n = 0; n < kParts<T>; ++n) db.part[n] = c.part[n] * (db.part[n] - mean.part[n]);
      store_row(c_out + o * block, c);
      store_row(c_out + term + o * block, db);
      add_weighted(votes + o * capsule, db, s.dim, sums + o * s.dim * kLanes<T>);
    }
  }
}

// One over the count of vectors that a horizontal sum waits for: small next to the loops above.
template <class T>
void total(const T* sums, int64_t count, T scale, T* totals) {
  for (int64_t i = 0; i < count; ++i)
    totals[i] = horizontal_sum<T>(load(sums + i * kLanes<T>)) * scale;
}

}  // namespace nnarch::NNARCH_ISA
