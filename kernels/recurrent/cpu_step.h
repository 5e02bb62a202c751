// One step: the state's product and the cell, block by block, and the projection.
#pragma once

#include "recurrent/cpu_layer.h"

namespace nnarch {

// Rows of one step, `at` being the first of them in y and in the reserve.
template <class T>
struct StepRows {
  const T *gx, *before;
  T* after;  // the state, after the step
  T* c;
  int64_t at, rows;
};

template <class T>
void multiply_state(const GateWeight<T>& w, int64_t first, int64_t last, int64_t after,
                    const DenseRows<T>& rows, T* c, int64_t c_step) {
  if (w.packed || w.bfloat16)
    return multiply_blocks<T>(w, first, last, after, rows, c, c_step, nullptr);
  for (int64_t b = first; b < last; ++b)
    multiply_raw_block<T>(w, b, rows, c + w.order.start(b) - w.order.start(first), c_step, nullptr);
}

// Where the cell leaves h: in the state, or what is to be projected.
template <class T>
struct CellOutput {
  T* h;
  int64_t h_step;
  T* y;  // or null
  int64_t y_step;
};

template <class T>
void run_cell(const RecurrentLayer<T>& l, const StepRows<T>& s, const CellOutput<T>& out, int64_t b,
              int64_t row, int64_t rows, const T* gh, int64_t gh_step) {
  const int64_t u = b * l.order().width, hidden = l.size.hidden, pitch = l.gx_pitch();
  const int64_t kept_step = l.kept.row_step();
  recurrent<T>().cell({.kind = l.size.kind,
                       .rows = rows,
                       .units = l.order().units(b),
                       .width = l.order().width_of(b),
                       .gx = s.gx + row * pitch + l.order().start(b),
                       .gx_step = pitch,
                       .gh = gh,
                       .gh_step = gh_step,
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
                       .kept = l.kept.data ? l.kept.data + (s.at + row) * kept_step + u : nullptr,
                       .kept_step = kept_step,
                       .hidden = hidden});
}

// Rows in parts of up to 42, each whole register tiles of nearly equal height.
struct RowParts {
  int64_t rows, tiles, count;

