// Sums of rows, for products that have few rows or a short sum: gradients of a batch of one. And
// products of rows that were turned over, turned back.
#pragma once

#include <cstdint>

#include "cpu/epilogue.h"
#include "cpu/isa.h"

namespace nnarch {

// y[i * y_stride + j] = Σ_k a[i * a_row + k * a_column] · b[k * b_stride + j] for i < m, k < depth,
// j < n.
template <class T>
using CombineRows = void (*)(const T* a, int64_t a_row, int64_t a_column, int64_t m, int64_t depth,
                             const T* b, int64_t b_stride, int64_t n, T* y, int64_t y_stride);

// y[i * y_step + j] = epilogue(sums[j * step + i]) for i < m, j < n; the epilogue's vectors belong
// to j.
template <class T>
using TurnBack = void (*)(const T* sums, int64_t step, int64_t n, int64_t m, T* y, int64_t y_step,
                          const Epilogue<T>& epilogue);

NNARCH_PER_ISA(template <class T> CombineRows<T> combine_rows();
               template <class T> TurnBack<T> turn_back_fn();)

}  // namespace nnarch
