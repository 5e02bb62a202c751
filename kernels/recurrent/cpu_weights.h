// Weights of a recurrent layer in the order that its products read, and these products.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/arena.h"
#include "cpu/gemm.h"
#include "cpu/layout.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"
#include "recurrent/cpu_kernels.h"

namespace nnarch {

// Columns in blocks of a panel's width, all gates of a unit in one block; a last block of at most
// half as many units has half the width, two gates a panel.
template <class T>
ColumnOrder column_order(int64_t gates, int64_t hidden) {
  const int64_t nr = gemm<T>().nr, rest = hidden % nr;
  return {gates, hidden, nr, rest > 0 && rest <= nr / 2 ? nr / 2 : nr, ceil_div(hidden, nr)};
}

// Values from row to row where columns are kept: whole panels, and no multiple of 2 KB: rows of a
// product that lie so far apart push each other out of the first-level cache.
template <class T>
int64_t row_pitch(int64_t columns) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  const int64_t whole = round_up(columns, std::max(gemm<T>().nr, line));
  return whole % (32 * line) == 0 ? whole + line : whole;
}

// A weight [gates·H, depth] with dense rows, as it is or packed.
template <class T>
struct GateWeight {
  ColumnOrder order;
  int64_t depth;
  const T* raw = nullptr;  // [gates·H, depth], rows `raw_step` apart; or null
  int64_t raw_step = 0;
  const T* packed = nullptr;
  const uint16_t* bfloat16 = nullptr;  // packed likewise

  int64_t packed_size() const {
    return checked_product(round_up(order.columns(), gemm<T>().nr), depth);
  }
  int64_t panels(int64_t b) const {
    return ceil_div(order.gates * order.width_of(b), gemm<T>().nr);
  }
  // Where a block's panels begin, for who fetches them ahead; or null.
  const T* block(int64_t b) const { return packed ? packed + order.start(b) * depth : nullptr; }
};

// One block of columns.
template <class T>
void pack_block(const GateWeight<T>& w, int64_t b, T* dst) {
  const int64_t nr = gemm<T>().nr, units = w.order.units(b), width = w.order.width_of(b);
  if (units < width || w.panels(b) * nr > w.order.gates * width)
    std::fill_n(dst, w.panels(b) * nr * w.depth, T{0});
  for (int64_t gate = 0; gate < w.order.gates; ++gate) {
    const int64_t column = gate * width;
    const T* from = w.raw + (gate * w.order.hidden + b * w.order.width) * w.raw_step;
    transpose_fn<T>()(from, w.raw_step, dst + column / nr * nr * w.depth + column % nr, nr, units,
                      w.depth);
  }
}

template <class T>
void pack_gates(const GateWeight<T>& w, T* dst) {
  parallel_tasks(w.order.blocks,
                 [&](int64_t b) { pack_block(w, b, dst + w.order.start(b) * w.depth); });
}

// Rows of A, `step` apart.
template <class T>
struct DenseRows {
  const T* data;
  int64_t step, count;
};

// c = start + rows · (blocks [first, last) of w); `c` and `start` begin at the first of these. A
// row of c has room for whole panels. `next`: the panels that will be read after these, or null.
template <class T>
void multiply_blocks(const GateWeight<T>& w, int64_t first, int64_t last, const T* next,
                     const DenseRows<T>& rows, T* c, int64_t c_step, const T* start) {
  const RecurrentTable<T>& table = recurrent<T>();
  const int64_t column = w.order.start(first);
  const int64_t columns =
      (last < w.order.blocks ? w.order.start(last) : w.order.columns()) - column;
  const int64_t panels = ceil_div(columns, gemm<T>().nr);
  if (w.bfloat16) {
    if constexpr (sizeof(T) == 4)
      for (int64_t r = 0; r < rows.count; r += table.most_few_rows)
        table.few_bfloat16(
            {rows.data + r * rows.step, rows.step, std::min(table.most_few_rows, rows.count - r),
             w.bfloat16 + column * w.depth, w.depth, panels, c + r * c_step, c_step, start});
    return;
  }
  const T* b = w.packed + column * w.depth;
  if (rows.count <= table.most_few_rows || w.depth == 0) {
    for (int64_t r = 0; r < rows.count; r += table.most_few_rows)
      table.few({rows.data + r * rows.step, rows.step,
                 std::min(table.most_few_rows, rows.count - r), b, w.depth, panels, c + r * c_step,
                 c_step, start});
    return;
  }
  // One sum of 613, before a layer normalization, had three times torch's error.
  constexpr int64_t longest = 512;
  const int64_t parts = std::max<int64_t>(1, ceil_div(w.depth, longest));
  const int64_t nr = gemm<T>().nr;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t from = w.depth * part / parts, to = w.depth * (part + 1) / parts;
    const Strip<T> strip{rows.data + from, 0, rows.count};
    gemm<T>().run({.depth = to - from,
                   .b = b + from * nr,
                   .panel_step = w.depth * nr,
                   .b_after = part + 1 < parts ? b + to * nr : next,
                   .c = c,
                   .n = columns,
                   .accumulate = part > 0,
                   .epilogue = {.shift = part > 0 ? nullptr : start},
                   .strips = &strip,
                   .strip_count = 1,
                   .a_step = rows.step,
                   .c_step = c_step});
  }
}

// The same of one block from weights that are not packed: in place for few rows, else packed into
// the calling thread's scratch memory.
template <class T>
void multiply_raw_block(const GateWeight<T>& w, int64_t block, const DenseRows<T>& rows, T* c,
                        int64_t c_step, const T* start) {
  const int64_t units = w.order.units(block), width = w.order.width_of(block);
  if (rows.count > recurrent<T>().most_few_rows) {
    Scratch<T> packed(w.panels(block) * gemm<T>().nr * w.depth);
    pack_block(w, block, packed.get());
    GateWeight<T> one = w;
    one.packed = packed.get() - w.order.start(block) * w.depth;
    return multiply_blocks<T>(one, block, block + 1, nullptr, rows, c, c_step, start);
  }
  for (int64_t gate = 0; gate < w.order.gates; ++gate) {
    const T* from = w.raw + (gate * w.order.hidden + block * w.order.width) * w.raw_step;
    gemm<T>().few_rows(rows.data, rows.step, rows.count, from, w.raw_step, w.depth, units,
                       c + gate * width, c_step, {.shift = start ? start + gate * width : nullptr});
  }
}

// The same of several blocks, packed or not.
template <class T>
void multiply_any(const GateWeight<T>& w, int64_t first, int64_t last, const T* next,
                  const DenseRows<T>& rows, T* c, int64_t c_step, const T* start) {
  if (w.packed || w.bfloat16)
    return multiply_blocks<T>(w, first, last, next, rows, c, c_step, start);
  for (int64_t b = first; b < last; ++b) {
    const int64_t column = w.order.start(b) - w.order.start(first);
    multiply_raw_block<T>(w, b, rows, c + column, c_step, start ? start + column : nullptr);
  }
}

// Values [gates, H] of the first gates, in the order of columns, added to what `to` holds.
template <class T>
void add_in_order(const ColumnOrder& order, int64_t gates, const T* values, T* to) {
  for (int64_t b = 0; b < order.blocks; ++b)
    for (int64_t gate = 0; gate < gates; ++gate)
      for (int64_t u = 0; u < order.units(b); ++u)
        to[order.start(b) + gate * order.width_of(b) + u] +=
            values[gate * order.hidden + b * order.width + u];
}

}  // namespace nnarch