  RowParts(int64_t m, int64_t mr)
      : rows(m), tiles(ceil_div(m, mr)), count(ceil_div(tiles, std::max<int64_t>(1, 42 / mr))) {}
  int64_t begin(int64_t part) const { return rows * (tiles * part / count) / tiles; }
  int64_t most() const { return ceil_div(rows * ceil_div(tiles, count), tiles) + 1; }
};

// Blocks [first, last): a few at a time, so that their products go through the first-level cache.
template <class T>
void run_blocks(const RecurrentLayer<T>& l, const StepRows<T>& s, const CellOutput<T>& out,
                int64_t first, int64_t last, bool backwards) {
  const ColumnOrder& order = l.order();
  const int64_t at_once = std::max<int64_t>(1, 4 / order.gates);
  const int64_t runs = ceil_div(last - first, at_once);
  const RowParts parts(s.rows, gemm<T>().mr);
  const int64_t gh_step = at_once * order.gates * order.width;
  Scratch<T> gh(parts.most() * gh_step);
  const auto begin_of = [&](int64_t i) { return first + (backwards ? runs - 1 - i : i) * at_once; };
  for (int64_t i = 0; i < runs; ++i) {
    const int64_t begin = begin_of(i), end = std::min(begin + at_once, last);
    for (int64_t part = 0; part < parts.count; ++part) {
      const int64_t row = parts.begin(part), rows = parts.begin(part + 1) - row;
      const int64_t after = part + 1 < parts.count ? begin : begin_of(i + 1 < runs ? i + 1 : i);
      multiply_state<T>(l.hh, begin, end, after,
                        {s.before + row * l.state_pitch, l.state_pitch, rows}, gh.get(), gh_step);
      for (int64_t b = begin; b < end; ++b)
        run_cell(l, s, out, b, row, rows, gh.get() + order.start(b) - order.start(begin), gh_step);
    }
  }
}

// Blocks a task, where a step is shared: about 16 tasks, of some work each.
inline int64_t blocks_a_task(int64_t blocks) { return ceil_div(blocks, 16); }

template <class T>
void normalized_step(const RecurrentLayer<T>& l, const StepRows<T>& s, const CellOutput<T>& out) {
  const int64_t pitch = l.gx_pitch(), hidden = l.size.hidden, blocks = l.order().blocks();
  Scratch<T> products(s.rows * pitch);
  T* gh = products.get();
  const int64_t task_blocks = l.wide ? blocks_a_task(blocks) : blocks;
  parallel_tasks(ceil_div(blocks, task_blocks), [&](int64_t task) {
    const int64_t first = task * task_blocks;
    multiply_state<T>(l.hh, first, std::min(first + task_blocks, blocks), -1,
                      {s.before, l.state_pitch, s.rows}, gh + l.order().start(first), pitch);
  });
  for (int64_t r = 0; r < s.rows; ++r)
    recurrent<T>().norm_cell({*l.state_norm, l.cell_norm, l.cell_norm + hidden, l.peephole,
                              s.gx + r * pitch, gh + r * pitch, s.c + r * hidden,
                              out.h + r * out.h_step, out.y ? out.y + r * out.y_step : nullptr,
                              l.kept.data ? l.kept.at(s.at + r, 0) : nullptr});
}

template <class T>
void cells_of_step(const RecurrentLayer<T>& l, const StepRows<T>& s, const CellOutput<T>& out,
                   bool backwards) {
  if (l.state_norm) return normalized_step(l, s, out);
  const int64_t blocks = l.order().blocks();
  if (!l.wide) return run_blocks(l, s, out, 0, blocks, backwards);
  const int64_t task_blocks = blocks_a_task(blocks);
  parallel_tasks(ceil_div(blocks, task_blocks), [&](int64_t task) {
    const int64_t first = task * task_blocks;
    run_blocks(l, s, out, first, std::min(first + task_blocks, blocks), backwards);
  });
}

// One step of some sequences. Every other step takes the blocks in the opposite order: what the
// second-level cache holds of the weights is used before it leaves.
template <class T>
void run_step(const RecurrentLayer<T>& l, const StepRows<T>& s, bool backwards) {
  T* y = l.y + s.at * l.size.out;
  if (!l.projects)
    return cells_of_step<T>(l, s, {s.after, l.state_pitch, y, l.size.out}, backwards);
  const int64_t pitch = row_pitch<T>(l.size.hidden), blocks = l.hr.order.blocks();
  Scratch<T> h(s.rows * pitch);
  cells_of_step<T>(l, s, {h.get(), pitch, nullptr, 0}, backwards);
  const int64_t task_blocks = l.wide ? blocks_a_task(blocks) : blocks;
  parallel_tasks(ceil_div(blocks, task_blocks), [&](int64_t task) {
    const int64_t first = task * task_blocks;
    multiply_state<T>(l.hr, first, std::min(first + task_blocks, blocks), -1,
                      {h.get(), pitch, s.rows}, s.after + l.hr.order.start(first), l.state_pitch);
  });
  for (int64_t r = 0; r < s.rows; ++r)
    std::copy_n(s.after + r * l.state_pitch, l.size.out, y + r * l.size.out);
}

// All steps of a group of sequences.
template <class T>
void run_group(const RecurrentLayer<T>& l, const Group& group) {
  const Steps& steps = l.steps;
  const int64_t pitch = l.gx_pitch(), hidden = l.size.hidden;
  const int64_t state_size = steps.batch() * l.state_pitch;
  for (int64_t done = 0; done < steps.count();) {
    const int64_t count = chunk_steps(l, group, done);
    const int64_t a = steps.at(done), b = steps.at(done + count - 1);
    const StepChunk chunk(steps, group, std::min(a, b), std::max(a, b) + 1);
    Scratch<T> gx(chunk.rows() * pitch);
    input_products(l, group, chunk, gx.get());
    for (const int64_t end = done + count; done < end; ++done) {
      const int64_t t = steps.at(done), rows = group.rows(steps, t), odd = done & 1;
      T* state = l.state + group.first * l.state_pitch;
      if (rows > 0)
        run_step<T>(l,
                    {gx.get() + chunk.first_row(t) * pitch, state + odd * state_size,
                     state + (1 - odd) * state_size, l.c ? l.c + group.first * hidden : nullptr,
                     steps.first(t) + group.first, rows},
                    odd);
    }
  }
}

}  // namespace nnarch
