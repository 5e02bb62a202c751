// The register tile of the five matrix products of attention's backward. For *_isa.cpp files.
//
//   C(m, n) = or += Σ A(m, k)·B(k, n)     vectors along n, A broadcast
//
// A may be read along rows or along columns, so dS serves dq (as it lies) and dk (transposed)
// without a copy.
#pragma once

#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {

// Rows of a tile. More would fit AVX-512's registers (14), but 8 are as fast by themselves, divide
// blocks of 64 and 128, and follow the edge of a band more closely: 512 positions took 80.0 ms with
// tiles of 13 and 78.2 with 8, 128 causal ones 7.4 and 7.1.
#if defined(NNARCH_ISA_avx512)
inline constexpr int kProductRows = 8;  // 16 accumulators, 2 vectors of B, 1 broadcast
#else
inline constexpr int kProductRows = 6;
#endif

// What becomes of the sums.
enum class Finish {
  store,
  add,              // to what C holds
  scores_gradient,  // scale · weight · (sum - delta), C holding the weight
  dropped_scores_gradient,
};

// Lines on their way to L2, one a step of a product: what comes after this block and this head.
// (The products themselves run near the peak; with 128 positions a fifth of the time went to
// waiting for the first touch of everything.)
class Fetch {
 public:
  // `rows` rows of n bytes.
  NNARCH_INLINE void add(const char* at, int64_t row, int64_t rows, int64_t n) {
    if (row == n)
      at_once(at, 64, (rows * n + 63) / 64);
    else
      for (int64_t line = 0; line < n; line += 64) at_once(at + line, row, rows);
  }
  struct Lines {
    const char* at;
    int64_t step;
  };
  // The next lines, at most so many; `idle` where there are none.
  NNARCH_INLINE Lines next(int64_t steps, const void* idle) {
    if (done_ == count_) return {static_cast<const char*>(idle), 0};
    Part& part = parts_[done_];
    const Lines lines{part.at, part.step};
    part.at += steps * part.step, part.lines -= steps;
    if (part.lines <= 0 && ++done_ == count_) done_ = count_ = 0;
    return lines;
  }

 private:
  NNARCH_INLINE void at_once(const char* at, int64_t step, int64_t lines) {
    if (count_ < kParts && lines > 0) parts_[count_++] = {at, step, lines};
  }
  static constexpr int kParts = 64;
  struct Part {
    const char* at;
    int64_t step, lines;
  };
  Part parts_[kParts];
  int count_ = 0, done_ = 0;
};

template <class T>
struct Product {
  const T* a;
  int64_t a_row, a_step;  // between rows m, between steps k
  const T* b;
  int64_t b_step;  // between steps k
  T* c;
  int64_t c_row;
  Finish finish;
  const T* delta = nullptr;  // a row
  const T* kept = nullptr;   // weights after dropout, as C
  T scale = T(1);
};

// Up to 8 rows any step apart, from two pointers and two multiples of the step.
template <class T, int MR>
struct ProductRows {
  static_assert(MR <= 9);
  const char *p0, *p5;
  int64_t row, row3, step;

  NNARCH_INLINE ProductRows(const T* a, int64_t rows_apart, int64_t steps_apart)
      : p0(reinterpret_cast<const char*>(a)),
        row(rows_apart * int64_t{sizeof(T)}),
        row3(3 * row),
        step(steps_apart * int64_t{sizeof(T)}) {
    p5 = p0 + 5 * row;
  }
  template <int I>
  NNARCH_INLINE T value() const {
    const char* at = p0;
    if constexpr (I == 1 || I == 2 || I == 4 || I == 8) at = p0 + I * row;
    if constexpr (I == 3 || I == 6) at = p0 + I / 3 * row3;
    if constexpr (I == 5) at = p5;
    if constexpr (I == 7) at = p5 + 2 * row;
    return *reinterpret_cast<const T*>(at);
  }
  NNARCH_INLINE void next() {
    // The compiler may not make a running pointer of its own for every row.
    p0 += step;
    asm("" : "+r"(p0));
    if constexpr (MR > 5) {
      p5 += step;
      asm("" : "+r"(p5));
    }
  }
};

template <class T>
NNARCH_INLINE Vec<T> scores_gradient(const Product<T>& p, Vec<T> sum, const T* c, const T* kept,
                                     const T* delta) {
  const Vec<T> held = load(c);
  if (p.finish == Finish::scores_gradient) return (sum - *delta) * held * p.scale;
  return (sum * load(kept) - held * *delta) * p.scale;
}

