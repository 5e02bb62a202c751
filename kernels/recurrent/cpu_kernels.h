// The recurrent kernels of one instruction set: a product for few rows, and what follows a product.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace nnarch {

// c[r][j] = start[j] + Σ_k a[r][k]·b[k][j] for a few rows r, over whole panels of columns. Panels
// are those of GemmTable: [k][nr], one after the other.
template <class T, class Weight>
struct FewRows {
  const T* a;
  int64_t a_step, rows;  // rows <= GemvTable::most_rows
  const Weight* b;
  int64_t depth, panels;
  T* c;
  int64_t c_step;
  const T* start;  // [panels * nr] or null: 0
};

// A part of a step's sum of products: `depth` values of each row, `a_step` apart, times as many
// rows of every panel.
template <class T>
struct StepPart {
  const T* a;
  int64_t a_step;
  const T* b;  // this part of the weight's first panel
  int64_t panel_step, depth;
  bool apart;  // begins a sum of its own, added to the others at the end
};

// Lines that will be needed soon: `width` values of each row.
template <class T>
struct StepLines {
  const T* at;
  int64_t step, rows, width;
};

// c[r][j] = start[j] + Σ_parts Σ_k a[r][k]·b[k][j] over `panels` panels from panel `first` on.
template <class T>
struct StepProduct {
  int64_t rows, row;  // of A, from row `row` on
  const StepPart<T>* part;
  int64_t parts, first, panels;
  const T* start;  // [panels * nr]
  T* c;
  int64_t c_step;
  StepLines<T> ahead[4];  // fetched meanwhile
  bool fetches_weights;   // of the next panel, too
};

// The left factors of Strassen's product of pairs of rows (cpu_pairs.h): row i and row pairs + i,
// of each `count` values of the first half of what is multiplied, and as many of the second half.
template <class T>
struct PairFactors {
  int64_t rows, pairs;      // 2·pairs or 2·pairs - 1 rows
  const T *first, *second;  // in row 0
  int64_t first_step, second_step;
  const T *first_scale, *second_scale;
  int64_t count;  // whole vectors
  T* to;          // of M1 and pair 0
  int64_t pair_step, product_step;
};

// The seven products of `pairs` left factors with the panels of a block of columns and of the block
// half of all away, added up: c[r][j] = start[j] + the sum of products of row r with column j.
template <class T>
struct PairProduct {
  int64_t pairs;
  const T* a;  // of M1 and pair 0
  int64_t pair_step, product_step, depth;
  const T* b;  // right factors: [panels][7][depth][nr]
  int64_t panels;
  const T *start, *start_right;    // [panels * nr]
  T* c;                            // of the first row and column
  int64_t c_step, c_low, c_right;  // to the next row, the pair's second row, the other block
  StepLines<T> ahead[7];           // fetched meanwhile
  bool fetches_weights;            // of the next product, too
};

// What one block of units does with its products in some rows. Column g·width + u of gx and gh is
// gate g of unit u.
template <class T>
struct CellBlock {
  int64_t kind, rows, units, width;
  const T* gx;  // the input's part, with its biases; or null: in gh
  int64_t gx_step;
  const T* gh;  // the state's part
  int64_t gh_step;
  const T* bias_n;    // GRU: of the state's part of gate n; or null
  const T* peephole;  // LSTM: for i; those for f and o lie `hidden` and 2·hidden further; or null
  const T* h;         // GRU: the state before the step
  int64_t h_before_step;
  T* c;  // LSTM: the cell, before and after
  int64_t c_step;
  T* next;  // the state after the step
  int64_t next_step;
  T* y;  // the same once more; or null
  int64_t y_step;
  bool y_past_caches;
  T* kept;  // the first vector of the reserve; or null
  int64_t kept_step;
  int64_t hidden;  // distance of the reserve's vectors, and of the peephole's
};

// Columns in the order of products: blocks of `width` units, of which the last may have fewer.
// Column b·gates·width + g·width_of_b + u is gate g of unit b·width + u.
struct ColumnOrder {
  int64_t gates, hidden, width, last_width, blocks;

  int64_t units(int64_t b) const { return b + 1 < blocks ? width : hidden - b * width; }
  int64_t width_of(int64_t b) const { return b + 1 < blocks ? width : last_width; }
  int64_t start(int64_t b) const { return b * gates * width; }
  int64_t columns() const { return start(blocks - 1) + gates * last_width; }
};

// Rows of a layer-normalized LSTM. Gains and biases are in the order of columns.
template <class T>
struct NormRow {
  ColumnOrder order;
  T eps;
  const T *gain, *bias;
};

template <class T>
struct NormCell {
  NormRow<T> state;                // of the state's product
  const T *cell_gain, *cell_bias;  // [H]
  const T* peephole;               // [3, H] or null
  const T* gx;                     // normalized, with its biases
  T* gh;                           // the state's product, overwritten
  T *c, *h, *y;                    // [H]; y or null
  T* kept;                         // vectors of H: i, f, g, o, c, then gx (4), then gh (4)
};

template <class T>
struct RecurrentTable {
  int64_t most_few_rows;
  void (*few)(const FewRows<T, T>& p);
  void (*few_bfloat16)(const FewRows<T, uint16_t>& p);
  void (*step)(const StepProduct<T>& p);
  // The largest magnitude of the scaled values, or more where it is none: infinity or a NaN.
  T (*pair_factors)(const PairFactors<T>& p);
  void (*pairs)(const PairProduct<T>& p);
  void (*cell)(const CellBlock<T>& p);
  // row = normalized row · gain + bias, in place; what it was goes to `kept` as [gates][H], if any.
  void (*normalize)(const NormRow<T>& p, T* row, T* kept);
  void (*norm_cell)(const NormCell<T>& p);
  void (*to_bfloat16)(const T* from, uint16_t* to, int64_t n);
  void (*from_bfloat16)(const uint16_t* from, T* to, int64_t n);
};

NNARCH_PER_ISA(template <class T> const RecurrentTable<T>& recurrent_table();)

template <class T>
const RecurrentTable<T>& recurrent() {
  return NNARCH_SELECT(recurrent_table<T>());
}

}  // namespace nnarch
