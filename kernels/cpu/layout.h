// Copies between memory orders.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace nnarch {

// dst[j*dst_stride + i] = src[i*src_stride + j] for i < rows, j < columns.
// Strides are in elements; the inner dimension of both is dense.
template <class T>
using TransposeFn = void (*)(const T* src, int64_t src_stride, T* dst, int64_t dst_stride,
                             int64_t rows, int64_t columns);

NNARCH_PER_ISA(template <class T> TransposeFn<T> transpose_kernel();)

template <class T>
TransposeFn<T> transpose_fn() {
  return NNARCH_SELECT(transpose_kernel<T>());
}

// Copies rows past the caches (cpu/streaming.h); strides are in bytes. Where `dst` and its rows are
// not whole cache lines, through them.
NNARCH_PER_ISA(void stream_rows(const void* src, int64_t src_stride, void* dst, int64_t dst_stride,
                                int64_t rows, int64_t bytes);)

}  // namespace nnarch
