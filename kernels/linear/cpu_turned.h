// Some rows of x against unpacked weights: the product is turned over, y' = w·x', so that weights
// are multiplied where they lie and only x is packed.
#pragma once

#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/layout.h"
#include "cpu/pack_weight.h"
#include "cpu/parallel.h"
#include "linear/cpu_combine.h"
#include "linear/cpu_rows.h"

namespace nnarch {

// A task's rows of the weight, in whole register tiles: their products stay in cache until they are
// turned back, and are worth a task.
inline int64_t turned_rows(int64_t n, int64_t mr, int64_t products_a_row) {
  constexpr int64_t most_tiles = 8, wanted_tasks = 8, least_products = int64_t{1} << 20;
  const int64_t least = ceil_div(least_products, products_a_row * mr);
  return mr * std::clamp<int64_t>(ceil_div(n, mr * wanted_tasks), std::min(least, most_tiles),
                                  most_tiles);
}

template <class T>
void multiply_turned(const Rows& x, const Tensor& w, T* y, const Epilogue<T>& epilogue) {
  set_algorithm("turned");
  const GemmTable<T>& table = gemm<T>();
  const TurnBack<T> turn_back = NNARCH_SELECT(turn_back_fn<T>());
  const int64_t n = w.size(0), w_step = w.stride(0), step = round_up(x.m, table.nr);
  const int64_t block = turned_rows(n, table.mr, x.depth * step);
  const Scratch<T> packed(packed_size<T>(x.m, 1, x.depth));
  pack_weight(WeightView<T>{data<T>(x.tensor), x.m, x.depth, x.stride, 1, {0}}, packed.get());
  parallel_tasks(ceil_div(n, block), [&](int64_t task) {
    const int64_t first = task * block, rows = std::min(block, n - first);
    const Scratch<T> turned(rows * step);
    const Strip<T> strip{data<T>(w) + first * w_step, 0, rows};
    const int64_t ahead = std::min(table.mr, n - first - rows);
    table.run({.depth = x.depth,
               .b = packed.get(),
               .rows_after = ahead > 0 && w_step == x.depth ? strip.a + rows * w_step : nullptr,
               .rows_after_size = ahead * x.depth,
               .c = turned.get(),
               .n = x.m,
               .strips = &strip,
               .strip_count = 1,
               .a_step = w_step,
               .c_step = step});
    turn_back(turned.get(), step, rows, x.m, y + first, n, epilogue.from_channel(first));
  });
}

}  // namespace nnarch
