// The embedding kernels of one instruction set.
#pragma once

#include <cstdint>

#include "cpu/dropout.h"
#include "cpu/isa.h"

namespace nnarch {

// Where row r of the sum comes from: scale · weight[tokens[r]] + positions' row + segments' row.
template <class T>
struct EmbeddingSum {
  const T* weight;
  const int64_t* tokens;
  T scale;
  const T* position_weight;  // or null: none
  const int64_t* positions;  // or null: offset + r % length
  int64_t offset, length;
  const T* segment_weight;  // or null: none
  const int64_t* segments;
  int64_t columns;
};

// LayerNorm over the columns; both vectors may be null.
template <class T>
struct RowNorm {
  const T *weight, *bias;
  T eps;
};

// Gradients by rows of a table, from gradients that are sorted by row: those of row v are the rows
// order[start[v]] … order[start[v + 1] - 1] of `grad`, added in this order.
template <class T>
struct EmbeddingScatter {
  const T* grad;  // [·, columns], dense
  const int64_t *start, *order;
  int64_t columns;
  int64_t skipped;  // a row that gets no gradient, or -1
  T scale;
  bool mean;   // divide by the number of gradients
  bool zeros;  // the table's gradient is zeros already: rows without gradients stay
  bool stream;
};

template <class T>
struct EmbeddingTable {
  // y[r] = the sum of row r, times dropout's factors where `rule` is not null, for rows
  // [first, last). `factors` holds a row of them, rounded up to 64.
  void (*sum)(const EmbeddingSum<T>& e, const DropoutRule* rule, T* factors, T* y, int64_t first,
              int64_t last, bool stream);
  // The same, normalized before dropout. `work` holds two such rows.
  void (*normalize)(const EmbeddingSum<T>& e, const RowNorm<T>& norm, const DropoutRule* rule,
                    T* work, T* y, T* mean, T* invstd, int64_t first, int64_t last, bool stream);
  // Back through dropout and norm to the sum; adds to d_weight and d_bias [columns].
  void (*normalize_grad)(const EmbeddingSum<T>& e, const RowNorm<T>& norm, const DropoutRule* rule,
                         T* work, const T* grad, const T* mean, const T* invstd, T* dx, T* d_weight,
                         T* d_bias, int64_t first, int64_t last);
  // Rows [first, last) and columns [from, to) of the table's gradient.
  void (*scatter)(const EmbeddingScatter<T>& s, T* table_grad, int64_t first, int64_t last,
                  int64_t from, int64_t to);
};

// y[r] = weight[tokens[r]] for rows of `bytes`.
using CopyRowsFn = void (*)(const char* weight, const int64_t* tokens, char* y, int64_t rows,
                            int64_t bytes, bool stream);

NNARCH_PER_ISA(template <class T> const EmbeddingTable<T>& embedding_table();
               CopyRowsFn copy_rows_fn();)

}  // namespace nnarch
