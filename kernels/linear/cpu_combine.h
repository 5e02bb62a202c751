// Sums of rows, for products that have few rows or a short sum: gradients of a batch of one.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace nnarch {

// y[i * y_stride + j] = Σ_k a[i * a_row + k * a_column] · b[k * b_stride + j] for i < m, k < depth,
// j < n.
template <class T>
using CombineRows = void (*)(const T* a, int64_t a_row, int64_t a_column, int64_t m, int64_t depth,
                             const T* b, int64_t b_stride, int64_t n, T* y, int64_t y_stride);

NNARCH_PER_ISA(template <class T> CombineRows<T> combine_rows();)

}  // namespace nnarch
