// Products of bfloat16 by bfloat16, two at a time, where the CPU has them (AVX-512 BF16): each is
// exact in float, sums are floats, and a vector multiplies twice as many numbers as of floats.
#pragma once

#include <cstdint>

#include "cpu/epilogue.h"
#include "cpu/isa.h"

namespace nnarch {

// c[m][n] = Σ_k a[m][k]·b[k][n], or, where y is given, y = epilogue(c), rounded: an epilogue
// without a residual whose activation is none, relu or relu6.
struct PairsBlock {
  const uint16_t* a;  // rows a_step apart
  int64_t a_step;
  const uint16_t* b;  // panels of nr columns: [(depth + 1) / 2][nr][2], 0 past an odd depth
  int64_t depth, m, n;
  float* c;  // rows c_step apart
  int64_t c_step;
  uint16_t* y = nullptr;  // rows y_step apart
  int64_t y_step = 0;
  Epilogue<float> epilogue = {};
};

struct PairsTable {
  int64_t nr;
  void (*run)(const PairsBlock& p);
  // y[r][j] = Σ_k x[r][k]·w[j][k] for up to 4 rows of x and n of w, read as they lie.
  void (*few_rows)(const uint16_t* x, int64_t x_step, int64_t m, const uint16_t* w, int64_t w_step,
                   int64_t depth, int64_t n, float* y, int64_t y_step);
};

// Null where the instruction set or this CPU has none.
NNARCH_PER_ISA(const PairsTable* pairs_table();)

inline const PairsTable* pairs() { return NNARCH_SELECT(pairs_table()); }

}  // namespace nnarch
