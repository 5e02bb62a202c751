// One layer in one direction: what the forward's parts have in common, and the input's product.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/arena.h"
#include "recurrent/cpu_pairs.h"
#include "recurrent/cpu_problem.h"

namespace nnarch {

template <class T>
struct RecurrentLayer {
  const Steps& steps;
  RecurrentSizes size;
  InputRows<T> x;
  GateWeight<T> ih, hh, hr;  // hr: of a projection
  ReserveRows<T> kept;
  PairWeight pairs = {};
  bool projects = false;
  const T* start = nullptr;     // of the input's product, in the order of columns
  const T* bias_n = nullptr;    // GRU: [H] or null
  const T* peephole = nullptr;  // [3, H] or null
  const NormRow<T>* input_norm = nullptr;
  const NormRow<T>* state_norm = nullptr;
  const T* cell_norm = nullptr;  // gain and bias, [2, H]
  T* y = nullptr;
  bool y_past_caches = false;
  T* c = nullptr;      // the cell of every sequence, [B, H]: first, then last
  T* state = nullptr;  // h of every sequence, twice: before and after a step
  int64_t state_pitch = 0;
  bool wide = false;  // steps are shared between threads

  const ColumnOrder& order() const { return hh.order; }
  // Whether a gate needs no more than the sum of the input's and the state's product.
  bool sums_products() const { return size.kind != kGru && ih.packed && hh.packed; }
  int64_t weight_bytes() const {
    return order().columns() * (ih.depth + hh.depth) * int64_t{sizeof(T)};
  }
  int64_t gx_pitch() const { return row_pitch<T>(order().columns()); }
};

// Sequences [first, last) through some steps.
struct Group {
  int64_t first, last;

  int64_t rows(const Steps& steps, int64_t t) const {
    return std::max<int64_t>(0, std::min(steps.rows(t), last) - first);
  }
};

// Steps [begin, end) whose input products are made together, in rows one after the other.
struct StepChunk {
  int64_t begin, end;
  std::vector<int64_t> row;  // where each step's rows begin; then their number

  StepChunk(const Steps& steps, const Group& group, int64_t from, int64_t to)
      : begin(from), end(to), row(static_cast<size_t>(to - from) + 1, 0) {
    for (int64_t t = begin; t < end; ++t)
      row[t - begin + 1] = row[t - begin] + group.rows(steps, t);
  }
  int64_t first_row(int64_t t) const { return row[t - begin]; }
  int64_t rows() const { return row.back(); }
};

// Whether a step of so many rows multiplies its input block by block, right before its state: there
// are enough of them to read the weights for one step, and gates stay in the first-level cache,
// where a hoisted product leaves for the last one. A gain of 1 to 2 % from 12 rows on, a loss
// below 8. Weights that come from memory in every step need more rows, and one sum of both
// products.
inline bool multiplies_at_once(int64_t weight_bytes, bool sums_products, int64_t rows) {
  constexpr int64_t least_rows = 12, many_rows = 48;
  const int64_t cached = far_l3() ? l2_bytes() : int64_t{16} << 20;
  if (weight_bytes <= cached) return rows >= least_rows;
  return sums_products && rows >= many_rows;
}
template <class T>
bool multiplies_at_once(const RecurrentLayer<T>& layer, int64_t rows) {
  return !layer.input_norm && multiplies_at_once(layer.weight_bytes(), layer.sums_products(), rows);
}

// Enough rows to read a weight once for many products. Their results stay in the second-level
// cache, where weights do; of larger weights more rows are worth it.
template <class T>
int64_t chunk_steps(const RecurrentLayer<T>& layer, const Group& group, int64_t done) {
  constexpr int64_t cached = int64_t{8} << 20;
  const Steps& steps = layer.steps;
  const int64_t weights = layer.ih.order.columns() * layer.ih.depth * int64_t{sizeof(T)};
  const int64_t wanted = weights > cached ? 336 : 112;
  int64_t rows = 0, i = done;
  do rows += group.rows(steps, steps.at(i++));
  while (i < steps.count() && rows + group.rows(steps, steps.at(i)) <= wanted &&
         !multiplies_at_once(layer, group.rows(steps, steps.at(i))));
  return i - done;
}

// gx[row] = start + x[row]·W_ihᵀ for rows that lie evenly.
template <class T>
void multiply_input(const RecurrentLayer<T>& layer, const DenseRows<T>& rows, T* gx,
                    int64_t gx_step) {
  const GateWeight<T>& w = layer.ih;
  const int64_t blocks = w.order.blocks;
  // A part of the columns a task: its weights pass through the second-level cache.
  const int64_t at_once = std::max<int64_t>(1, 256 / (w.order.gates * w.order.width));
  const int64_t row_tasks = ceil_div(rows.count, 196);
  const int64_t row_block = round_up(ceil_div(rows.count, row_tasks), gemm<T>().mr);
  const bool raw = w.raw && !w.packed;
  const int64_t runs = raw ? blocks : ceil_div(blocks, at_once);
  parallel_tasks(runs * row_tasks, [&](int64_t task) {
    const int64_t run = task % runs, from = task / runs * row_block;
    const DenseRows<T> some{rows.data + from * rows.step, rows.step,
                            std::min(row_block, rows.count - from)};
    if (some.count <= 0) return;
    const int64_t first = raw ? run : run * at_once;
    const T* start = layer.start ? layer.start + w.order.start(first) : nullptr;
    T* c = gx + from * gx_step + w.order.start(first);
    if (raw) return multiply_raw_block(w, first, some, c, gx_step, start);
    const int64_t last = std::min(first + at_once, blocks);
    multiply_blocks<T>(w, first, last, w.block(last < blocks ? last : 0), some, c, gx_step, start);
  });
}

template <class T>
void input_products(const RecurrentLayer<T>& layer, const Group& group, const StepChunk& chunk,
                    T* gx) {
  const Steps& steps = layer.steps;
  const int64_t pitch = layer.gx_pitch(), most = group.rows(steps, chunk.begin);
  const int64_t count = chunk.end - chunk.begin;
  const bool whole = group.first == 0 && group.last == steps.batch();
  if (whole && (layer.x.even(steps) || count == 1)) {
    multiply_input<T>(layer, {layer.x.at(steps, chunk.begin, 0), layer.x.row, chunk.rows()}, gx,
                      pitch);
  } else if (steps.uniform() && most < count) {  // a sequence's rows lie evenly, too
    for (int64_t b = 0; b < most; ++b)
      multiply_input<T>(layer,
                        {layer.x.at(steps, chunk.begin, group.first + b), layer.x.step, count},
                        gx + b * pitch, most * pitch);
  } else {
    for (int64_t t = chunk.begin; t < chunk.end; ++t)
      if (const int64_t rows = group.rows(steps, t))
        multiply_input<T>(layer, {layer.x.at(steps, t, group.first), layer.x.row, rows},
                          gx + chunk.first_row(t) * pitch, pitch);
  }
  if (!layer.input_norm) return;
  for (int64_t t = chunk.begin; t < chunk.end; ++t)
    for (int64_t r = 0; r < group.rows(steps, t); ++r)
      recurrent<T>().normalize(
          *layer.input_norm, gx + (chunk.first_row(t) + r) * pitch,
          layer.kept.data ? layer.kept.at(steps.first(t) + group.first + r, 5) : nullptr);
}

}  // namespace nnarch
