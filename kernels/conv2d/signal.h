// One block of outputs of a convolution of signals that lie channel by channel.
#pragma once

#include <cstdint>

#include "cpu/epilogue.h"
#include "cpu/isa.h"

namespace nnarch {

// y[m][j] = act(scale[m] · Σ_k a[m][k] · b[k][j] + shift[m] + residual[m][j])
template <class T>
struct SignalBlock {
  const T* a;  // the weight, row m at a + m * a_step
  int64_t a_step, rows, depth;
  const T* const* b;  // row k of samples, readable for whole panels
  int64_t columns;
  T* y;  // row m at y + m * y_step; the residual has the same steps
  int64_t y_step;
  Epilogue<T> epilogue;  // scale and shift are indexed by row
};

template <class T>
struct SignalTable {
  int64_t panel;  // columns of a register tile
  void (*run)(const SignalBlock<T>& block);
  // dst[i] = src[i * step] for i < n.
  void (*every)(const T* src, int64_t step, int64_t n, T* dst);
};

NNARCH_PER_ISA(template <class T> const SignalTable<T>& signal_table();)

template <class T>
const SignalTable<T>& signals() {
  return NNARCH_SELECT(signal_table<T>());
}

}  // namespace nnarch
