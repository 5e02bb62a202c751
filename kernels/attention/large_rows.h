// Rows of scores so large that their log-sum-exp has lost the logarithm of the sum: a row that a
// mask's least number hides whole, say, whose weights are all the same.
#pragma once

#include <algorithm>

#include "attention/weights_problem.h"
#include "cpu/arena.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"

namespace nnarch {

// Maxima and sums of such rows, found by one more pass over the scores of the tiles that have any.
template <class T>
class LargeRows {
 public:
  LargeRows(const Attention<T>& f, const RowValues<T>& lse)
      : count_(any(f, lse) ? f.batch * f.heads * f.queries : 0), top_(count_), inverse_(count_) {
    if (count_ == 0) return;
    const auto& table = NNARCH_SELECT(attention_weights_table<T>());
    AttentionWeights<T> a{};
    a.forward = f, a.forward.drops = false;
    a.lse = lse;
    const int64_t blocks = ceil_div(f.queries, table.queries), scratch = table.scratch(a);
    parallel_tasks(f.batch * f.heads * blocks, [&](int64_t task) {
      const int64_t head = task / blocks, first = task % blocks * table.queries;
      const int64_t end = std::min(first + table.queries, f.queries), at = head * f.queries + first;
      const Scratch<T> memory(scratch);
      table.large_sums(a,
                       {head / f.heads, head % f.heads, head % f.heads + 1, first, end, 0, f.keys},
                       top_.get() + at, inverse_.get() + at, memory.get());
    });
  }

  LargeSums<T> sums() const {
    return count_ == 0 ? LargeSums<T>{} : LargeSums<T>{top_.get(), inverse_.get()};
  }

 private:
  static bool any(const Attention<T>& f, const RowValues<T>& lse) {
    for (int64_t b = 0; b < f.batch; ++b)
      for (int64_t h = 0; h < f.heads; ++h)
        for (int64_t i = 0; i < f.queries; ++i)
          if (is_large_sum(lse.at(b, h, i))) return true;
    return false;
  }

  int64_t count_;
  Scratch<T> top_, inverse_;
};

}  // namespace nnarch
