// The backward kernels of one instruction set: what one step does with the gradient of its output
// before the product with the weights.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace nnarch {

// Some rows of one step. Gates are in the order of the reserve; rows of vectors lie `hidden` apart.
template <class T>
struct CellGrad {
  int64_t kind = 0, rows = 0, hidden = 0;
  const T* dy = nullptr;  // the gradient of the output; or null: 0
  int64_t dy_step = 0;
  const T* dh = nullptr;  // what the next step wants of h
  int64_t dh_step = 0;
  // LSTM: the gradient of the cell, after and before the step. GRU: the part of dh that goes past
  // the products, z·dh, likewise.
  T* carry = nullptr;
  int64_t carry_step = 0;
  const T* kept = nullptr;  // the reserve; RNN: the output
  int64_t kept_step = 0;
  // Row by row: c before the step (LSTM) or h (GRU).
  const T* const* before = nullptr;
  // The gradients of the products. RNN, LSTM: the gates. GRU: n of the input's product, then r, z
  // of both, then n of the state's. Normalized LSTM: gates of the input's product, of the state's.
  T* grad = nullptr;
  int64_t grad_step = 0;
  const T* peephole = nullptr;
  const T* norm = nullptr;
  T eps = 0;
  // What is added up over the rows, or null: rows of H as peephole and norm have them.
  T *peephole_sums = nullptr, *norm_sums = nullptr;
  T* hidden_out = nullptr;  // LSTM with a projection: o·tanh(c) once more; or null
  int64_t hidden_out_step = 0;
};

template <class T>
struct RecurrentGradTable {
  void (*cell)(const CellGrad<T>& p);
  // sums[j] (+)= Σ_r rows[r * step + j] for j < n.
  void (*column_sums)(const T* rows, int64_t step, int64_t count, int64_t n, bool add, T* sums);
  // to[r][j] = a[r][j] + b[r][j] for j < n; a may be null: 0.
  void (*add_rows)(const T* a, int64_t a_step, const T* b, int64_t b_step, int64_t rows, int64_t n,
                   T* to, int64_t to_step);
};

NNARCH_PER_ISA(template <class T> const RecurrentGradTable<T>& recurrent_grad_table();)

template <class T>
const RecurrentGradTable<T>& recurrent_grad() {
  return NNARCH_SELECT(recurrent_grad_table<T>());
}

}  // namespace nnarch
