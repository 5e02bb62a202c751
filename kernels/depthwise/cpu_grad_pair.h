// The weight gradient of 3×3 kernels in pairs of rows: ROWS rows of grad by P pixels, and all nine
// sums, in registers.
//
// A pixel of x is loaded once for both rows of grad: 50 loads for 126 multiply-adds at P = 7, where
// single rows of four pixels (cpu_grad_block.h) take 22 for 36; and three rows come out of the
// second-level cache for a row of grad, not four. It needs 24 registers. 128 channels of 56×56, the
// whole operation: 86 µs, 95 before; N 8, with the next rows read ahead, 1280 and 2270.
#pragma once

#include "cpu/wide.h"
#include "depthwise/cpu_grad_block.h"

namespace nnarch::NNARCH_ISA {

template <class T>
inline constexpr bool kGradPairs = kVectorBytes == 64;

// Blocks of P pixels of ROWS rows of grad.
template <class T>
struct GradPair {
  const T* const* rows;  // of x, that row 0 of grad meets first; null outside the image
  int64_t x;             // where in them the first column within the image is
  int64_t x_pixel;
  const T* g;
  int64_t g_pixel, g_row;
  int64_t blocks;
  int64_t channels;      // whole vectors
  T* partial;            // in packed order
  int64_t weight_block;  // from one block of channels to the next
  double* bias;          // the sums of grad by channel, or null
};

template <class T, int STRIDE, int P, int K, int J>
NNARCH_INLINE void use_pair_taps(Vec<T> value, const Vec<T>* g, Vec<T>* sum) {
  if constexpr (K >= 0 && K < 3) use_taps<T, STRIDE, P, J>(value, g, sum + 3 * K, MakeIndices<3>{});
}

template <class T, int STRIDE, int P, bool PRESENT, int LEFT, int I, int J, int... R>
NNARCH_INLINE void pair_column(const T*& x, const Steps& pixel, const Vec<T>* g, Vec<T>* sum,
                               Indices<R...>) {
  if constexpr (PRESENT) {
    Vec<T> value = load(step<J - LEFT>(x, pixel));
    keep_in_register(value);
    (use_pair_taps<T, STRIDE, P, I - R * STRIDE, J>(value, g + R * P, sum), ...);
  }
}

// Row I of x, for rows R of grad.
template <class T, int STRIDE, int P, int LEFT, int RIGHT, int I, class Rows, int... J>
NNARCH_INLINE void pair_row(const T* row, int64_t at, const Steps& pixel, const Vec<T>* g,
                            Vec<T>* sum, Rows grads, Indices<J...>) {
  if (row == nullptr) return;
  constexpr int columns = sizeof...(J);
  const T* x = row + at;
  (pair_column<T, STRIDE, P, (J >= LEFT && J < columns - RIGHT), LEFT, I, J>(x, pixel, g, sum,
                                                                             grads),
   ...);
}

template <class T, int STRIDE, int P, int LEFT, int RIGHT, class Rows, int... I>
NNARCH_INLINE void pair_rows(const T* const* rows, int64_t at, const Steps& pixel, const Vec<T>* g,
                             Vec<T>* sum, Rows grads, Indices<I...>) {
  (pair_row<T, STRIDE, P, LEFT, RIGHT, I>(rows[I], at, pixel, g, sum, grads,
                                          MakeIndices<(P - 1) * STRIDE + 3>{}),
   ...);
}

template <class T, int P, int... R>
NNARCH_INLINE void load_grad_rows(const T* p, int64_t row, const Steps& pixel, Vec<T>* g,
                                  Indices<R...>) {
  (load_grad<T, P>(p + R * row, pixel, g + R * P, MakeIndices<P>{}), ...);
}

template <class V, int... I>
NNARCH_INLINE V sum_of(const V* v, Indices<I...>) {
  constexpr int n = sizeof...(I), half = n / 2;
  if constexpr (n == 1)
    return v[0];
  else
    return sum_of(v, MakeIndices<half>{}) + sum_of(v + half, MakeIndices<n - half>{});
}

// The first LEFT columns and the last RIGHT lie outside the image; there is more than one block
// only where both are 0.
template <class T, int STRIDE, int ROWS, int P, int LEFT, int RIGHT>
void grad_pair(const GradPair<T>& a) {
  const Steps x_pixel(a.x_pixel), g_pixel(a.g_pixel);
  for (int64_t k = 0; k < a.channels; k += kLanes<T>) {
    T* partial = a.partial + k / kDepthwiseBlock * a.weight_block + k % kDepthwiseBlock;
    Vec<T> sum[9], total{};
    for (int i = 0; i < 9; ++i) sum[i] = load(partial + i * kDepthwiseBlock);
    const T* g_at = a.g + k;
    int64_t at = a.x + k;
    for (int64_t b = 0; b < a.blocks; ++b, g_at += P * a.g_pixel, at += P * STRIDE * a.x_pixel) {
      Vec<T> g[ROWS * P];
      load_grad_rows<T, P>(g_at, a.g_row, g_pixel, g, MakeIndices<ROWS>{});
      pair_rows<T, STRIDE, P, LEFT, RIGHT>(a.rows, at, x_pixel, g, sum, MakeIndices<ROWS>{},
                                           MakeIndices<(ROWS - 1) * STRIDE + 3>{});
      if (a.bias) total += sum_of(g, MakeIndices<ROWS * P>{});
    }
    for (int i = 0; i < 9; ++i) store(partial + i * kDepthwiseBlock, sum[i]);
    if (a.bias) add_wide<T>(a.bias + k, total, kLanes<T>);
  }
}

template <class T>
struct GradPairCode {
  using Fn = void (*)(const GradPair<T>&);
  Fn edges[2][2];  // whether the blocks reach beyond the left edge, and the right one
};
template <class T, int STRIDE, int ROWS, int P>
inline constexpr GradPairCode<T> kPair = {
    {{grad_pair<T, STRIDE, ROWS, P, 0, 0>, grad_pair<T, STRIDE, ROWS, P, 0, 1>},
     {grad_pair<T, STRIDE, ROWS, P, 1, 0>, grad_pair<T, STRIDE, ROWS, P, 1, 1>}}};

// For so many rows of grad, of blocks of 7 or 4 pixels.
template <class T>
const GradPairCode<T>& grad_pair_code(int64_t stride, int64_t rows, int64_t pixels) {
  if (stride == 1) {
    if (pixels == 7) return rows == 2 ? kPair<T, 1, 2, 7> : kPair<T, 1, 1, 7>;
    return rows == 2 ? kPair<T, 1, 2, 4> : kPair<T, 1, 1, 4>;
  }
  if (pixels == 7) return rows == 2 ? kPair<T, 2, 2, 7> : kPair<T, 2, 1, 7>;
  return rows == 2 ? kPair<T, 2, 2, 4> : kPair<T, 2, 1, 4>;
}

}  // namespace nnarch::NNARCH_ISA
