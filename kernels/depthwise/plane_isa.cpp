// Depthwise convolution of planes (NCHW): vectors along the rows, nothing is transposed.
//
// A block is one vector of columns in ROWS output rows. What a tap meets is an unaligned load,
// which costs two cycles where it crosses a cache line; each serves all rows of the block that
// reach it: 18 loads for the 36 multiply-adds of a 3×3 kernel in four rows.
#include "depthwise/cpu_plane.h"

namespace nnarch::NNARCH_ISA {
namespace {

// The multiply-adds of an input row with kernel row K; nothing where the kernel has no such row.
template <class T, int S, int K, int... C>
NNARCH_INLINE void use_taps(const Vec<T>* value, const Vec<T>* weight, Vec<T>& sum, Indices<C...>) {
  if constexpr (K >= 0 && K < S) ((sum += value[C] * weight[K * S + C]), ...);
}

// Input row I of a block, for output rows R; a null one lies outside the image.
template <class T, int S, int STRIDE, bool INSIDE, int I, int... R>
NNARCH_INLINE void use_row(const T* row, int64_t at, const RowMask<T>* mask, const Vec<T>* weight,
                           Vec<T>* sum, Indices<R...>) {
  if (row == nullptr) return;
  Vec<T> value[S];
  load_taps<STRIDE, INSIDE, S>(row + at, mask, value, MakeIndices<S>{});
  (use_taps<T, S, I - R * STRIDE>(value, weight, sum[R], MakeIndices<S>{}), ...);
}

template <class T, int S, int STRIDE, bool INSIDE, class Rows, int... I>
NNARCH_INLINE void use_rows(const T* const* rows, int64_t at, const RowMask<T>* mask,
                            const Vec<T>* weight, Vec<T>* sum, Rows out, Indices<I...>) {
  (use_row<T, S, STRIDE, INSIDE, I>(rows[I], at, mask, weight, sum, out), ...);
}

template <class T, int S, int STRIDE, int ROWS, bool INSIDE>
NNARCH_INLINE void block(const DepthwisePlane<T>& a, const T* const* rows, const Vec<T>* weight,
                         int64_t oy, int64_t ox) {
  const int64_t at = ox * STRIDE + a.column, left = a.ow - ox;
  const int64_t n = left < kLanes<T> ? left : kLanes<T>;
  RowMask<T> mask[S + 1] = {};
  if constexpr (!INSIDE) make_masks<STRIDE, S, T>(at, a.w, n, mask);
  Vec<T> sum[ROWS];
  for (int r = 0; r < ROWS; ++r) sum[r] = Vec<T>{};
  use_rows<T, S, STRIDE, INSIDE>(rows, at, mask, weight, sum, MakeIndices<ROWS>{},
                                 MakeIndices<(ROWS - 1) * STRIDE + S>{});
  for (int r = 0; r < ROWS; ++r) finish(a.epilogue, sum[r], (oy + r) * a.ow + ox, n, a.y);
}

template <class T, int S, int STRIDE, int ROWS>
NNARCH_INLINE void blocks(const DepthwisePlane<T>& a, const T* const* rows, const Vec<T>* weight,
                          int64_t oy) {
  constexpr int w = kLanes<T>;
  // Of the columns that a block reads; at stride 2 the last pair of loads reads one more.
  constexpr int span = STRIDE == 1 ? w + S - 1 : 2 * w + S - 1;
  for (int64_t ox = 0; ox < a.ow; ox += w) {
    const int64_t first = ox * STRIDE + a.column;
    if (first >= 0 && first + span <= a.w)
      block<T, S, STRIDE, ROWS, true>(a, rows, weight, oy, ox);
    else
      block<T, S, STRIDE, ROWS, false>(a, rows, weight, oy, ox);
  }
}

template <class T, int S, int STRIDE, int ROWS>
NNARCH_NOINLINE void block_row(const DepthwisePlane<T>& a, const Vec<T>* weight, int64_t oy) {
  constexpr int reach = (ROWS - 1) * STRIDE + S;
  const T* rows[reach];
  for (int i = 0; i < reach; ++i) {
    const int64_t iy = oy * STRIDE + a.row + i;
    rows[i] = iy >= 0 && iy < a.h ? a.x + iy * a.w : nullptr;
  }
  if constexpr (kHoldsWeights<S>) {
    Vec<T> held[S * S];
    hold<T>(weight, held, MakeIndices<S * S>{});
    blocks<T, S, STRIDE, ROWS>(a, rows, held, oy);
  } else {
    blocks<T, S, STRIDE, ROWS>(a, rows, weight, oy);
  }
}

template <class T, int S, int STRIDE>
void plane(const DepthwisePlane<T>& a) {
  constexpr int rows = STRIDE == 1 ? 4 : 2;
  Vec<T> weight[S * S];
  for (int i = 0; i < S * S; ++i) weight[i] = broadcast(a.weight[i * kDepthwiseBlock]);
  int64_t oy = 0;
  for (; oy + rows <= a.oh; oy += rows) block_row<T, S, STRIDE, rows>(a, weight, oy);
  if (oy < a.oh && a.oh >= rows)  // again some rows that were done, rather than row by row
    block_row<T, S, STRIDE, rows>(a, weight, a.oh - rows);
  else
    for (; oy < a.oh; ++oy) block_row<T, S, STRIDE, 1>(a, weight, oy);
  activate_plane(a);
}

template <class T>
void run(const DepthwisePlane<T>& a) {
  const bool one = a.stride == 1;
  if (a.s == 3) return one ? plane<T, 3, 1>(a) : plane<T, 3, 2>(a);
  if (a.s == 5) return one ? plane<T, 5, 1>(a) : plane<T, 5, 2>(a);
  return one ? plane<T, 7, 1>(a) : plane<T, 7, 2>(a);
}

}  // namespace

template <>
DepthwisePlaneRun<float> depthwise_plane_run<float>() {
  return run<float>;
}
template <>
DepthwisePlaneRun<double> depthwise_plane_run<double>() {
  return run<double>;
}

}  // namespace nnarch::NNARCH_ISA
