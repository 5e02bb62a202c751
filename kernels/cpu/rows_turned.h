// Some rows of x against unpacked weights: the product is turned over, y' = w·x', so that weights
// are multiplied where they lie and only x is packed.
#pragma once

#include <algorithm>

#include "cpu/combine.h"
#include "cpu/gemm.h"
#include "cpu/layout.h"
#include "cpu/pack_weight.h"
#include "cpu/parallel.h"
#include "cpu/rows_product.h"

namespace nnarch {

// A task's rows of the weight, in whole register tiles: their products stay in cache until they are
// turned back, and are worth a task.
inline int64_t turned_rows(int64_t n, int64_t mr, int64_t products_a_row) {
  constexpr int64_t most_tiles = 8, wanted_tasks = 8, least_products = int64_t{1} << 20;
  const int64_t least = ceil_div(least_products, products_a_row * mr);
  return mr * std::clamp<int64_t>(ceil_div(n, mr * wanted_tasks), std::min(least, most_tiles),
                                  most_tiles);
}

// Rows of x are columns of y' here, and fill vectors: where all lanes but one or two of the last
// are empty, packing the weight costs less.
template <class T>
bool serves_turned(int64_t m) {
  const int64_t lanes = gemm<T>().nr / 2, empty = round_up(m, lanes) - m;
  return m <= kTurnedRows && (m <= 2 * lanes || empty * 8 < lanes * 7);
}

template <class T>
void multiply_turned(const RowsProduct<T>& p) {
  const GemmTable<T>& table = gemm<T>();
  const TurnBack<T> turn_back = NNARCH_SELECT(turn_back_fn<T>());
  const int64_t n = p.columns(), depth = p.depth(), w_step = p.weight.column_stride;
  const int64_t step = round_up(p.m, table.nr), block = turned_rows(n, table.mr, depth * step);
  const Scratch<T> packed(packed_size<T>(p.m, 1, depth));
  pack_weight(WeightView<T>{p.x, p.m, depth, p.x_step, 1, {0}}, packed.get());
  parallel_tasks(ceil_div(n, block), [&](int64_t task) {
    const int64_t first = task * block, rows = std::min(block, n - first);
    const Scratch<T> turned(rows * step);
    const Strip<T> strip{p.weights() + first * w_step, 0, rows};
    const int64_t ahead = std::min(table.mr, n - first - rows);
    table.run({.depth = depth,
               .b = packed.get(),
               .after = {strip.a + rows * w_step, w_step == depth ? ahead * depth : 0},
               .c = turned.get(),
               .n = p.m,
               .strips = &strip,
               .strip_count = 1,
               .a_step = w_step,
               .c_step = step});
    turn_back(turned.get(), step, rows, p.m, p.y + first, p.y_step, p.epilogue.from_channel(first));
  });
}

}  // namespace nnarch
