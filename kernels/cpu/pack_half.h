// Half-type weights packed for the matrix product (cpu/pack_weight.h).
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/gemm.h"
#include "cpu/half.h"
#include "cpu/layout.h"
#include "cpu/pairs.h"

namespace nnarch {

// A matrix w[column][depth] of a half type: element `first`, and the steps of both, one of them 1.
struct HalfMatrix {
  Stored w;
  int64_t first, column_step, depth_step, depth;
};

// Panels of `n` columns from `column` on: a little of their depth at a time becomes float in cache.
inline void pack_half_columns(const HalfMatrix& m, int64_t column, int64_t n, float* packed) {
  constexpr int64_t some = 256;
  const GemmTable<float>& table = gemm<float>();
  for (int64_t j = 0; j < n; j += table.nr)
    for (int64_t k = 0; k < m.depth; k += some) {
      const int64_t columns = std::min(table.nr, n - j), part = std::min(some, m.depth - k);
      float* const to = packed + j * m.depth + k * table.nr;
      const int64_t at = m.first + (column + j) * m.column_step + k * m.depth_step;
      if (m.depth_step == 1) {
        const Reading<float> rows(m.w, {at, part, columns, m.column_step});
        table.pack_panel(rows.get(), 1, rows.step(), part, columns, to);
      } else {
        const Reading<float> rows(m.w, {at, columns, part, m.depth_step});
        table.pack_panel(rows.get(), rows.step(), 1, part, columns, to);
      }
    }
}

// The same for products of pairs (cpu/pairs.h).
inline int64_t pairs_packed_size(int64_t columns, int64_t depth) {
  return checked_product(round_up(columns, pairs()->nr), round_up(depth, 2));
}

inline void pack_pairs(const HalfMatrix& m, int64_t column, int64_t n, uint16_t* packed) {
  const int64_t nr = pairs()->nr, panel = round_up(m.depth, 2) * nr;
  for (int64_t j = 0; j < n; j += nr, packed += panel) {
    const int64_t columns = std::min(nr, n - j), rows = m.depth / 2;
    const uint16_t* from = m.w.bits() + m.first + (column + j) * m.column_step;
    if (columns < nr || m.depth % 2) std::fill_n(packed, panel, uint16_t{0});
    int64_t k = 0;
    // A pair lies together in the weight, as long as a float: a matrix of these is transposed.
    if (m.depth_step == 1 && m.column_step % 2 == 0 && reinterpret_cast<uintptr_t>(from) % 4 == 0) {
      transpose_fn<float>()(reinterpret_cast<const float*>(from), m.column_step / 2,
                            reinterpret_cast<float*>(packed), nr, columns, rows);
      k = 2 * rows;
    }
    for (; k < m.depth; ++k)
      for (int64_t i = 0; i < columns; ++i)
        packed[(k / 2 * nr + i) * 2 + k % 2] = from[i * m.column_step + k * m.depth_step];
  }
}

// Rows of bfloat16 that a product of pairs reads: where they lie, or, where their distance is a
// multiple of 4 KB and they would evict each other from L1, in a copy.
class PairRowsApart {
 public:
  PairRowsApart(const Stored& t, int64_t first, int64_t rows, int64_t step, int64_t depth)
      : clash_(rows > 8 && step * 2 % 4096 == 0),
        step_(clash_ ? round_up(depth, 32) + 32 : step),
        copy_(clash_ ? rows * step_ : 0),
        rows_(clash_ ? copy_.get() : t.bits() + first) {
    for (int64_t r = 0; clash_ && r < rows; ++r)
      std::memcpy(copy_.get() + r * step_, t.bits() + first + r * step, depth * sizeof(uint16_t));
  }
  const uint16_t* get() const { return rows_; }
  int64_t step() const { return step_; }

 private:
  bool clash_;
  int64_t step_;
  Scratch<uint16_t> copy_;
  const uint16_t* rows_;
};

}  // namespace nnarch
