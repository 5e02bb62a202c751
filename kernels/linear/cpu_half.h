// linear in half types: blocks of x become float in cache, weights where they are packed, and
// blocks of the output are rounded there. No float copy of a tensor is made, but for rows of x that
// many columns share.
#pragma once

#include <algorithm>

#include "cpu/gather_gemm.h"
#include "cpu/half.h"
#include "cpu/pack_half.h"
#include "linear/cpu_rows.h"

namespace nnarch {

// Whether bfloat16 x and the weight are multiplied as they lie (cpu/pairs.h).
inline bool takes_pairs(ScalarType type) { return type == ScalarType::BFloat16 && pairs(); }

// Rows of x against columns of w; the residual and y are [m][n], dense.
struct HalfProduct {
  Stored x, residual, y;
  int64_t m, depth, x_stride, n;
  const Epilogue<float>& epilogue;  // less the residual

  // Calls f(c, epilogue, step): where outputs [row, row + rows) × [column, column + columns) go.
  template <class F>
  void block(int64_t row, int64_t rows, int64_t column, int64_t columns, const F& f) const {
    const StoredBlock place{row * n + column, columns, rows, n};
    const Reading<float> added(residual, place);
    const Writing<float> out(y, place);
    Epilogue<float> e = epilogue.from_channel(column);
    e.residual = added.get();
    f(out.get(), e, out.step());
  }
};

// A half-type weight one of whose dimensions is dense, and the product's view of it.
inline Tensor dense_weight(const Tensor& w) {
  return w.stride(0) == 1 || w.stride(1) == 1 ? w : as_contiguous(w);
}
inline HalfMatrix half_view(const Tensor& w) {
  return {Stored(w), 0, w.stride(0), w.stride(1), w.size(1)};
}

// Few rows: every weight is read once, in place.
inline void few_half_rows(const HalfProduct& p, const Tensor& w) {
  set_algorithm("gemv");
  constexpr int64_t run = 64;
  const Stored weights(w);
  const int64_t step = w.stride(0);
  if (takes_pairs(w.scalar_type())) {
    return parallel_tasks(ceil_div(p.n, run), [&](int64_t task) {
      const int64_t first = task * run, columns = std::min(run, p.n - first);
      p.block(0, p.m, first, columns, [&](float* y, const Epilogue<float>& e, int64_t y_step) {
        pairs()->few_rows(p.x.bits(), p.x_stride, p.m, weights.bits() + first * step, step, p.depth,
                          columns, y, y_step);
        for (int64_t r = 0; r < p.m; ++r) p.x.half->finish(e, r * y_step, columns, y + r * y_step);
      });
    });
  }
  const Reading<float> x(p.x, {0, p.depth, p.m, p.x_stride});
  parallel_tasks(ceil_div(p.n, run), [&](int64_t task) {
    const int64_t first = task * run, columns = std::min(run, p.n - first);
    p.block(0, p.m, first, columns, [&](float* y, const Epilogue<float>& e, int64_t y_step) {
      weights.half->few_rows(x.get(), x.step(), p.m, weights.bits() + first * step, step, p.depth,
                             columns, y, y_step, e);
    });
  });
}

// Rows in cache against packed columns.
inline void multiply_half_rows(const HalfProduct& p, const float* x, int64_t x_step, int64_t row,
                               int64_t rows, const float* packed, int64_t column, int64_t columns) {
  p.block(row, rows, column, columns, [&](float* y, const Epilogue<float>& e, int64_t y_step) {
    const Strip<float> strip{x, 0, rows};
    gemm<float>().run({.depth = p.depth,
                       .b = packed,
                       .c = y,
                       .n = columns,
                       .epilogue = e,
                       .strips = &strip,
                       .strip_count = 1,
                       .a_step = x_step,
                       .c_step = y_step});
  });
}

inline void packed_half_gemm(const HalfProduct& p, const float* packed) {
  set_algorithm("gemm_packed");
  const GridImage<float> image{nullptr, 1, p.m, p.depth, 1, 1, p.m, 0, 1, {{0, 0}}, p.depth};
  const Blocking block = choose_blocking<float>(image, p.n);
  const int64_t column_blocks = ceil_div(p.n, block.columns);
  parallel_tasks(ceil_div(p.m, block.rows) * column_blocks, [&](int64_t task) {
    const int64_t row = task / column_blocks * block.rows;
    const int64_t column = task % column_blocks * block.columns;
    const int64_t rows = std::min(block.rows, p.m - row);
    const Reading<float> x(p.x, {row * p.x_stride, p.depth, rows, p.x_stride});
    multiply_half_rows(p, x.get(), x.step(), row, rows, packed + column * p.depth, column,
                       std::min(block.columns, p.n - column));
  });
}

// Unpacked weights: each task packs a few panels into cache and takes many rows past them.
inline void pack_and_multiply_half(const HalfProduct& p, const Tensor& w) {
  set_algorithm("gemm");
  const HalfMatrix view = half_view(w);
  constexpr int64_t cache = int64_t{192} << 10, shared = int64_t{4} << 20;
  constexpr int64_t float_bytes = sizeof(float),
                    block = 192;  // rows: their outputs stay in L2
  const int64_t nr = gemm<float>().nr, row_bytes = std::max<int64_t>(1, p.depth * float_bytes);
  const int64_t columns = nr * std::clamp<int64_t>(cache / (row_bytes * nr), 1, 8);
  const int64_t most = std::max<int64_t>(64, shared / row_bytes);
  const int64_t together = ceil_div(p.m, ceil_div(p.m, most));
  for (int64_t from = 0; from < p.m; from += together) {
    const int64_t rows = std::min(together, p.m - from);
    const Scratch<float> x(rows * p.depth);
    parallel_tasks(ceil_div(rows, 16), [&](int64_t task) {
      for (int64_t r = task * 16; r < std::min(rows, task * 16 + 16); ++r)
        p.x.half->widen(p.x.bits() + (from + r) * p.x_stride, x.get() + r * p.depth, p.depth);
    });
    parallel_tasks(ceil_div(p.n, columns), [&](int64_t task) {
      const int64_t first = task * columns, n = std::min(columns, p.n - first);
      const Scratch<float> packed(packed_size<float>(n, 1, p.depth));
      pack_half_columns(view, first, n, packed.get());
      for (int64_t r = 0; r < rows; r += block)
        multiply_half_rows(p, x.get() + r * p.depth, p.depth, from + r, std::min(block, rows - r),
                           packed.get(), first, n);
    });
  }
}

// ---------------------------------------------------------------------------------- bfloat16 pairs

// Rows [row, row + rows) of the product, which x holds.
inline void multiply_pairs(const HalfProduct& p, const uint16_t* x, int64_t x_step, int64_t row,
                           int64_t rows, const uint16_t* packed, int64_t column, int64_t columns) {
  if (p.y.half && !p.residual.memory && p.epilogue.activation <= kRelu6)
    return pairs()->run({.a = x,
                         .a_step = x_step,
                         .b = packed,
                         .depth = p.depth,
                         .m = rows,
                         .n = columns,
                         .c = nullptr,
                         .c_step = 0,
                         .y = p.y.bits() + row * p.n + column,
                         .y_step = p.n,
                         .epilogue = p.epilogue.from_channel(column)});
  p.block(row, rows, column, columns, [&](float* y, const Epilogue<float>& e, int64_t step) {
    pairs()->run({.a = x,
                  .a_step = x_step,
                  .b = packed,
                  .depth = p.depth,
                  .m = rows,
                  .n = columns,
                  .c = y,
                  .c_step = step});
    for (int64_t r = 0; r < rows; ++r) p.x.half->finish(e, r * step, columns, y + r * step);
  });
}

// Rows of x, and of their sums for 256 columns, that stay in L2.
inline int64_t rows_of_pairs(int64_t depth) {
  constexpr int64_t cache = int64_t{256} << 10, register_rows = 14;
  return round_up(std::clamp<int64_t>(cache / std::max<int64_t>(1, 2 * depth), 48, 196),
                  register_rows);
}

inline void packed_pairs(const HalfProduct& p, const uint16_t* packed) {
  set_algorithm("bfloat16_pairs_packed");
  constexpr int64_t most_columns = 256;
  const int64_t rows = rows_of_pairs(p.depth);
  const int64_t columns = round_up(ceil_div(p.n, ceil_div(p.n, most_columns)), pairs()->nr);
  const int64_t column_blocks = ceil_div(p.n, columns);
  parallel_tasks(ceil_div(p.m, rows) * column_blocks, [&](int64_t task) {
    const int64_t row = task / column_blocks * rows, column = task % column_blocks * columns;
    const int64_t count = std::min(rows, p.m - row);
    const PairRowsApart x(p.x, row * p.x_stride, count, p.x_stride, p.depth);
    multiply_pairs(p, x.get(), x.step(), row, count, packed + column * round_up(p.depth, 2), column,
                   std::min(columns, p.n - column));
  });
}

inline void pack_and_multiply_pairs(const HalfProduct& p, const Tensor& w) {
  set_algorithm("bfloat16_pairs");
  constexpr int64_t cache = int64_t{192} << 10;
  const HalfMatrix view = half_view(w);
  const int64_t nr = pairs()->nr, rows = rows_of_pairs(p.depth);
  const int64_t panel_bytes = std::max<int64_t>(1, p.depth * nr * 2);
  const int64_t columns = nr * std::clamp<int64_t>(cache / panel_bytes, 1, 8);
  parallel_tasks(ceil_div(p.n, columns), [&](int64_t task) {
    const int64_t first = task * columns, n = std::min(columns, p.n - first);
    const Scratch<uint16_t> packed(pairs_packed_size(n, p.depth));
    pack_pairs(view, first, n, packed.get());
    for (int64_t r = 0; r < p.m; r += rows) {
      const int64_t count = std::min(rows, p.m - r);
      const PairRowsApart x(p.x, r * p.x_stride, count, p.x_stride, p.depth);
      multiply_pairs(p, x.get(), x.step(), r, count, packed.get(), first, n);
    }
  });
}

}  // namespace nnarch
