// A matrix packed for the product of cpu/gemm.h, in pieces of its depth: the gradient of a gate
// meets a weight over gates·H values, and one chain of so many additions would cost accuracy.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/arena.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"

namespace nnarch {

template <class T>
class DeepPanels {
 public:
  static constexpr int64_t most_depth = 512;

  // `once`: the matrix meets one block of rows only. Then every panel is packed into cache right
  // before its product, and no copy in memory is made.
  DeepPanels(int64_t depth, int64_t columns, bool once)
      : depth_(depth),
        columns_(columns),
        wide_(round_up(columns, gemm<T>().nr)),
        pieces_(std::max<int64_t>(1, ceil_div(depth, most_depth))),
        once_(once),
        memory_(once ? 0 : checked_product(depth, wide_)) {}

  // Row k of the matrix is rows[k], dense.
  void set(const std::vector<const T*>& rows) {
    rows_ = rows;
    if (once_) return;
    const int64_t nr = gemm<T>().nr, panels = wide_ / nr;
    parallel_tasks(pieces_ * panels, [&](int64_t task) {
      pack(task / panels, task % panels * nr,
           panel(memory_.get(), wide_, task / panels, task % panels * nr));
    });
  }

  // c[r][j] = Σ_k a[r][k] · matrix[k][j] for `rows` rows and n columns from `first` on, which
  // begins a panel.
  void multiply(const T* a, int64_t a_step, int64_t rows, int64_t first, int64_t n, T* c,
                int64_t c_step) const {
    if (!once_) return product(memory_.get(), wide_, first, n, a, a_step, rows, c + first, c_step);
    const int64_t nr = gemm<T>().nr;
    Scratch<T> packed(depth_ * nr);
    for (int64_t j = first; j < first + n; j += nr) {
      for (int64_t piece = 0; piece < pieces_; ++piece)
        pack(piece, j, panel(packed.get(), nr, piece, 0));
      product(packed.get(), nr, 0, std::min(nr, first + n - j), a, a_step, rows, c + j, c_step);
    }
  }

  int64_t depth() const { return depth_; }
  int64_t columns() const { return columns_; }

 private:
  int64_t from(int64_t piece) const { return depth_ * piece / pieces_; }
  int64_t count(int64_t piece) const { return from(piece + 1) - from(piece); }
  // In a packed matrix of `wide` columns.
  T* panel(T* memory, int64_t wide, int64_t piece, int64_t column) const {
    return memory + from(piece) * wide + column * count(piece);
  }
  void pack(int64_t piece, int64_t column, T* to) const {
    gemm<T>().pack_rows(rows_.data() + from(piece), column, count(piece),
                        std::min(gemm<T>().nr, columns_ - column), to);
  }

  void product(T* memory, int64_t wide, int64_t first, int64_t n, const T* a, int64_t a_step,
               int64_t rows, T* c, int64_t c_step) const {
    for (int64_t piece = 0; piece < pieces_; ++piece) {
      const Strip<T> strip{a + from(piece), 0, rows};
      const bool last = piece + 1 == pieces_;
      gemm<T>().run({.depth = count(piece),
                     .b = panel(memory, wide, piece, first),
                     .b_after = last ? nullptr : panel(memory, wide, piece + 1, first),
                     .c = c,
                     .n = n,
                     .accumulate = piece > 0,
                     .strips = &strip,
                     .strip_count = 1,
                     .a_step = a_step,
                     .c_step = c_step});
    }
  }

  int64_t depth_, columns_, wide_, pieces_;
  bool once_;
  std::vector<const T*> rows_;
  Scratch<T> memory_;
};

}  // namespace nnarch
