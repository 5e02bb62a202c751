// One step: the state's product and the cell, block by block, and the projection.
#pragma once

#include "recurrent/cpu_step_pairs.h"

namespace nnarch {

// What a step without products made before multiplies: x with W_ih, then the state with W_hh. One
// sum takes up to 512 products: a chain of 613 before a layer normalization had three times torch's
// error.
template <class T>
class StepParts {
 public:
  static constexpr int64_t longest = 512;

  StepParts(const RecurrentLayer<T>& l, const StepRows<T>& s)
      : memory_(pieces(l.ih.depth) + pieces(l.hh.depth)) {
    add(l.ih, s.x.data, s.x.step);
    add(l.hh, s.before, l.state_pitch);
  }
  const StepPart<T>* data() const { return memory_.get(); }
  int64_t count() const { return count_; }

 private:
  static int64_t pieces(int64_t depth) { return ceil_div(depth, longest); }
  void add(const GateWeight<T>& w, const T* a, int64_t a_step) {
    const int64_t n = pieces(w.depth), nr = gemm<T>().nr;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t from = w.depth * i / n, depth = w.depth * (i + 1) / n - from;
      const bool apart = sum_ > 0 && sum_ + depth > longest;
      sum_ = apart ? depth : sum_ + depth;
      memory_[count_++] = {a + from, a_step, w.packed + from * nr, w.depth * nr, depth, apart};
    }
  }

  Scratch<StepPart<T>> memory_;
  int64_t count_ = 0, sum_ = 0;
};

// Blocks [first, last) whose products are made together, a few at a time: they are in the
// first-level cache when the cell reads them. What else it touches and the next step's input are
// fetched meanwhile.
template <class T>
void run_summed_blocks(const RecurrentLayer<T>& l, const StepRows<T>& s, const CellOutput<T>& out,
                       int64_t first, int64_t last, bool backwards) {
  const ColumnOrder& order = l.order();
  const int64_t at_once = std::max<int64_t>(1, 4 / order.gates);
  const int64_t runs = ceil_div(last - first, at_once), nr = gemm<T>().nr;
  const int64_t wide = at_once * order.gates * order.width;
  // The step's weights drive the states, too, out of the second-level cache.
  const bool passes = l.weight_bytes() > int64_t{768} << 10;
  // Every part reads a block's weights again; where these fill the second-level cache, gates may
  // go there as well.
  const bool large = wide * (l.ih.depth + l.hh.depth) * int64_t{sizeof(T)} > int64_t{600} << 10;
  const RowParts parts(s.rows, gemm<T>().mr, large ? 126 : 42);
  const StepParts<T> sum(l, s);
  Scratch<T> products(parts.most() * wide);
  for (int64_t i = 0; i < runs; ++i) {
    const int64_t begin = first + (backwards ? runs - 1 - i : i) * at_once;
    const int64_t end = std::min(begin + at_once, last), column = order.start(begin);
    const int64_t panels = (order.start(end - 1) - column) / nr + l.hh.panels(end - 1);
    const int64_t u = begin * order.width, units = std::min(end * order.width, order.hidden) - u;
    for (int64_t part = 0; part < parts.count; ++part) {
      const int64_t row = parts.begin(part), rows = parts.begin(part + 1) - row;
      recurrent<T>().step(
          {rows,
           row,
           sum.data(),
           sum.count(),
           column / nr,
           panels,
           l.start + column,
           products.get(),
           wide,
           {soon<T>(out.y_past_caches ? nullptr : out.y, out.y_step, u, row, rows, units),
            soon<T>(s.x_soon, l.size.in, begin / at_once * parts.count + part,
                    ceil_div(order.blocks, at_once) * parts.count),
            soon<T>(passes ? s.c : nullptr, l.size.hidden, u, row, rows, units),
            soon<T>(passes ? out.h : nullptr, out.h_step, u, row, rows, units)},
           passes && far_l3()});
      for (int64_t b = begin; b < end; ++b)
        run_cell<T>(l, s, out, b, row, rows,
                    {nullptr, 0, products.get() + order.start(b) - column, wide});
    }
  }
}

// Blocks [first, last): a few at a time, so that their products go through the first-level cache.
template <class T>
void run_blocks(const RecurrentLayer<T>& l, const StepRows<T>& s, const CellOutput<T>& out,
                int64_t first, int64_t last, bool backwards) {
  if (!s.gx && l.sums_products()) return run_summed_blocks(l, s, out, first, last, backwards);
  const ColumnOrder& order = l.order();
  const int64_t at_once = std::max<int64_t>(1, 4 / order.gates);
  const int64_t runs = ceil_div(last - first, at_once);
  const RowParts parts(s.rows, gemm<T>().mr);
  const int64_t wide = at_once * order.gates * order.width, pitch = l.gx_pitch();
  Scratch<T> gx(s.gx ? 0 : parts.most() * wide), gh(parts.most() * wide);
  const auto begin_of = [&](int64_t i) { return first + (backwards ? runs - 1 - i : i) * at_once; };
  for (int64_t i = 0; i < runs; ++i) {
    const int64_t begin = begin_of(i), end = std::min(begin + at_once, last);
    for (int64_t part = 0; part < parts.count; ++part) {
      const int64_t row = parts.begin(part), rows = parts.begin(part + 1) - row;
      const int64_t after = part + 1 < parts.count ? begin : begin_of(i + 1 < runs ? i + 1 : i);
      if (!s.gx)
        multiply_any<T>(l.ih, begin, end, l.hh.block(begin),
                        {s.x.data + row * s.x.step, s.x.step, rows}, gx.get(), wide,
                        l.start ? l.start + order.start(begin) : nullptr);
      multiply_any<T>(l.hh, begin, end, s.gx ? l.hh.block(after) : l.ih.block(after),
                      {s.before + row * l.state_pitch, l.state_pitch, rows}, gh.get(), wide,
                      nullptr);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t column = order.start(b) - order.start(begin);
        const T* input = s.gx ? s.gx + row * pitch + order.start(b) : gx.get() + column;
        run_cell<T>(l, s, out, b, row, rows, {input, s.gx ? pitch : wide, gh.get() + column, wide});
      }
    }
  }
}

