// One step by Strassen's product of pairs of sequences: seven products for eight.
#pragma once

#include "recurrent/cpu_step_rows.h"

namespace nnarch {

// Rows of a step in parts of pairs: pair i of a part is its row i and that half of its rows on.
struct PairParts {
  int64_t rows;
  RowParts parts;

  PairParts(int64_t m, int64_t mr, int64_t most)
      : rows(m), parts(ceil_div(m, int64_t{2}), mr, most) {}
  int64_t count() const { return parts.count; }
  int64_t first_pair(int64_t part) const { return parts.begin(part); }
  int64_t pairs(int64_t part) const { return parts.begin(part + 1) - parts.begin(part); }
  int64_t row(int64_t part) const { return 2 * first_pair(part); }
  int64_t rows_of(int64_t part) const { return std::min(2 * pairs(part), rows - row(part)); }
  int64_t most_rows() const { return 2 * parts.most(); }
};

// Rows an odd number of cache lines apart share the sets of the first-level cache evenly.
inline int64_t odd_lines(int64_t values) { return (ceil_div(values, int64_t{16}) | 1) * 16; }

// The left factors of a step.
class StepPairs {
 public:
  static constexpr int64_t most_pairs = 42;
  static constexpr float most = 16;

  StepPairs(const RecurrentLayer<float>& l, const StepRows<float>& s)
      : parts(s.rows, gemm<float>().mr, most_pairs),
        depth((l.ih.depth + l.hh.depth) / 2),
        pair_step(odd_lines(depth)),
        product_step(ceil_div(s.rows, int64_t{2}) * pair_step),
        memory_(kStrassenProducts * product_step) {
    // Where the input ends in one of the halves, the rest of that half is the state.
    const int64_t cut = l.ih.depth < depth ? l.ih.depth : l.ih.depth - depth;
    const auto make = [&](int64_t part) {
      add(l, s, part, 0, cut);
      add(l, s, part, cut, depth - cut);
    };
    if (l.wide)
      parallel_tasks(parts.count(), make);
    else
      for (int64_t part = 0; part < parts.count(); ++part) make(part);
  }

  // Whether all values of z, times the power of two below the largest of their weights, are so
  // small that what they leave of rounding in their partner's sums is, too. An infinity or a NaN
  // must not get there at all.
  bool sound() const { return sound_; }
  const float* of(int64_t part) const { return memory_.get() + parts.first_pair(part) * pair_step; }

  const PairParts parts;
  const int64_t depth, pair_step, product_step;

 private:
  struct Values {
    const float* at;  // of the part's first row
    int64_t step;
  };
  static Values values(const RecurrentLayer<float>& l, const StepRows<float>& s, int64_t row,
                       int64_t k) {
    if (k < l.ih.depth) return {s.x.data + row * s.x.step + k, s.x.step};
    return {s.before + row * l.state_pitch + k - l.ih.depth, l.state_pitch};
  }
  void add(const RecurrentLayer<float>& l, const StepRows<float>& s, int64_t part, int64_t k,
           int64_t count) {
    if (count == 0) return;
    const int64_t row = parts.row(part);
    const Values first = values(l, s, row, k), second = values(l, s, row, depth + k);
    const float largest = recurrent<float>().pair_factors(
        {parts.rows_of(part), parts.pairs(part), first.at, second.at, first.step, second.step,
         l.pairs.scales + k, l.pairs.scales + depth + k, count,
         memory_.get() + parts.first_pair(part) * pair_step + k, pair_step, product_step});
    if (!(largest <= most)) sound_ = false;
  }

  const Scratch<float> memory_;
  std::atomic<bool> sound_ = true;
};

// Blocks [first, last) of the first half of all, and those half of all away.
inline void run_pair_blocks(const RecurrentLayer<float>& l, const StepRows<float>& s,
                            const CellOutput<float>& out, const StepPairs& pairs, int64_t first,
                            int64_t last, bool backwards) {
  const ColumnOrder& order = l.order();
  const int64_t at_once = std::max<int64_t>(1, 4 / order.gates);
  const int64_t runs = ceil_div(last - first, at_once), nr = gemm<float>().nr;
  const int64_t half = order.blocks / 2, block = order.gates * order.width;
  const bool passes = l.weight_bytes() * 7 / 4 > int64_t{768} << 10;
  const float *y = out.y_past_caches ? nullptr : out.y, *c = passes ? s.c : nullptr,
              *h = passes ? out.h : nullptr;
  const int64_t pitch = odd_lines(2 * at_once * block);
  Scratch<float> products(pairs.parts.most_rows() * pitch);
  const PairParts& parts = pairs.parts;
  for (int64_t i = 0; i < runs; ++i) {
    const int64_t begin = first + (backwards ? runs - 1 - i : i) * at_once;
    const int64_t blocks = std::min(begin + at_once, last) - begin, column = order.start(begin);
    const int64_t u = begin * order.width, units = blocks * order.width;
    const int64_t u_right = u + half * order.width;
    for (int64_t part = 0; part < parts.count(); ++part) {
      const int64_t row = parts.row(part), rows = parts.rows_of(part);
      recurrent<float>().pairs(
          {parts.pairs(part),
           pairs.of(part),
           pairs.pair_step,
           pairs.product_step,
           pairs.depth,
           l.pairs.factors + column * kStrassenProducts * pairs.depth,
           blocks * block / nr,
           l.start + column,
           l.start + column + half * block,
           products.get(),
           pitch,
           parts.pairs(part) * pitch,
           blocks * block,
           {soon<float>(y, out.y_step, u, row, rows, units),
            soon<float>(y, out.y_step, u_right, row, rows, units),
            soon<float>(c, l.size.hidden, u, row, rows, units),
            soon<float>(c, l.size.hidden, u_right, row, rows, units),
            soon<float>(h, out.h_step, u, row, rows, units),
            soon<float>(h, out.h_step, u_right, row, rows, units),
            soon<float>(s.x_soon, l.size.in, begin / at_once * parts.count() + part,
                        ceil_div(half, at_once) * parts.count())},
           l.weight_bytes() * 7 / 4 > l2_bytes()});
      for (int64_t side = 0; side < 2; ++side)
        for (int64_t b = 0; b < blocks; ++b)
          run_cell<float>(l, s, out, begin + b + side * half, row, rows,
                          {nullptr, 0, products.get() + (side * blocks + b) * block, pitch});
    }
  }
}

// Whether steps of so many rows are meant to run so.
template <class T>
bool steps_as_pairs(const RecurrentLayer<T>& l, int64_t rows) {
  return l.pairs.factors && rows >= least_pair_rows(l.weight_bytes()) &&
         multiplies_at_once(l, rows);
}

// Runs a step so if its input is there and sound; whether it did.
template <class T>
bool run_as_pairs(const RecurrentLayer<T>& l, const StepRows<T>& s, const CellOutput<T>& out,
                  bool backwards) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (s.gx || !steps_as_pairs(l, s.rows)) return false;
    const StepPairs pairs(l, s);
    if (!pairs.sound()) return false;
    const int64_t blocks = l.order().blocks / 2;
    const int64_t task_blocks = l.wide ? blocks_a_task(blocks) : blocks;
    parallel_tasks(ceil_div(blocks, task_blocks), [&](int64_t task) {
      const int64_t first = task * task_blocks, last = std::min(first + task_blocks, blocks);
      run_pair_blocks(l, s, out, pairs, first, last, backwards);
      finish_past_caches(l.wide && out.y_past_caches);
    });
    return true;
  }
  return false;
}

}  // namespace nnarch
