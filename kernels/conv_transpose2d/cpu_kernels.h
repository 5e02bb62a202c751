// The SIMD parts of a transposed convolution with few output channels.
#pragma once

#include <cstdint>

#include "cpu/epilogue.h"
#include "cpu/isa.h"

namespace nnarch {

template <class T>
struct TransposedTable {
  // to = from, and to[i * step + j] += z[i * z_step + j] for i < count, j < run: runs touch or
  // overlap (step <= run). Both have room for a vector more, and may be one.
  void (*add_runs)(const T* z, int64_t z_step, int64_t count, int64_t run, int64_t step,
                   const T* from, T* to);
  // The epilogue on n sums in y, whose vectors and activation are given per element.
  void (*finish)(const Epilogue<T>& e, int64_t offset, int64_t n, T* y);
};

NNARCH_PER_ISA(template <class T> const TransposedTable<T>& transposed_table();)

template <class T>
const TransposedTable<T>& transposed_table_of() {
  return NNARCH_SELECT(transposed_table<T>());
}

}  // namespace nnarch
