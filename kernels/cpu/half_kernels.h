// What is done to runs of half types, of one instruction set.
#pragma once

#include <cstdint>

#include "cpu/epilogue.h"
#include "cpu/isa.h"

namespace nnarch {

struct HalfTable {
  // Dense runs to floats and back, rounded to nearest even.
  void (*widen)(const uint16_t* from, float* to, int64_t n);
  void (*narrow)(const float* from, uint16_t* to, int64_t n);
  // GemmTable<float>::few_rows past such weights (cpu/gemm.h).
  void (*few_rows)(const float* x, int64_t x_stride, int64_t m, const uint16_t* w, int64_t w_stride,
                   int64_t depth, int64_t n, float* y, int64_t y_stride,
                   const Epilogue<float>& epilogue);
  // The epilogue of n sums that are in y; the residual is read from `offset` on.
  void (*finish)(const Epilogue<float>& epilogue, int64_t offset, int64_t n, float* y);
};

NNARCH_PER_ISA(const HalfTable& half_table(bool bfloat16);)

}  // namespace nnarch
