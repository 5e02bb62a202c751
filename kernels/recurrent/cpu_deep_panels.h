// A matrix packed for the product of cpu/gemm.h, in pieces of its depth: the gradient of a gate
// meets a weight over gates·H values, and one chain of so many additions would cost accuracy.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/arena.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"

namespace nnarch {

template <class T>
class DeepPanels {
 public:
  static constexpr int64_t most_depth = 512;

  DeepPanels(int64_t depth, int64_t columns)
      : depth_(depth),
        columns_(columns),
        pieces_(std::max<int64_t>(1, ceil_div(depth, most_depth))),
        memory_(checked_product(depth, round_up(columns, gemm<T>().nr))) {}

  // Row k of the matrix is rows[k], dense.
  void pack(const T* const* rows) {
    const int64_t nr = gemm<T>().nr, panels = ceil_div(columns_, nr);
    parallel_tasks(pieces_ * panels, [&](int64_t task) {
      const int64_t piece = task / panels, j = task % panels * nr;
      gemm<T>().pack_rows(rows + from(piece), j, count(piece), std::min(nr, columns_ - j),
                          panel(piece, j));
    });
  }

  // c[r][j] = Σ_k a[r][k] · matrix[k][j] for `rows` rows and the columns from first on, of which
  // `first` begins a panel.
  void multiply(const T* a, int64_t a_step, int64_t rows, int64_t first, int64_t n, T* c,
                int64_t c_step) const {
    for (int64_t piece = 0; piece < pieces_; ++piece) {
      const Strip<T> strip{a + from(piece), 0, rows};
      const bool last = piece + 1 == pieces_;
      gemm<T>().run({.depth = count(piece),
                     .b = panel(piece, first),
                     .b_after = last ? nullptr : panel(piece + 1, first),
                     .c = c + first,
                     .n = n,
                     .accumulate = piece > 0,
                     .strips = &strip,
                     .strip_count = 1,
                     .a_step = a_step,
                     .c_step = c_step});
    }
  }

  int64_t depth() const { return depth_; }
  int64_t columns() const { return columns_; }

 private:
  int64_t from(int64_t piece) const { return depth_ * piece / pieces_; }
  int64_t count(int64_t piece) const { return from(piece + 1) - from(piece); }
  T* panel(int64_t piece, int64_t column) const {
    return memory_.get() + from(piece) * round_up(columns_, gemm<T>().nr) + column * count(piece);
  }

  int64_t depth_, columns_, pieces_;
  Scratch<T> memory_;
};

}  // namespace nnarch
