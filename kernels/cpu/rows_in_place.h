// Rows against weights whose columns are dense, multiplied where these lie (cpu/unpacked.h): dx of
// a few rows, which would take as long to pack all of the weight as to multiply with it.
#pragma once

#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/machine.h"
#include "cpu/parallel.h"
#include "cpu/rows_product.h"
#include "cpu/unpacked.h"

namespace nnarch {

// Every part of the sum adds to y, in cache: with more rows, or wide ones, packing costs less.
inline bool serves_in_place(int64_t m, int64_t n, int64_t depth) {
  return m <= 96 || (m <= 192 && n <= 1024 && n <= depth);
}

// y[i][j] = Σ_k x[i][k] · w[k][j], for a range of columns.
template <class T>
class ColumnsInPlace {
 public:
  explicit ColumnsInPlace(const RowsProduct<T>& p)
      : block_{.a = p.x,
               .a_step = p.x_step,
               .b_step = p.weight.depth_stride,
               .c_step = p.y_step,
               .m = p.m},
        w_(p.weights()),
        y_(p.y),
        depth_(p.depth()),
        parts_(std::max<int64_t>(1, ceil_div(depth_, kUnpackedDepth))) {}

  // A part's rows of w, so many columns of them, and those of the next part stay in L2.
  void run(int64_t first, int64_t last) const {
    constexpr int64_t unit = 64, row_bytes = kUnpackedDepth * int64_t{sizeof(T)};
    const int64_t widest = std::max<int64_t>(256, l2_bytes() / 4 / row_bytes / unit * unit);
    const int64_t blocks = ceil_div(last - first, widest);
    const int64_t width = round_up(ceil_div(last - first, blocks), unit);
    for (int64_t j = first; j < last; j += width) add_parts(j, std::min(width, last - j));
  }

 private:
  static constexpr int64_t kLine = 64 / int64_t{sizeof(T)};

  int64_t start_of(int64_t part) const { return depth_ * part / parts_; }

  void add_parts(int64_t column, int64_t columns) const {
    const bool copies = shares_a_set<T>(block_.a_step);
    constexpr int64_t room_step = kUnpackedDepth + kLine;
    const Scratch<T> room(copies ? block_.m * room_step : 0);
    fetch(column, columns);
    for (int64_t part = 0; part < parts_; ++part) {
      const int64_t from = start_of(part), to = start_of(part + 1);
      UnpackedBlock<T> g = block_;
      g.a += from, g.b = w_ + from * g.b_step + column, g.c = y_ + column;
      g.n = columns, g.depth = to - from, g.accumulate = part > 0;
      if (copies) {
        for (int64_t i = 0; i < g.m; ++i)
          std::copy_n(g.a + i * g.a_step, g.depth, room.get() + i * room_step);
        g.a = room.get(), g.a_step = room_step;
      }
      if (part + 1 < parts_)
        g.after = g.b + g.depth * g.b_step, g.after_rows = start_of(part + 2) - to;
      product_(g);
    }
  }

  // The first part's rows of w, one after the other, as prefetchers like them.
  void fetch(int64_t column, int64_t columns) const {
    for (int64_t k = 0; k < start_of(1); ++k)
      for (int64_t j = 0; j < columns; j += kLine)
        __builtin_prefetch(w_ + k * block_.b_step + column + j, 0, 2);
  }

  const UnpackedProduct<T> product_ = NNARCH_SELECT(unpacked_product<T>());
  UnpackedBlock<T> block_;
  const T* w_;
  T* y_;
  int64_t depth_, parts_;
};

// Threads share the columns in ranges of any width: an output's sum is cut by its depth only.
template <class T>
void multiply_in_place(const RowsProduct<T>& p) {
  constexpr int64_t unit = 64;
  const ColumnsInPlace<T> columns(p);
  parallel_ranges(ceil_div(p.columns(), unit), [&](int64_t begin, int64_t end) {
    columns.run(begin * unit, std::min(end * unit, p.columns()));
  });
}

}  // namespace nnarch