template <class T>
void normalized_step(const RecurrentLayer<T>& l, const StepRows<T>& s, const CellOutput<T>& out) {
  const int64_t pitch = l.gx_pitch(), hidden = l.size.hidden, blocks = l.order().blocks;
  Scratch<T> products(s.rows * pitch);
  T* gh = products.get();
  const int64_t task_blocks = l.wide ? blocks_a_task(blocks) : blocks;
  parallel_tasks(ceil_div(blocks, task_blocks), [&](int64_t task) {
    const int64_t first = task * task_blocks;
    multiply_any<T>(l.hh, first, std::min(first + task_blocks, blocks), nullptr,
                    {s.before, l.state_pitch, s.rows}, gh + l.order().start(first), pitch, nullptr);
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
  if (run_as_pairs(l, s, out, backwards)) return;
  const int64_t blocks = l.order().blocks;
  if (!l.wide) return run_blocks(l, s, out, 0, blocks, backwards);
  const int64_t task_blocks = blocks_a_task(blocks);
  parallel_tasks(ceil_div(blocks, task_blocks), [&](int64_t task) {
    const int64_t first = task * task_blocks;
    run_blocks(l, s, out, first, std::min(first + task_blocks, blocks), backwards);
    finish_past_caches(out.y_past_caches);
  });
}

// One step of some sequences. Every other step takes the blocks in the opposite order: what the
// second-level cache holds of the weights is used before it leaves.
template <class T>
void run_step(const RecurrentLayer<T>& l, const StepRows<T>& s, bool backwards) {
  T* y = l.y + s.at * l.size.out;
  if (!l.projects)
    return cells_of_step<T>(l, s, {s.after, l.state_pitch, y, l.size.out, l.y_past_caches},
                            backwards);
  const int64_t pitch = row_pitch<T>(l.size.hidden), blocks = l.hr.order.blocks;
  Scratch<T> h(s.rows * pitch);
  cells_of_step<T>(l, s, {h.get(), pitch, nullptr, 0, false}, backwards);
  const int64_t task_blocks = l.wide ? blocks_a_task(blocks) : blocks;
  parallel_tasks(ceil_div(blocks, task_blocks), [&](int64_t task) {
    const int64_t first = task * task_blocks;
    multiply_any<T>(l.hr, first, std::min(first + task_blocks, blocks), nullptr,
                    {h.get(), pitch, s.rows}, s.after + l.hr.order.start(first), l.state_pitch,
                    nullptr);
  });
  for (int64_t r = 0; r < s.rows; ++r)
    std::copy_n(s.after + r * l.state_pitch, l.size.out, y + r * l.size.out);
}

// All steps of a group of sequences.
template <class T>
void run_group(const RecurrentLayer<T>& l, const Group& group) {
  const Steps& steps = l.steps;
  const int64_t hidden = l.size.hidden, state_size = steps.batch() * l.state_pitch;
  T* state = l.state + group.first * l.state_pitch;
  // Rows of x that lie 4 KB apart share one set of the first-level cache: they are copied.
  const bool copies =
      l.sums_products() && !l.pairs.factors && l.x.row * int64_t{sizeof(T)} % 4096 == 0;
  const int64_t x_pitch = row_pitch<T>(l.size.in);
  Scratch<T> copy(copies ? (group.last - group.first) * x_pitch : 0);
  const auto input = [&](int64_t i) {
    const int64_t t = steps.at(i);
    return DenseRows<T>{l.x.at(steps, t, group.first), l.x.row, group.rows(steps, t)};
  };
  const auto input_apart = [&](const DenseRows<T>& x) {
    if (!copies) return x;
    for (int64_t r = 0; r < x.count; ++r)
      std::copy_n(x.data + r * x.step, l.size.in, copy.get() + r * x_pitch);
    return DenseRows<T>{copy.get(), x_pitch, x.count};
  };
  // Step i, whose input's products are `gx`, or null.
  const auto run = [&](int64_t i, const T* gx) {
    const int64_t t = steps.at(i), rows = group.rows(steps, t), odd = i & 1;
    if (rows <= 0) return;
    run_step<T>(l,
                {gx, gx ? DenseRows<T>{} : input_apart(input(i)),
                 gx || i + 1 == steps.count() ? DenseRows<T>{} : input(i + 1),
                 state + odd * state_size, state + (1 - odd) * state_size,
                 l.c ? l.c + group.first * hidden : nullptr, steps.first(t) + group.first, rows},
                odd);
  };
  for (int64_t done = 0; done < steps.count();) {
    if (multiplies_at_once(l, group.rows(steps, steps.at(done)))) {
      run(done++, nullptr);
      continue;
    }
    const int64_t count = chunk_steps(l, group, done);
    const int64_t a = steps.at(done), b = steps.at(done + count - 1);
    const StepChunk chunk(steps, group, std::min(a, b), std::max(a, b) + 1);
    Scratch<T> gx(chunk.rows() * l.gx_pitch());
    input_products(l, group, chunk, gx.get());
    for (const int64_t end = done + count; done < end; ++done)
      run(done, gx.get() + chunk.first_row(steps.at(done)) * l.gx_pitch());
  }
  finish_past_caches(l.y_past_caches);
}

}  // namespace nnarch
