// Strassen's product of pairs of pixels (or of sequences, kernels/recurrent) with a weight: seven
// products of a quarter of the size in place of eight. With first and second pixels' rows of a
// block, each in two halves of its channels, [A11 A12; A21 A22], and the weight in quarters,
//     C11 = M1 + M4 − M5 + M7,  C12 = M3 + M5,  C21 = M2 + M4,  C22 = M1 − M2 + M3 + M6
// where M1 = (A11 + A22)(B11 + B22), M2 = (A21 + A22) B11, M3 = A11 (B12 − B22),
// M4 = A22 (B21 − B11), M5 = (A11 + A12) B22, M6 = (A21 − A11)(B11 + B12),
// M7 = (A12 − A22)(B21 + B22). The sums of weights are packed once.
//
// V. Strassen, Gaussian elimination is not optimal, Numer. Math. 13 (1969). What is added should be
// of one magnitude, or the smaller drowns in the rounding of the larger: channels in and out are
// scaled by powers of two, after their weights (G. Ballard et al., Improving the numerical
// stability of fast matrix multiplication, SIAM J. Matrix Anal. Appl. 37, 2016).
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace nnarch {

inline constexpr int64_t kStrassenProducts = 7;

// Two pixels of depth channels, and the offsets of their outputs. Without a partner `second` is
// null.
struct PixelPair {
  const float *first, *second;
  int64_t c_first, c_second;
};

// One row of M1 to M7 becomes two rows of C, of `columns` columns in each half.
struct StrassenRows {
  const float* products;  // of the first pair and M1
  int64_t row_step, product_step;
  int64_t columns;
  float* c;                    // the block's first column
  int64_t half;                // columns from one half to the other
  const float *scale, *shift;  // of both halves, `half` apart
  const float* residual;       // lies as c does, or null
  int64_t activation;
  float alpha;
  bool stream;
};

struct StrassenTable {
  // The left factors of M1 to M7 of a pair, each of `half` values, `step` apart. Channels are
  // multiplied by `scale` first. The pair that is next is fetched.
  void (*add_channels)(const PixelPair& pair, const PixelPair& next, const float* scale,
                       int64_t half, float* to, int64_t step);
  void (*add_products)(const StrassenRows& rows, const PixelPair* pairs, int64_t count);
};

NNARCH_PER_ISA(const StrassenTable& strassen_table();)

}  // namespace nnarch
