// Weight gradients of a chunk of rows: dw[j][i] += Σ_r grad[r][j] · b[r][i]. The rows of several
// chunks come in a fixed order, and inside a chunk in runs of fixed length, so sums do not depend
// on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/arena.h"
#include "cpu/gemm.h"
#include "cpu/layout.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"
#include "recurrent/backward.h"

namespace nnarch {

// The rows of a chunk that are multiplied with the gradients, packed into panels run by run.
template <class T>
class PackedRows {
 public:
  static constexpr int64_t run = 256;  // rows: the depth of one product

  PackedRows(int64_t most_rows, int64_t columns)
      : columns_(columns),
        wide_(round_up(columns, gemm<T>().nr)),
        memory_(checked_product(most_rows, wide_)) {}

  void pack(const T* const* rows, int64_t count) {
    const int64_t nr = gemm<T>().nr, panels = wide_ / nr, runs = ceil_div(count, run);
    if (panels == 0) return;
    parallel_tasks(runs * panels, [&](int64_t task) {
      const int64_t first = task / panels * run, j = task % panels * nr;
      const int64_t some = std::min(run, count - first);
      gemm<T>().pack_rows(rows + first, j, some, std::min(nr, columns_ - j),
                          memory_.get() + first * wide_ + j * some);
    });
  }

  int64_t columns() const { return columns_; }
  const T* of_run(int64_t first) const { return memory_.get() + first * wide_; }

 private:
  int64_t columns_, wide_;
  Scratch<T> memory_;
};

// One product that a column of gradients takes part in: dw[row][·] += …, and its plain sum.
template <class T>
struct WeightSum {
  const PackedRows<T>* rows = nullptr;  // or null: no product
  T* dw = nullptr;                      // row of the first column
  T* bias = nullptr;                    // likewise; or null
};

// Columns [first, first + count) of the gradients, and what becomes of them.
template <class T>
struct WeightColumns {
  int64_t first, count;
  WeightSum<T> sums[2];
};

// Gradient columns [first, first + count) times the rows of one chunk.
template <class T>
void sum_columns(const T* grad, int64_t grad_step, int64_t rows, bool add, int64_t count,
                 const WeightSum<T> (&sums)[2]) {
  constexpr int64_t run = PackedRows<T>::run;
  // Not a power of two apart: rows would share few sets of the cache.
  constexpr int64_t lda = run + 16;
  const bool products = sums[0].rows || sums[1].rows;
  Scratch<T> turned(products ? count * lda : 0);
  for (int64_t first = 0; first < rows; first += run, add = true) {
    const int64_t some = std::min(run, rows - first);
    const T* from = grad + first * grad_step;
    if (products) transpose_fn<T>()(from, grad_step, turned.get(), lda, some, count);
    const Strip<T> strip{turned.get(), 0, count};
    for (const WeightSum<T>& sum : sums) {
      if (sum.bias) recurrent_grad<T>().column_sums(from, grad_step, some, count, add, sum.bias);
      if (!sum.rows) continue;
      gemm<T>().run({.depth = some,
                     .b = sum.rows->of_run(first),
                     .c = sum.dw,
                     .n = sum.rows->columns(),
                     .accumulate = add,
                     .strips = &strip,
                     .strip_count = 1,
                     .a_step = lda,
                     .c_step = sum.rows->columns()});
    }
  }
}

// All columns, in blocks that are tasks. `add`: to what earlier chunks have summed up.
template <class T>
void sum_weights(const T* grad, int64_t grad_step, int64_t rows, bool add,
                 const std::vector<WeightColumns<T>>& columns) {
  constexpr int64_t wanted_tasks = 8, most = 196;  // turned columns of a run fit L2
  struct Block {
    const WeightColumns<T>* of;
    int64_t from, count;
  };
  std::vector<Block> blocks;
  for (const WeightColumns<T>& c : columns) {
    const int64_t share = round_up(std::max<int64_t>(1, c.count / wanted_tasks), gemm<T>().mr);
    const int64_t parts = ceil_div(c.count, std::min(most, share));
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t from = c.count * i / parts;
      blocks.push_back({&c, from, c.count * (i + 1) / parts - from});
    }
  }
  parallel_tasks(static_cast<int64_t>(blocks.size()), [&](int64_t task) {
    const Block& b = blocks[task];
    WeightSum<T> sums[2];
    for (int i = 0; i < 2; ++i) {
      sums[i] = b.of->sums[i];
      if (sums[i].rows) sums[i].dw += b.from * sums[i].rows->columns();
      if (sums[i].bias) sums[i].bias += b.from;
    }
    sum_columns(grad + b.of->first + b.from, grad_step, rows, add, b.count, sums);
  });
}

}  // namespace nnarch
