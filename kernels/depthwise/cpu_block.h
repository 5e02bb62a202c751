// A block: ROWS output rows by P pixels in accumulators, strip after strip of a row.
//
// Strips (cpu_strip.h) serve every kernel and every edge, one function call and one loop over
// kernel rows each. Blocks are for the common case, a square kernel of width S without dilation:
// nothing is counted at run time but channels and strips, and an input row that is loaded serves
// both output rows. 128 channels at 56×56, 3×3, packed, all else equal, Zen 4: strips of 8 pixels
// 78 µs, the same unrolled 70 µs, blocks of 2 by 4 64 µs; the multiply-adds alone take 61 µs.
#pragma once

#include "depthwise/cpu_row.h"
#include "depthwise/cpu_strip.h"

namespace nnarch::NNARCH_ISA {

// Wider kernels need S weights for each of two rows: more than the registers of AVX2 hold.
template <int S>
inline constexpr int kBlockRows = kVectorBytes == 64 || S == 3 ? 2 : 1;

// The channels of a vector that are loaded; all of them where it is WHOLE.
template <class T, bool WHOLE>
struct BlockLanes {
  RowMask<T> mask;
};

// All arrays here are flat and indexed by constants only: an array of arrays, or a loop over rows,
// stays in memory.

// Kernel row K of the packed weights; nothing where the kernel has no such row.
template <class T, int S, int K>
NNARCH_INLINE void load_weights(const T* w, Vec<T>* weight) {
  if constexpr (K >= 0 && K < S)
    for (int s = 0; s < S; ++s) weight[s] = load(w + (K * S + s) * kDepthwiseBlock);
}

// The multiply-adds of column J of an input row that meets kernel row K.
template <class T, int S, int STRIDE, int P, int K, int J>
NNARCH_INLINE void use_in_row(Vec<T> value, const Vec<T>* weight, Vec<T>* acc) {
  if constexpr (K >= 0 && K < S)
    use_pixel<T, S, STRIDE, P, J>(value, weight, acc, MakeIndices<S>{});
}

template <class T, int S, int STRIDE, int P, bool PRESENT, int LEFT, int I, int J, bool WHOLE,
          int... R>
NNARCH_INLINE void block_column(const T*& x, const Steps& pixel, const BlockLanes<T, WHOLE>& lanes,
                                const Vec<T>* weight, Vec<T>* acc, Indices<R...>) {
  if constexpr (PRESENT) {
    Vec<T> value = load_in_row<WHOLE>(step<J - LEFT>(x, pixel), lanes.mask);
    keep_in_register(value);
    (use_in_row<T, S, STRIDE, P, I - R * STRIDE, J>(value, weight + R * S, acc + R * P), ...);
  }
}

// Input row I of a block, for output rows R; a null one lies outside the image.
template <class T, int S, int STRIDE, int P, int LEFT, int RIGHT, int I, bool WHOLE, int... R,
          int... J>
NNARCH_INLINE void block_row(const T* row, int64_t offset, const Steps& pixel,
                             const BlockLanes<T, WHOLE>& lanes, const T* w, Vec<T>* acc,
                             Indices<R...> rows, Indices<J...>) {
  if (row == nullptr) return;
  constexpr int columns = sizeof...(J);
  const T* x = row + offset;
  Vec<T> weight[sizeof...(R) * S];
  (load_weights<T, S, I - R * STRIDE>(w, weight + R * S), ...);
  (block_column<T, S, STRIDE, P, (J >= LEFT && J < columns - RIGHT), LEFT, I, J>(x, pixel, lanes,
                                                                                 weight, acc, rows),
   ...);
}

template <class T, int S, int STRIDE, int P, int LEFT, int RIGHT, class Lanes, class Rows, int... I>
NNARCH_INLINE void block_rows(const T* const* rows, int64_t offset, const Steps& pixel,
                              const Lanes& lanes, const T* w, Vec<T>* acc, Rows out,
                              Indices<I...>) {
  (block_row<T, S, STRIDE, P, LEFT, RIGHT, I>(rows[I], offset, pixel, lanes, w, acc, out,
                                              MakeIndices<(P - 1) * STRIDE + S>{}),
   ...);
}

template <class T, int P, int... R>
NNARCH_INLINE void finish_rows(const Strip<T>& a, int64_t k, Vec<T>* acc, Indices<R...>) {
  (finish(a, k, R, acc + R * P, MakeIndices<P>{}), ...);
}

// Fetches the part of the next block's new input rows that lies below this vector. Read from end to
// end beforehand, as the hardware likes it, rows from memory added their whole time to the
// arithmetic's: 96 channels of 56×56, 7×7, N 8, 2.14 ms so, 2.55 before (Intel).
template <class T, int STRIDE, int P, int ROWS>
NNARCH_INLINE void fetch_ahead(const Strip<T>& a, int64_t k) {
  const T* row = a.ahead + a.x + k;
  for (int r = 0; r < ROWS * STRIDE; ++r, row += a.ahead_row) {
    const T* pixel = row;
#pragma GCC unroll 16
    for (int p = 0; p < P * STRIDE; ++p, pixel += a.pixel) __builtin_prefetch(pixel, 0, 2);
  }
}

// One vector of channels, from channel k on.
template <class T, int S, int STRIDE, int P, int LEFT, int RIGHT, bool WHOLE>
NNARCH_INLINE void block_vector(const Strip<T>& a, const Steps& pixel,
                                const BlockLanes<T, WHOLE>& lanes, int64_t k) {
  constexpr int rows = kBlockRows<S>;
  Vec<T> acc[rows * P];
  if (a.ahead) fetch_ahead<T, STRIDE, P, rows>(a, k);
  start<T, rows * P>(*a.epilogue, k, acc);
  block_rows<T, S, STRIDE, P, LEFT, RIGHT>(a.rows, a.x + k, pixel, lanes, weight_of(a, k), acc,
                                           MakeIndices<rows>{},
                                           MakeIndices<(rows - 1) * STRIDE + S>{});
  finish_rows<T, P>(a, k, acc, MakeIndices<rows>{});
}

// A block's outputs, from where they were gathered, past the caches: see half_lines_collide.
template <class T, int S, int P>
NNARCH_INLINE void write_lines(const Strip<T>& a, T* y) {
  const int64_t row = P * a.channels;
  for (int r = 0; r < kBlockRows<S>; ++r, y += a.y_row)
    for (int64_t i = 0; i < row; i += kLanes<T>) stream(y + i, load(a.lines + r * row + i));
}

// `a.strips` strips; all reach LEFT columns beyond the left edge of the image, or RIGHT beyond the
// right one, so there is more than one only where both are 0. LINES: outputs are gathered first.
template <class T, int S, int STRIDE, int P, int LEFT, int RIGHT, bool LINES>
NNARCH_INLINE void block_strips(const Strip<T>& a) {
  const Steps pixel(a.pixel);
  Strip<T> b = a;
  if constexpr (LINES)
    b.y = a.lines, b.y_pixel = a.channels, b.y_row = P * a.channels, b.stream = false;
  for (int64_t strip = 0; strip < a.strips; ++strip) {
    int64_t k = 0;
    for (; k + kLanes<T> <= b.channels; k += kLanes<T>)
      block_vector<T, S, STRIDE, P, LEFT, RIGHT>(b, pixel, BlockLanes<T, true>{}, k);
    if constexpr (kMaskedTails<T>)
      if (k < b.channels) {
        const BlockLanes<T, false> lanes{lanes_in_row<T>(k, b.channels)};
        block_vector<T, S, STRIDE, P, LEFT, RIGHT>(b, pixel, lanes, k);
      }
    b.x += P * STRIDE * b.pixel;
    if constexpr (LINES)
      write_lines<T, S, P>(a, a.y + strip * P * a.y_pixel);
    else
      b.y += P * b.y_pixel;
    if (b.residual) b.residual += P * b.residual_pixel;
  }
}

template <class T, int S, int STRIDE, int P, int LEFT, int RIGHT>
void block_fixed(const Strip<T>& a) {
  if constexpr (kVectorBytes < 64)
    if (a.lines) return block_strips<T, S, STRIDE, P, LEFT, RIGHT, true>(a);
  block_strips<T, S, STRIDE, P, LEFT, RIGHT, false>(a);
}

}  // namespace nnarch::NNARCH_ISA
