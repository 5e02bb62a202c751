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

// ⟨votes, a⟩ of one output capsule.
template <class T>
NNARCH_INLINE Row<T> dots(const T* votes, const T* a, int64_t dim) {
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
NNARCH_INLINE void two_dots(const T* votes, const T* a, const T* b, int64_t dim, Row<T>& by_a,
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

// exp(logits - their maximum) in place; returns one over their sum. A NaN or an infinity among an
// input capsule's logits makes all of them NaN, as in torch.
template <class T>
NNARCH_INLINE Row<T> exponentials(T* logits, int64_t out, Row<T> most) {
  Row<T> sum{};
  for (int64_t o = 0; o < out; ++o) {
    T* p = logits + o * kCapsuleBlock<T>;
    for (int n = 0; n < kParts<T>; ++n) {
      const Vec<T> e = exp<T>(load(p + n * kLanes<T>) - most.part[n]);
      store(p + n * kLanes<T>, e);
      sum.part[n] += e;
    }
  }
  for (int n = 0; n < kParts<T>; ++n) sum.part[n] = T(1) / sum.part[n];
  return sum;
}

template <class T>
NNARCH_INLINE void keep_larger(Row<T>& most, const Row<T>& row) {
  for (int n = 0; n < kParts<T>; ++n)
    most.part[n] = row.part[n] > most.part[n] ? row.part[n] : most.part[n];
}

template <class T>
NNARCH_INLINE Row<T> least() {
  Row<T> row;
  for (int n = 0; n < kParts<T>; ++n) row.part[n] = broadcast(-static_cast<T>(__builtin_inf()));
  return row;
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
    Row<T> most = least<T>();
    for (int64_t o = 0; o < s.out; ++o) {
      const Row<T> logit = dots(votes + o * capsule, outputs + o * s.dim, s.dim);
      keep_larger(most, logit);
      store_row(scratch + o * block, logit);
    }
    const Row<T> scale = exponentials(scratch, s.out, most);
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
    Row<T> most = least<T>();
    for (int64_t o = 0; o < s.out; ++o) {
      const Row<T> logit = dots(votes + o * capsule, outputs + o * s.dim, s.dim);
      keep_larger(most, logit);
      store_row(coefficients + o * block, logit);
    }
    const Row<T> scale = exponentials(coefficients, s.out, most);
    for (int64_t o = 0; o < s.out; ++o) {
      T* p = coefficients + o * block;
      store_row(p, product(load_row(p), scale));
    }
  }
}

template <class T>
void iteration_grad(const CapsuleShape& s, const T* votes, const T* outputs, const T* sum_grad,
                    int64_t c_term, int64_t terms, T* coefficients, T* scratch, T* sums) {
  constexpr int64_t block = kCapsuleBlock<T>;
  const int64_t capsule = s.dim * block, term = s.out * block;
  T* const dc = scratch + term;
  for (int64_t i = 0; i < s.blocks; ++i, votes += s.out * capsule, coefficients += terms * term) {
    Row<T> most = least<T>();
    for (int64_t o = 0; o < s.out; ++o) {
      Row<T> logit, through;
      two_dots(votes + o * capsule, outputs + o * s.dim, sum_grad + o * s.dim, s.dim, logit,
               through);
      keep_larger(most, logit);
      store_row(scratch + o * block, logit);
      store_row(dc + o * block, through);
    }
    const Row<T> scale = exponentials(scratch, s.out, most);
    Row<T> mean{};
    T* const c_out = coefficients + c_term * term;
    for (int64_t o = 0; o < s.out; ++o) {
      const Row<T> c = product(load_row(scratch + o * block), scale);
      const Row<T> through = load_row(dc + o * block);
      store_row(c_out + o * block, c);
      for (int n = 0; n < kParts<T>; ++n) mean.part[n] += c.part[n] * through.part[n];
    }
    for (int64_t o = 0; o < s.out; ++o) {
      Row<T> db = load_row(dc + o * block);
      const Row<T> c = load_row(c_out + o * block);
      for (int n = 0; n < kParts<T>; ++n) db.part[n] = c.part[n] * (db.part[n] - mean.part[n]);
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