// One row of a step, and what becomes of one row's sums.
template <class T, int... J>
NNARCH_INLINE void add_row(Indices<J...>, Vec<T> x, const Vec<T>* b, Vec<T>* sums) {
  ((sums[J] += x * b[J]), ...);
}
template <class T, int... J>
NNARCH_INLINE void load_row(Indices<J...>, const T* from, Vec<T>* to) {
  ((to[J] = load(from + J * kLanes<T>), keep_in_register(to[J])), ...);
}
template <class T, Finish How, int... J>
NNARCH_INLINE void put_sums(Indices<J...>, const Product<T>& p, const Vec<T>* sums, T* c,
                            const T* kept, const T* delta) {
  constexpr int w = kLanes<T>;
  if constexpr (How == Finish::store)
    (store(c + J * w, sums[J]), ...);
  else if constexpr (How == Finish::add)
    (store(c + J * w, load(c + J * w) + sums[J]), ...);
  else
    (store(c + J * w, scores_gradient<T>(p, sums[J], c + J * w, kept + J * w, delta)), ...);
}

// Rows I by vectors J. Every access to an accumulator has a constant index, or GCC would keep them
// in memory.
template <class T, class Vectors, int NV, int... I>
NNARCH_INLINE void product_tile(Vectors each, Indices<I...>, const Product<T>& p, int64_t m,
                                int64_t n, int64_t from, int64_t count, Fetch::Lines lines) {
  constexpr int mr = sizeof...(I);
  Vec<T> sums[mr * NV] = {};
  ProductRows<T, mr> rows(p.a + m * p.a_row + from * p.a_step, p.a_row, p.a_step);
  const T* b = p.b + n + from * p.b_step;
  const int64_t b_step = p.b_step;
#pragma GCC unroll 4
  for (int64_t k = 0; k < count; ++k) {
    __builtin_prefetch(lines.at, 0, 2);
    lines.at += lines.step;
    Vec<T> row[NV];
    load_row<T>(each, b, row);
    (add_row<T>(each, broadcast(rows.template value<I>()), row, sums + I * NV), ...);
    b += b_step;
    rows.next();
  }
  const int64_t c_row = p.c_row, at = m * c_row + n;
  T* c = p.c + at;
  if (p.finish == Finish::add) {
    (put_sums<T, Finish::add>(each, p, sums + I * NV, c + I * c_row, nullptr, nullptr), ...);
  } else if (p.finish == Finish::store) {
    (put_sums<T, Finish::store>(each, p, sums + I * NV, c + I * c_row, nullptr, nullptr), ...);
  } else {
    const T *kept = p.kept + at, *delta = p.delta + m;
    (put_sums<T, Finish::scores_gradient>(each, p, sums + I * NV, c + I * c_row, kept + I * c_row,
                                          delta + I),
     ...);
  }
}

template <class T, int NV, int MR>
NNARCH_NOINLINE void product_tile_of(const Product<T>& p, int64_t m, int64_t n, int64_t from,
                                     int64_t count, Fetch::Lines lines) {
  product_tile<T, MakeIndices<NV>, NV>(MakeIndices<NV>{}, MakeIndices<MR>{}, p, m, n, from, count,
                                       lines);
}

template <class T>
using ProductTile = void (*)(const Product<T>& p, int64_t m, int64_t n, int64_t from, int64_t count,
                             Fetch::Lines lines);
template <class T, int NV, int... I>
NNARCH_INLINE ProductTile<T> product_tile_of_rows(Indices<I...>, int64_t rows) {
  static constexpr ProductTile<T> tiles[] = {product_tile_of<T, NV, I + 1>...};
  return tiles[rows - 1];
}

struct Steps {
  int64_t first, end;
};

inline constexpr Steps kNoTile = {1, 0};

// All tiles of a product of `rows` by `columns` (whole vectors). reach(m0, m1, n0, n1) says which
// steps a tile needs, or kNoTile.
template <class T, class Reach>
NNARCH_INLINE void multiply_all(const Product<T>& p, int64_t rows, int64_t columns, Fetch& fetch,
                                const Reach& reach) {
  constexpr int w = kLanes<T>;
  constexpr auto heights = MakeIndices<kProductRows>{};
  const int64_t tiles = (rows + kProductRows - 1) / kProductRows;
  if (tiles == 0) return;
  // Of even height: 64 rows by 6 are 9 tiles of 6 and 2 of 5.
  const int64_t height = rows / tiles, higher = rows % tiles;
  for (int64_t n = 0; n < columns; n += 2 * w) {
    const int64_t vectors = columns - n < 2 * w ? 1 : 2;
    for (int64_t i = 0, m = 0; i < tiles; ++i) {
      const int64_t count = height + (i < higher);
      const Steps steps = reach(m, m + count, n, n + vectors * w);
      if (steps.first <= steps.end) {
        const auto tile = vectors == 1 ? product_tile_of_rows<T, 1>(heights, count)
                                       : product_tile_of_rows<T, 2>(heights, count);
        const int64_t depth = steps.end - steps.first;
        tile(p, m, n, steps.first, depth, fetch.next(depth, p.a));
      }
      m += count;
    }
  }
}

}  // namespace nnarch::NNARCH_ISA
