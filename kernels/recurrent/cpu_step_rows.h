// The rows of one step: where they lie, the parts that they are cut into, and their cells.
#pragma once

#include "cpu/streaming.h"
#include "recurrent/cpu_layer.h"

namespace nnarch {

// Rows of one step, `at` being the first of them in y and in the reserve.
template <class T>
struct StepRows {
  const T* gx;          // the input's products; or null, where these are made now, of
  DenseRows<T> x;       // the input
  DenseRows<T> x_soon;  // that of the step that follows, or none
  const T* before;
  T* after;  // the state, after the step
  T* c;
  int64_t at, rows;
};

// Where the cell leaves h: in the state, or what is to be projected.
template <class T>
struct CellOutput {
  T* h;
  int64_t h_step;
  T* y;  // or null
  int64_t y_step;
  bool y_past_caches;
};

// Products of some rows, from a block's first column on.
template <class T>
struct Products {
  const T* gx;
  int64_t gx_step;
  const T* gh;
  int64_t gh_step;
};

template <class T>
void run_cell(const RecurrentLayer<T>& l, const StepRows<T>& s, const CellOutput<T>& out, int64_t b,
              int64_t row, int64_t rows, const Products<T>& products) {
  const int64_t u = b * l.order().width, hidden = l.size.hidden;
  const int64_t kept_step = l.kept.row_step();
  recurrent<T>().cell({.kind = l.size.kind,
                       .rows = rows,
                       .units = l.order().units(b),
                       .width = l.order().width_of(b),
                       .gx = products.gx,
                       .gx_step = products.gx_step,
                       .gh = products.gh,
                       .gh_step = products.gh_step,
                       .bias_n = l.bias_n ? l.bias_n + u : nullptr,
                       .peephole = l.peephole ? l.peephole + u : nullptr,
                       .h = s.before + row * l.state_pitch + u,
                       .h_before_step = l.state_pitch,
                       .c = s.c ? s.c + row * hidden + u : nullptr,
                       .c_step = hidden,
                       .next = out.h + row * out.h_step + u,
                       .next_step = out.h_step,
                       .y = out.y ? out.y + row * out.y_step + u : nullptr,
                       .y_step = out.y_step,
                       .y_past_caches = out.y_past_caches,
                       .kept = l.kept.data ? l.kept.data + (s.at + row) * kept_step + u : nullptr,
                       .kept_step = kept_step,
                       .hidden = hidden});
}

// Rows in parts of up to 42, or `most`, each whole register tiles of nearly equal height.
struct RowParts {
  int64_t rows, tiles, count;

  RowParts(int64_t m, int64_t mr, int64_t most = 42)
      : rows(m), tiles(ceil_div(m, mr)), count(ceil_div(tiles, std::max<int64_t>(1, most / mr))) {}
  int64_t begin(int64_t part) const { return rows * (tiles * part / count) / tiles; }
  int64_t most() const { return ceil_div(rows * ceil_div(tiles, count), tiles) + 1; }
};

// Columns [u, u + units) of a vector of states, which the cell will read or write.
template <class T>
StepLines<T> soon(const T* states, int64_t step, int64_t u, int64_t row, int64_t rows,
                  int64_t units) {
  return states ? StepLines<T>{states + row * step + u, step, rows, units} : StepLines<T>{};
}

// Part `i` of `n` of the next step's input.
template <class T>
StepLines<T> soon(const DenseRows<T>& x, int64_t width, int64_t i, int64_t n) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  const bool dense = x.step == width;
  const int64_t all = dense ? ceil_div(x.count * width, line) : x.count;
  const int64_t step = dense ? line : x.step, from = all * i / n;
  return {x.data + from * step, step, all * (i + 1) / n - from, dense ? 1 : width};
}

// Blocks a task, where a step is shared: about 16 tasks, of some work each.
inline int64_t blocks_a_task(int64_t blocks) { return ceil_div(blocks, 16); }

}  // namespace nnarch
